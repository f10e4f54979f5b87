"""What is compared: a transport with its grain, and the limits that it stands beside.

A sample moves `total_bytes` in whole batches, each byte verified by its hash where it lands. The
writer of tcp and shm is a process of its own; that of memory is this one.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from dualpath.bench.rounds import Sample
from dualpath.bench.stopwatch import Stopwatch
from dualpath.bench.store.memory_copy import copy_blocks
from dualpath.bench.store.socket_copy import SocketCopy
from dualpath.bench.transfer.far_end import FarEnd, open_transport, source_of, target_of
from dualpath.bench.transfer.flow import FlowReader, FlowWriter
from dualpath.bench.transfer.grain import Grain
from dualpath.transfer.errors import Corrupt, Unavailable
from dualpath.transfer.memory_transport import MemoryHub, MemoryTransport
from dualpath.transfer.tls_files import TlsFiles
from numpy.typing import NDArray

KINDS = ("memory", "shm", "tcp", "tcp+tls")
MEMCPY, BARE_SOCKET, HASHING_SOCKET = "memcpy", "socket", "hashing-socket"
MEMCPY_FINE = "memcpy-40K"
TLS_SOCKET, CIPHER = "tls-socket", "aes-256-gcm"
CHUNK_BYTES = 1 << 20
SLICE_BYTES = 40 << 10
MEMCPY_BYTES = 32 << 20
"""As much memory a side as flows have: what fits into the caches must do so for all."""
RECORD_BYTES = 16 << 10
"""The longest record of TLS."""
CONNECT_S_MAX = 30.0

Measure = Callable[[], Sample]


def _checked(reader: FlowReader) -> None:
    if reader.wrong_parts:
        raise Corrupt(f"{reader.wrong_parts} parts arrived with other bytes than were sent")


@contextmanager
def flow(kind: str, grain: Grain, total_bytes: int) -> Iterator[Measure]:
    """A measurement of one transport with one grain. Raises Unavailable, Corrupt."""
    batches = max(1, total_bytes // grain.batch_bytes)
    opened = _memory_flow if kind == "memory" else _process_flow
    with opened(kind, grain, batches) as measure:
        yield measure


@contextmanager
def _process_flow(kind: str, grain: Grain, batches: int) -> Iterator[Measure]:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dualpath-"))
        far = stack.enter_context(FarEnd())
        listen = f"{folder}/data.sock" if kind == "shm" else "127.0.0.1:0"
        files = certificates(folder) if kind == "tcp+tls" else None
        tls = [] if files is None else [files.cert, files.key, files.ca]
        address = far.ask(
            "open", transport="w", kind=kind, lane_dscp=["all=0"], listen=listen, tls=tls
        )
        far.ask("source", transport="w", grain=grain.name)
        # The transport ends first: its threads may still look at what has landed.
        target = target_of(grain.target_bytes)
        stack.callback(target.close)
        transport = open_transport(kind, "r", ["all=0"], tls)
        stack.callback(transport.close)
        reader = FlowReader(transport, grain, target)
        secret = bytes.fromhex(far.ask("invite", transport="w", peer="r"))
        transport.connect("w", address, secret, deadline_s=CONNECT_S_MAX)
        window = reader.window.to_bytes().hex()

        def measure() -> Sample:
            with Stopwatch([far.pid]) as watch:
                first = reader.arm(batches)
                far.ask(
                    "send", transport="w", peer="r", window=window, first=first, batches=batches
                )
                reader.wait()
            far.ask("wait", transport="w")
            _checked(reader)
            return watch.sample(batches * grain.batch_bytes)

        yield measure


@contextmanager
def _memory_flow(kind: str, grain: Grain, batches: int) -> Iterator[Measure]:
    hub = MemoryHub()
    with contextlib.ExitStack() as stack:
        source, target = source_of(grain.source_bytes), target_of(grain.target_bytes)
        stack.callback(target.close)
        stack.callback(source.close)
        ends = [MemoryTransport(name, lambda *_: None, hub) for name in ("w", "r")]
        for end in ends:
            stack.callback(end.close)
        writing, reading = ends
        reader = FlowReader(reading, grain, target)
        writer = FlowWriter(writing, grain, source)
        address = writing.listen(f"bench-{grain.name}")
        reading.connect("w", address, writing.invite("r"), deadline_s=CONNECT_S_MAX)

        def measure() -> Sample:
            with Stopwatch() as watch:
                writer.start("r", reader.window, reader.arm(batches), batches)
                reader.wait()
            writer.wait()
            _checked(reader)
            return watch.sample(batches * grain.batch_bytes)

        yield measure


@contextmanager
def memcpy(total_bytes: int) -> Iterator[dict[str, Measure]]:
    """numpy copies between memories on the pages that flows have: of 1 MiB at a time, and of 40 KiB
    which lie as far apart as the slices of the finest grain."""
    source, target = source_of(MEMCPY_BYTES), target_of(2 * MEMCPY_BYTES)
    dense = target.view[:MEMCPY_BYTES]
    try:
        whole, fine = (_order(total_bytes, each) for each in (CHUNK_BYTES, SLICE_BYTES))
        yield {
            MEMCPY: lambda: copy_blocks(source.view, dense, CHUNK_BYTES, whole),
            MEMCPY_FINE: lambda: _copy_slices(source.view, target.view, fine),
        }
    finally:
        dense.release()
        # An error may hold frames that hold arrays over the memory; it must stay the one to see.
        for region in (source, target):
            with contextlib.suppress(BufferError):
                region.close()


def _order(total_bytes: int, block_bytes: int) -> NDArray[np.int64]:
    return np.arange(total_bytes // block_bytes, dtype=np.int64) % (MEMCPY_BYTES // block_bytes)


def _copy_slices(source: memoryview, target: memoryview, order: NDArray[np.int64]) -> Sample:
    """Slice `order[i]` to a place of its own, with a gap of its size behind it."""
    slices = np.frombuffer(source, dtype=np.uint8)
    places = np.frombuffer(target, dtype=np.uint8)
    starts = (order * SLICE_BYTES).tolist()
    with Stopwatch() as watch:
        for start in starts:
            np.copyto(
                places[2 * start : 2 * start + SLICE_BYTES], slices[start : start + SLICE_BYTES]
            )
    return watch.sample(len(starts) * SLICE_BYTES)


@contextmanager
def sockets(total_bytes: int) -> Iterator[dict[str, Measure]]:
    """One TCP stream between two processes that do nothing else, bare and hashing."""
    with SocketCopy(total_bytes, CHUNK_BYTES) as copy:
        yield {
            BARE_SOCKET: lambda: copy.copy(hashing=False),
            HASHING_SOCKET: lambda: copy.copy(hashing=True),
        }


@contextmanager
def tls_limits(total_bytes: int) -> Iterator[dict[str, Measure]]:
    """One TLS stream between two processes that do nothing else, and the cipher alone on one core,
    record by record."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dualpath-"))
        copy = stack.enter_context(SocketCopy(total_bytes, CHUNK_BYTES, certificates(folder)))
        memory = source_of(MEMCPY_BYTES)
        stack.callback(memory.close)
        cipher = _cipher()
        yield {
            TLS_SOCKET: lambda: copy.copy(hashing=False),
            CIPHER: lambda: _encrypt(memory.view, cipher, total_bytes),
        }


