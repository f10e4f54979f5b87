"""Restarting a daemon with a million blocks, after a clean stop and after kill -9.

Timed from the start of the process to the answer to its first look-up, with the index's files out
of the page cache as far as the system lets go of them. Memory is what the daemon takes beyond one
with an empty index: private pages, after each kind of start.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from dualpath.bench import serving
from dualpath.bench.store.index_fixture import (
    CHAIN_BLOCKS,
    DRAM_BYTES,
    IndexFixture,
    make_index,
)
from dualpath.bench.store.lookup import BLOCKS, TRIAL_BLOCKS
from dualpath.bench.store.section import Figures, is_trial
from dualpath.proto.channel import client_options
from dualpath.proto.v1 import store_pb2, store_pb2_grpc
from dualpath.transfer.errors import Corrupt, Unavailable


def measure(scratch: Path, rounds: int, progress: Callable[[str], None]) -> Figures:
    """Figures of the section `restart`."""
    blocks = TRIAL_BLOCKS if is_trial(rounds) else BLOCKS
    fixture = make_index(scratch / "data", blocks)
    with _started(scratch / "empty", fixture) as (pid, _):
        empty_bytes = _private_bytes(pid)
    crash: list[float] = []
    clean: list[float] = []
    nbytes: list[int] = []
    for _ in range(rounds):
        _cool(fixture.path)
        with _started(scratch, fixture, fixture.chain(0)) as (pid, seconds):
            crash.append(seconds)
            nbytes.append(_private_bytes(pid))
        _cool(fixture.path)
        with _started(scratch, fixture, fixture.chain(fixture.chains - 1)) as (pid, seconds):
            clean.append(seconds)
            nbytes.append(_private_bytes(pid))
            _kill(pid)
        progress(f"clean {clean[-1]:.2f} s, after kill -9 {crash[-1]:.2f} s")
    return {
        "blocks": blocks,
        "clean_s": statistics.median(clean),
        "crash_s": statistics.median(crash),
        "clean_worst_s": max(clean),
        "crash_worst_s": max(crash),
        "memory_bytes_a_block": (max(nbytes) - empty_bytes) / blocks,
        "empty_daemon_bytes": empty_bytes,
    }


@contextmanager
def _started(
    folder: Path, fixture: IndexFixture, chain: bytes = b""
) -> Iterator[tuple[int, float]]:
    """A daemon, and the seconds until it answered a look-up of `chain`."""
    start = time.perf_counter()
    with serving.daemon(folder, disk_bytes=fixture.disk_bytes, dram_bytes=DRAM_BYTES) as daemon:
        if chain:
            _look_up(daemon.address("listen"), fixture, chain)
        yield daemon.pid, time.perf_counter() - start


def _look_up(address: str, fixture: IndexFixture, chain: bytes) -> None:
    with grpc.insecure_channel(address, options=client_options()) as channel:
        stub: Any = store_pb2_grpc.StoreStub(channel)
        hit = stub.Lookup(
            store_pb2.LookupRequest(
                namespace_id=fixture.namespace.id,
                hashes=chain,
                hash_bytes=len(chain) // CHAIN_BLOCKS,
            ),
            timeout=10,
        )
    if hit.blocks != CHAIN_BLOCKS:
        raise Corrupt(f"after a restart {hit.blocks} of {CHAIN_BLOCKS} blocks are there")


def _private_bytes(pid: int) -> int:
    """Memory that only this process has: not its mapped files, nor the shared arena."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise Unavailable(f"/proc/{pid}/status tells no RssAnon")


def _kill(pid: int) -> None:
    """SIGKILL a child; returns once it is dead, though not yet waited for."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def _cool(data: Path) -> None:
    """Ask the system to forget the cached pages of the index's files."""
    for path in data.glob("index*"):
        for file in (path,) if path.is_file() else tuple(path.iterdir()):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
