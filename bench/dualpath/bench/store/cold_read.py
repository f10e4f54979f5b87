"""Cold reads: blocks from SSD into the arena, verified, against fio over the very same extents.

Ours: an embedded store that keeps nothing in DRAM, read in order through batches. Limit: fio with
io_uring and O_DIRECT at the same depth, reading the slots of the same segment file into the same
kind of pages. fio hashes nothing, so its processor time is compared with that of our reading
without the check, and the check with the checksum alone, over bytes that were just read: those are
in no cache and cost more than others. A disk that is shared swings by a fifth from one second to
the next: many short rounds tell more than few long ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash
from dualpath.bench.rounds import Sample, Series, interleave
from dualpath.bench.stopwatch import Stopwatch
from dualpath.bench.store.batch_reader import BATCHES, BatchReader
from dualpath.bench.store.fio import DEPTH, Fio, FioJob
from dualpath.bench.store.keyed_blocks import KeyedBlocks
from dualpath.bench.store.pages import kind_of
from dualpath.bench.store.section import SKIPPED, Figures, is_trial, turns_in
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.fetched_batch import FetchedBatch
from dualpath.kvstore.segment import SegmentGeometry
from dualpath.kvstore.store_api import Tier
from dualpath.transfer.errors import Corrupt, Unavailable
from numpy.typing import NDArray

TOTAL_BYTES = 1 << 30
TRIAL_BYTES = 16 << 20
BATCH_BYTES = 128 << 20
"""Of one batch, two of which are under way: what a batch costs by itself is spread over so much."""
LEASE_S = 600.0
_OWNER = "bench"
_DRAM_BYTES = 4 << 20
"""Slots of the store that is read: too few to keep anything."""


def measure_1m(scratch: Path, rounds: int, progress: Callable[[str], None]) -> Figures:
    """Figures of the section `cold_read_1m`."""
    return _measure(scratch, rounds, progress, 1 << 20)


def measure_256k(scratch: Path, rounds: int, progress: Callable[[str], None]) -> Figures:
    """Figures of the section `cold_read_256k`."""
    return _measure(scratch, rounds, progress, 256 << 10)


def _measure(
    scratch: Path, rounds: int, progress: Callable[[str], None], block_bytes: int
) -> Figures:
    trial = is_trial(rounds)
    total_bytes = TRIAL_BYTES if trial else TOTAL_BYTES
    blocks = KeyedBlocks(block_bytes, total_bytes // block_bytes)
    segment = SegmentGeometry(blocks.layout.slot_bytes, blocks.count)
    config = store_config(segment.file_bytes)
    progress(f"writing {blocks.total_bytes >> 20} MiB")
    with BlockStore.open(scratch / "data", config) as store:
        blocks.put(store)
    (file,) = (path for path in (scratch / "data").rglob("*") if is_segment(path, segment))
    with BlockStore.open(scratch / "data", config) as store:
        reading = ColdReading(store, blocks)
        reading.check()
        pages = kind_of(store.arena.view)
        device = store.stats().device
        contestants: dict[str, Callable[[], Sample]] = {
            "ours": reading.read,
            "unchecked": ColdReading(store, blocks, verify=False).read,
            "xxh3": Hashing(store, blocks, reading.lease_id).run,
        }
        figures: Figures = {}
        try:
            fio = Fio(pages)
        except Unavailable as error:
            figures[SKIPPED] = str(error)
        else:
            job = FioJob(
                [file],
                "read",
                block_bytes,
                blocks.total_bytes,
                more=(
                    "--readonly",
                    f"--offset={segment.data_offset}",
                    f"--size={blocks.total_bytes}",
                ),
            )
            # Two of our batches may be in flight at once: that depth must not be the secret.
            deep = replace(job, depth=BATCHES * DEPTH)
            contestants |= {"fio": lambda: fio.run(job), "fio, deep": lambda: fio.run(deep)}
        series = interleave(contestants, turns_in(rounds), progress)
    figures |= _figures(series)
    figures |= {"pages": pages.value, "device": device, "depth": DEPTH, "deep": BATCHES * DEPTH}
    return figures


def _figures(series: dict[str, Series]) -> Figures:
    ours, unchecked, hashing = series["ours"], series["unchecked"], series["xxh3"]
    check_cpu_s = ours.cpu_s_per_gib - unchecked.cpu_s_per_gib
    figures: Figures = {
        "ours_gibs": ours.gibs,
        "ours_cpu_s_per_gib": ours.cpu_s_per_gib,
        "unchecked_gibs": unchecked.gibs,
        "unchecked_cpu_s_per_gib": unchecked.cpu_s_per_gib,
        "xxh3_cpu_s_per_gib": hashing.cpu_s_per_gib,
        "check_cpu_ratio": check_cpu_s / hashing.cpu_s_per_gib,
        "turns": len(ours.samples),
        "ours_spread": ours.spread,
    }
    if "fio" in series:
        fio = series["fio"]
        figures |= {
            "fio_gibs": fio.gibs,
            "fio_cpu_s_per_gib": fio.cpu_s_per_gib,
            "fio_spread": fio.spread,
            "fio_deep_gibs": series["fio, deep"].gibs,
            "ratio": ours.ratio_to(fio),
            "ratio_to_deep": ours.ratio_to(series["fio, deep"]),
            "cpu_ratio": unchecked.cpu_s_per_gib / fio.cpu_s_per_gib,
        }
    return figures


def store_config(segment_bytes: int) -> StoreConfig:
    """Of a store whose blocks lie in one segment and are always read from it."""
    return StoreConfig(
        disk_bytes=segment_bytes,
        segment_bytes=segment_bytes,
        dram_bytes=_DRAM_BYTES + BATCH_BYTES,
        read_buffers_bytes=2 * BATCH_BYTES,
        promote=False,
    )


def is_segment(path: Path, segment: SegmentGeometry) -> bool:
    """Whether it is the file of that one segment."""
    return path.is_file() and path.stat().st_size == segment.file_bytes


class Hashing:
    """The checksum of every chunk where and when it has arrived, without the reading."""

    def __init__(self, store: BlockStore, blocks: KeyedBlocks, lease_id: int) -> None:
        self._blocks = blocks
        self._lease_id = lease_id
        self._reader = BatchReader(store, blocks.layout, BATCH_BYTES, verify=False)

    def run(self) -> Sample:
        """Read all once; only the hashing is timed."""
        seconds = cpu_s = 0.0

        def visit(batch: FetchedBatch, _first: int, items: NDArray[np.int32]) -> None:
            nonlocal seconds, cpu_s
            view, places = batch.region.view, batch.offsets[items].tolist()
            nbytes = batch.nbytes[items].tolist()
            cpu_began, began = time.thread_time(), time.perf_counter()
            for start, length in zip(places, nbytes, strict=True):
                xxhash.xxh3_64_intdigest(view[start : start + length])
            seconds += time.perf_counter() - began
            cpu_s += time.thread_time() - cpu_began

        self._reader.read(self._lease_id, self._blocks.count, visit)
        return Sample(self._blocks.total_bytes, seconds, cpu_s)


class ColdReading:
    """Reads all blocks of one lease again and again."""

    def __init__(self, store: BlockStore, blocks: KeyedBlocks, *, verify: bool = True) -> None:
        self._store = store
        self._blocks = blocks
        self._reader = BatchReader(store, blocks.layout, BATCH_BYTES, verify=verify)
        namespace_id = store.open_namespace(blocks.namespace)
        hit = store.lookup(namespace_id, blocks.hashes, owner=_OWNER, lease_s=LEASE_S)
        if hit.blocks != blocks.count:
            raise Unavailable(f"{hit.blocks} of {blocks.count} blocks are there: {hit.detail}")
        self.lease_id = hit.lease_id
        """Of all blocks."""

    def read(self) -> Sample:
        """All blocks. Raises Unavailable if they came from elsewhere than SSD."""
        before = self._store.stats().read_bytes[Tier.SSD]
        with Stopwatch() as watch:
            self._reader.read(self.lease_id, self._blocks.count)
        self._store.renew(self.lease_id, owner=_OWNER, lease_s=LEASE_S)
        nbytes = self._blocks.total_bytes
        came = self._store.stats().read_bytes[Tier.SSD] - before
        if came != nbytes:
            raise Unavailable(f"{came} of {nbytes} bytes came from SSD: the read was not cold")
        return watch.sample(nbytes)

    def check(self) -> None:
        """Read all once and compare every byte. Raises Corrupt."""
        layout, blocks = self._blocks.layout, self._blocks
        expected = memoryview(bytearray(layout.block_bytes))
        filled = -1

        def visit(batch: FetchedBatch, first: int, items: NDArray[np.int32]) -> None:
            nonlocal filled
            for item in items.tolist():
                index, chunk = divmod(first + item, layout.chunk_count)
                if index != filled:
                    blocks.fill(index, expected, 0)
                    filled = index
                offset, nbytes = layout.chunk_extent(chunk)
                start = int(batch.offsets[item])
                if batch.region.view[start : start + nbytes] != expected[offset : offset + nbytes]:
                    raise Corrupt(f"block {index}, chunk {chunk} came back wrong")

        self._reader.read(self.lease_id, blocks.count, visit)
