"""One end of flows in a process of its own, told what to do over a pipe.

`python -m dualpath.bench.transfer.far_end` reads a JSON object a line and answers each with one:
`{"ok": ...}` or `{"error": ...}`. It ends when its input does. `FarEnd` is who tells it. Commands:
open a transport, invite, connect, expose and arm a window, send batches, wait, stop, count.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from dualpath.bench.stopwatch import process_cpu_s
from dualpath.bench.testbed.process import dying_with_parent
from dualpath.bench.transfer.flow import FlowReader, FlowWriter, fill
from dualpath.bench.transfer.grain import BY_NAME
from dualpath.transfer.errors import DualPathError, Unavailable
from dualpath.transfer.lane_marks import LaneMarks
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.shm_transport import ShmTransport
from dualpath.transfer.tcp_transport import TcpConfig, TcpTransport
from dualpath.transfer.tls_files import TlsFiles
from dualpath.transfer.transport import Transport

ANSWER_S_MAX = 90.0
STOP_S_MAX = 20.0


def open_transport(
    kind: str, name: str, lane_dscp: Sequence[str] = (), tls: Sequence[str] = ()
) -> Transport:
    """A `tcp` or `shm` transport with its defaults, but for the marks and the TLS files (ours, its
    key, the authority's) of tcp."""
    if kind == "shm":
        return ShmTransport(name, _lost)
    files = None
    if tls:
        cert, key, authority = tls
        files = TlsFiles(cert, key, authority, authority)
    return TcpTransport(name, _lost, TcpConfig(marks=LaneMarks.parse(lane_dscp), tls=files))


def source_of(nbytes: int) -> Region:
    """Memory with the bytes of a flow, which any transport may send."""
    region = Region.memfd("dualpath-bench", nbytes)
    fill(region.view)
    return region


def target_of(nbytes: int) -> Region:
    """Memory to receive into, all of it there."""
    region = Region.anonymous(nbytes)
    region.ask_huge_pages()
    region.prefault()
    return region


def _lost(peer: str, reason: str) -> None:
    logging.getLogger(__name__).info("%s has gone: %s", peer, reason)


class _Ends:
    """What the child holds, by name of the transport."""

    def __init__(self) -> None:
        self.transports: dict[str, Transport] = {}
        self.readers: dict[str, FlowReader] = {}
        self.writers: dict[str, FlowWriter] = {}
        self.regions: list[Region] = []

    def open(
        self,
        transport: str,
        kind: str,
        lane_dscp: Sequence[str],
        listen: str,
        tls: Sequence[str] = (),
    ) -> str:
        opened = open_transport(kind, transport, lane_dscp, tls)
        self.transports[transport] = opened
        return opened.listen(listen) if listen else ""

    def invite(self, transport: str, peer: str) -> str:
        return self.transports[transport].invite(peer).hex()

    def connect(self, transport: str, peer: str, address: str, invitation: str) -> None:
        secret = bytes.fromhex(invitation)
        self.transports[transport].connect(peer, address, secret, deadline_s=ANSWER_S_MAX)

    def source(self, transport: str, grain: str) -> None:
        region = source_of(BY_NAME[grain].source_bytes)
        self.regions.append(region)
        self.writers[transport] = FlowWriter(self.transports[transport], BY_NAME[grain], region)

    def target(self, transport: str, grain: str) -> str:
        region = target_of(BY_NAME[grain].target_bytes)
        self.regions.append(region)
        reader = FlowReader(self.transports[transport], BY_NAME[grain], region)
        self.readers[transport] = reader
        return reader.window.to_bytes().hex()

    def arm(self, transport: str, batches: int) -> int:
        return self.readers[transport].arm(batches)

    def send(self, transport: str, peer: str, window: str, first: int, batches: int) -> None:
        descriptor = RegionDescriptor.from_bytes(bytes.fromhex(window))
        self.writers[transport].start(peer, descriptor, first, batches)

    def stop(self, transport: str) -> None:
        self.writers[transport].stop()
        self.writers[transport].wait()

    def wait(self, transport: str) -> None:
        self.writers[transport].wait()

    def count(self, transport: str) -> Mapping[str, float]:
        reader = self.readers[transport]
        return {
            "at_s": time.monotonic(),
            "landed_bytes": reader.landed_bytes,
            "wrong_parts": reader.wrong_parts,
        }

    def close(self) -> None:
        for transport in self.transports.values():
            transport.close()
        for region in self.regions:
            region.close()


def serve() -> None:
    """The child: until the end of its input."""
    ends = _Ends()
    try:
        for line in sys.stdin:
            order = json.loads(line)
            try:
                answer = {"ok": getattr(ends, order.pop("do"))(**order)}
            except DualPathError as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)
    finally:
        ends.close()


class FarEnd:
    """A child that runs `serve`; `prefix` is put before its command line. A context manager."""

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            dying_with_parent([*prefix, sys.executable, "-m", __name__]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout
        self._buffer = b""

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def cpu_s(self) -> float:
        """Processor time that it has taken."""
        return process_cpu_s(self.pid)

    def ask(self, do: str, **arguments: object) -> Any:
        """Have it do something; return its answer. Raises Unavailable."""
        try:
            self._orders.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._orders.flush()
            answer = json.loads(self._line(do))
        except (OSError, ValueError) as error:
            raise Unavailable(f"the far end is gone ({do}): {error}") from error
        if "error" in answer:
            raise Unavailable(f"{do}: {answer['error']}")
        return answer["ok"]

    def _line(self, do: str) -> bytes:
        deadline = time.monotonic() + ANSWER_S_MAX
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise Unavailable(f"the far end did not answer to {do} in {ANSWER_S_MAX:g} s")
            got = os.read(self._answers.fileno(), 1 << 20)
            if not got:
                raise Unavailable(f"the far end ended at {do}; its stderr says why")
            self._buffer += got
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def close(self) -> None:
        """End it."""
        with self._process:
            try:
                self._orders.close()
                self._process.wait(STOP_S_MAX)
            except (OSError, subprocess.TimeoutExpired):
                self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


if __name__ == "__main__":
    serve()
