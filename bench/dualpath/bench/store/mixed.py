"""Reads and writes at once in a store at its capacity, against fio doing the same.

Ours: one thread reads from SSD by batches, verified, while another one puts new blocks durably
in groups; the store is full, so every group evicts. Limit: two fio jobs at once over one file, one
reading and one writing with as many syncs. Rates are of both together. No target: where two loads
meet, the share of each is a choice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dualpath.bench.rounds import GIB, Sample, interleave
from dualpath.bench.stopwatch import Stopwatch
from dualpath.bench.store.batch_reader import BatchReader
from dualpath.bench.store.cold_read import BATCH_BYTES
from dualpath.bench.store.fio import Fio, FioJob
from dualpath.bench.store.keyed_blocks import KeyedBlocks, check_stored
from dualpath.bench.store.pages import kind_of
from dualpath.bench.store.section import SKIPPED, Figures, is_trial
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.segment import SegmentGeometry
from dualpath.transfer.errors import Unavailable

BLOCK_BYTES = 1 << 20
GROUP_BYTES = 32 << 20
READ_BLOCKS = 512
TRIAL_READ_BLOCKS = 32
NEW_BLOCKS = 128
RUN_S = 2.0
LEASE_S = 600.0
_OWNER = "bench"
_DRAM_BYTES = 256 << 20


def measure(scratch: Path, rounds: int, progress: Callable[[str], None]) -> Figures:
    """Figures of the section `mixed`."""
    count = TRIAL_READ_BLOCKS if is_trial(rounds) else READ_BLOCKS
    kept = KeyedBlocks(BLOCK_BYTES, count, name="kept")
    segment = SegmentGeometry(kept.layout.slot_bytes, count + NEW_BLOCKS)
    config = StoreConfig(
        disk_bytes=segment.file_bytes,
        segment_bytes=segment.file_bytes,
        dram_bytes=_DRAM_BYTES,
        read_buffers_bytes=2 * BATCH_BYTES,
        promote=False,
    )
    run_s = RUN_S / 4 if is_trial(rounds) else RUN_S
    with BlockStore.open(scratch / "data", config) as store:
        kept.put(store)
    with BlockStore.open(scratch / "data", config) as store:
        store.arena.prefault()
        mixing = Mixing(store, kept, run_s)
        contestants: dict[str, Callable[[], Sample]] = {"ours": mixing.run}
        figures: Figures = {}
        try:
            fio = Fio(kind_of(store.arena.view))
        except Unavailable as error:
            figures[SKIPPED] = str(error)
        else:
            jobs = _fio_jobs(scratch / "fio", segment.file_bytes, run_s)
            contestants["fio"] = lambda: fio.run(*jobs)
        series = interleave(contestants, rounds, progress)
        evicted = sum(store.stats().evicted_blocks.values())
        mixing.end()
    for name, one in series.items():
        figures |= {
            f"{name}_gibs": one.gibs,
            f"{name}_read_gibs": one.median("read_gibs"),
            f"{name}_write_gibs": one.median("write_gibs"),
            f"{name}_cpu_s_per_gib": one.cpu_s_per_gib,
        }
    if "fio" in series:
        figures["ratio"] = series["ours"].ratio_to(series["fio"])
    return {**figures, "evicted_blocks": evicted}


def _fio_jobs(file: Path, file_bytes: int, run_s: float) -> tuple[FioJob, FioJob]:
    """A reader and a writer; the file is laid out before the first run."""
    both = (
        f"--size={file_bytes // BLOCK_BYTES * BLOCK_BYTES}",
        "--time_based",
        f"--runtime={round(1000 * run_s)}ms",
    )
    sync = f"--fdatasync={GROUP_BYTES // BLOCK_BYTES}"
    endless = 1 << 40
    return (
        FioJob([file], "read", BLOCK_BYTES, endless, more=both),
        FioJob([file], "write", BLOCK_BYTES, endless, more=(*both, sync)),
    )


class Mixing:
    """A reader of kept blocks and a writer of new ones, for a while."""

    def __init__(self, store: BlockStore, kept: KeyedBlocks, run_s: float) -> None:
        self._store = store
        self._kept = kept
        self._run_s = run_s
        self._reader = BatchReader(store, kept.layout, BATCH_BYTES)
        self._number = 0
        self._data = next(KeyedBlocks(BLOCK_BYTES, GROUP_BYTES // BLOCK_BYTES).groups())[1]
        namespace_id = store.open_namespace(kept.namespace)
        hit = store.lookup(namespace_id, kept.hashes, owner=_OWNER, lease_s=LEASE_S)
        if hit.blocks != kept.count:
            raise Unavailable(f"{hit.blocks} of {kept.count} blocks are there: {hit.detail}")
        self._lease_id = hit.lease_id

    def run(self) -> Sample:
        """Both at once until the time is over."""
        stop = threading.Event()
        with ThreadPoolExecutor(2) as threads, Stopwatch() as watch:
            began = time.perf_counter()
            jobs = [threads.submit(work, stop) for work in (self._read, self._write)]
            stop.wait(self._run_s)
            stop.set()
            (read, read_end), (written, write_end) = (job.result() for job in jobs)
        self._store.renew(self._lease_id, owner=_OWNER, lease_s=LEASE_S)
        return watch.sample(
            read + written,
            read_gibs=read / GIB / (read_end - began),
            write_gibs=written / GIB / (write_end - began),
        )

    def _read(self, stop: threading.Event) -> tuple[int, float]:
        nbytes = 0
        while not stop.is_set():
            self._reader.read(self._lease_id, self._kept.count)
            nbytes += self._kept.total_bytes
        return nbytes, time.perf_counter()

    def _write(self, stop: threading.Event) -> tuple[int, float]:
        nbytes = 0
        while not stop.is_set():
            self._number += 1
            chain = KeyedBlocks(BLOCK_BYTES, len(self._data), name=f"new {self._number}")
            namespace_id = self._store.open_namespace(self._kept.namespace)
            check_stored(self._store.put(namespace_id, chain.hashes, chain.parents, self._data))
            nbytes += chain.total_bytes
        return nbytes, time.perf_counter()

    def end(self) -> None:
        """Give the lease back."""
        self._store.release(self._lease_id, owner=_OWNER)