def certificates(folder: str) -> TlsFiles:
    """Those of both ends of a stream on loopback. Raises Unavailable."""
    try:
        from dualpath.bench.testbed.authority import Authority  # noqa: PLC0415 - optional
    except ImportError as error:
        raise _no_cryptography(error) from error
    authority = Authority(Path(folder), "authority")
    pair = authority.pair("both")
    return TlsFiles(pair.cert, pair.key, authority.ca, authority.ca)


def _cipher() -> Callable[[memoryview], object]:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415
    except ImportError as error:
        raise _no_cryptography(error) from error
    sealed = AESGCM(AESGCM.generate_key(256))
    nonce = bytes(12)  # what is encrypted goes nowhere
    return lambda record: sealed.encrypt(nonce, record, None)


def _no_cryptography(error: ImportError) -> Unavailable:
    return Unavailable(
        f"no TLS: {error}; install it with `pip install 'dualpath[bench]'`, or leave tcp+tls out "
        "by --only"
    )


def _encrypt(
    memory: memoryview, cipher: Callable[[memoryview], object], total_bytes: int
) -> Sample:
    with Stopwatch() as watch:
        for start in range(0, total_bytes, RECORD_BYTES):
            at = start % MEMCPY_BYTES
            cipher(memory[at : at + RECORD_BYTES])
    return watch.sample(total_bytes)
