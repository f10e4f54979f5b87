"""Redis over TCP, with a pipelining client of our own: the Python ones are slower than the server.

settings: folder, server (program of redis-server), environment.
"""

from __future__ import annotations

import socket
import subprocess
from typing import Any

from children import Children, free_port
from harness import serve

CALL_BYTES = 8 << 20
REPLY_S_MAX = 60.0


class Driver:
    """See harness."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._children = Children(settings["folder"])
        self.version = ""
        self.server_pids: list[int] = []

    def start(self) -> None:
        port, program = free_port(), self._settings["server"]
        environment = self._settings["environment"]
        self._children.start(
            "redis",
            [
                program,
                "--port",
                str(port),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--appendonly",
                "no",
            ],
            **environment,
        )
        self._children.wait_port(port)
        self._link = socket.create_connection(("127.0.0.1", port), timeout=REPLY_S_MAX)
        self._link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._replies = self._link.makefile("rb")
        self.server_pids = self._children.pids
        told = subprocess.run(
            [program, "--version"], capture_output=True, text=True, check=True, env=environment
        )
        self.version = "Redis " + told.stdout.split("v=")[1].split()[0]

    def open(self, block_bytes: int, pieces: int, piece_blocks: int) -> None:
        self._link.sendall(b"FLUSHALL\r\n")
        self._expect(b"+OK")
        self._step = max(1, CALL_BYTES // block_bytes)

    def _expect(self, wanted: bytes) -> None:
        line = self._replies.readline().rstrip()
        if line != wanted:
            raise RuntimeError(f"Redis answered {line[:200]!r}, not {wanted!r}")

    def put(self, keys: list[str], blocks: list[memoryview]) -> None:
        for at in range(0, len(keys), self._step):
            part = slice(at, at + self._step)
            for key, block in zip(keys[part], blocks[part], strict=True):
                head = f"*3\r\n$3\r\nSET\r\n${len(key)}\r\n{key}\r\n${block.nbytes}\r\n"
                self._link.sendall(head.encode())
                self._link.sendall(block)
                self._link.sendall(b"\r\n")
            for _ in keys[part]:
                self._expect(b"+OK")

    def get(self, keys: list[str], places: list[memoryview]) -> None:
        for at in range(0, len(keys), self._step):
            part = slice(at, at + self._step)
            self._link.sendall("".join(f"GET {key}\r\n" for key in keys[part]).encode())
            for place in places[part]:
                self._expect(b"$%d" % place.nbytes)
                if self._replies.readinto(place) != place.nbytes:
                    raise RuntimeError("Redis ended inside of a value")
                self._expect(b"")

    def forget(self, keys: list[str]) -> None:
        self._link.sendall(f"DEL {' '.join(keys)}\r\n".encode())
        self._expect(b":%d" % len(keys))

    def settle(self) -> None:
        """Everything is in DRAM."""

    def chill(self) -> None:
        """Nothing is on disk."""

    def close(self) -> None:
        self._link.close()
        self._children.stop()


if __name__ == "__main__":
    serve(Driver)
