"""The model's traffic: operations of 1 MiB and request-reply messages of 4 KiB, one at a time.

`python -m dualpath.bench.isolation.protected serve ADDRESS PORT` answers: to every frame (bytes
u32, bytes of the answer u32, payload) as many bytes as it asks for. `... drive ADDRESS PORT` reads
a number of seconds a line, sends for as long, and prints a JSON object of times in milliseconds.
A step is one operation, some messages, and a pause in which the model would compute; nothing of
this is marked, as the traffic of a collective library that knows nothing of us.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from collections.abc import Mapping

OPERATION_BYTES = 1 << 20
MESSAGE_BYTES = 4 << 10
MESSAGES = 8
PAUSE_S = 0.01
"""As long as a layer's compute may take; the link is the KV's meanwhile."""
SIZES = {"1m": OPERATION_BYTES, "4k": MESSAGE_BYTES}
ACK_BYTES = 8
SOCKET_S_MAX = 60.0
_HEAD = struct.Struct("<II")
_CONGESTION = b"cubic"


def _tuned(sock: socket.socket) -> socket.socket:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _CONGESTION)
    sock.settimeout(SOCKET_S_MAX)
    return sock


def _received(sock: socket.socket, into: memoryview) -> bool:
    """Fill `into`; False if the other side has ended before."""
    while into:
        count = sock.recv_into(into)
        if not count:
            return False
        into = into[count:]
    return True


def serve(address: str, port: int) -> None:
    """Answer one caller until it ends."""
    buffer = memoryview(bytearray(OPERATION_BYTES))
    head = memoryview(bytearray(_HEAD.size))
    with socket.create_server((address, port)) as server:
        print("ready", flush=True)
        server.settimeout(SOCKET_S_MAX)
        with _tuned(server.accept()[0]) as sock:
            sock.settimeout(None)
            while _received(sock, head):
                nbytes, answer = _HEAD.unpack(head)
                if nbytes > OPERATION_BYTES or answer > OPERATION_BYTES:
                    return
                if not _received(sock, buffer[:nbytes]):
                    return
                sock.sendall(buffer[:answer])


class Driver:
    """The caller's side."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = memoryview(bytearray(OPERATION_BYTES))

    def _exchange_ms(self, nbytes: int, answer: int) -> float:
        begin = time.perf_counter()
        self._sock.sendmsg([_HEAD.pack(nbytes, answer)])
        self._sock.sendall(self._buffer[:nbytes])
        if not _received(self._sock, self._buffer[:answer]):
            raise ConnectionError("the answering side has ended")
        return (time.perf_counter() - begin) * 1e3

    def drive(self, seconds: float) -> Mapping[str, list[float]]:
        """Times of operations and of messages for about `seconds`."""
        times: dict[str, list[float]] = {"1m": [], "4k": []}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            times["1m"].append(self._exchange_ms(OPERATION_BYTES, ACK_BYTES))
            for _ in range(MESSAGES):
                times["4k"].append(self._exchange_ms(MESSAGE_BYTES, MESSAGE_BYTES))
            time.sleep(PAUSE_S)
        return times


def main(role: str, address: str, port: int) -> None:
    """Either side."""
    if role == "serve":
        serve(address, port)
        return
    with _tuned(socket.create_connection((address, port), SOCKET_S_MAX)) as sock:
        driver = Driver(sock)
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(driver.drive(float(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
