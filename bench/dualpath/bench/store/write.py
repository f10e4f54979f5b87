"""Durable writes against fio with the same durability, and what the durability costs.

Ours: an embedded store and two writers, each with a chain of its own, which put groups of 32 MiB
and wait until each is durable before the next. Limit: fio writing as many bytes with io_uring and
O_DIRECT into a fresh preallocated file, with an fdatasync every 32 MiB. Preallocation is timed in
neither. `durable_cost` compares with the same puts when only each writer's last group asks for
durability: everything is on the medium at the end of both.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dualpath.bench.rounds import Sample, interleave
from dualpath.bench.stopwatch import Stopwatch
from dualpath.bench.store.fio import Fio, FioJob
from dualpath.bench.store.keyed_blocks import KeyedBlocks, check_stored
from dualpath.bench.store.pages import PageKind, kind_of
from dualpath.bench.store.section import SKIPPED, Figures, is_trial, turns_in
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.segment import SegmentGeometry
from dualpath.transfer.errors import Unavailable

BLOCK_BYTES = 1 << 20
GROUP_BYTES = 32 << 20
WRITERS = 2
TOTAL_BYTES = 512 << 20
TRIAL_BYTES = 16 << 20
_DRAM_BYTES = 256 << 20


def measure(scratch: Path, rounds: int, progress: Callable[[str], None]) -> Figures:
    """Figures of the section `write`."""
    total_bytes = TRIAL_BYTES if is_trial(rounds) else TOTAL_BYTES
    count = total_bytes // BLOCK_BYTES // WRITERS
    chains = [KeyedBlocks(BLOCK_BYTES, count, name=f"writer {n}") for n in range(WRITERS)]
    writing = Writing(scratch / "data", chains)
    pages = writing.check()
    contestants: dict[str, Callable[[], Sample]] = {
        "ours": lambda: writing.write(every_group=True),
        "ours, one writer": lambda: writing.write(every_group=True, writers=1),
        "ours, durable at the end": lambda: writing.write(every_group=False),
    }
    figures: Figures = {}
    try:
        fio = Fio(pages)
    except Unavailable as error:
        figures[SKIPPED] = str(error)
    else:
        file = scratch / "fio"
        job = FioJob(
            [file],
            "write",
            BLOCK_BYTES,
            total_bytes,
            more=(
                f"--size={total_bytes}",
                "--fallocate=posix",
                f"--fdatasync={GROUP_BYTES // BLOCK_BYTES}",
                "--end_fsync=1",
            ),
        )

        def limit() -> Sample:
            file.unlink(missing_ok=True)
            return fio.run(job)

        contestants["fio"] = limit
    series = interleave(contestants, turns_in(rounds), progress)
    ours, at_end = series["ours"], series["ours, durable at the end"]
    figures |= {
        "turns": len(ours.samples),
        "ours_gibs": ours.gibs,
        "one_writer_gibs": series["ours, one writer"].gibs,
        "durable_at_end_gibs": at_end.gibs,
        "durable_cost": max(0.0, at_end.ratio_to(ours) - 1),
        "ours_cpu_s_per_gib": ours.cpu_s_per_gib,
        "ours_spread": ours.spread,
        "pages": pages.value,
    }
    if "fio" in series:
        figures |= {
            "fio_gibs": series["fio"].gibs,
            "fio_cpu_s_per_gib": series["fio"].cpu_s_per_gib,
            "fio_spread": series["fio"].spread,
            "ratio": ours.ratio_to(series["fio"]),
        }
    return figures


Group = tuple[range, list[memoryview]]


class Writing:
    """Writes the same chains into a new store each time; only the puts are timed."""

    def __init__(self, folder: Path, chains: Sequence[KeyedBlocks]) -> None:
        self._folder = folder
        self._chains = chains
        self._groups: list[list[Group]] = [
            [
                (part, [memoryview(bytes(block)) for block in data])
                for part, data in chain.groups(GROUP_BYTES)
            ]
            for chain in chains
        ]
        self._total_bytes = sum(chain.total_bytes for chain in chains)
        self._first = KeyedBlocks(BLOCK_BYTES, 1, name="first")
        slots = self._total_bytes // chains[0].layout.slot_bytes + self._first.count
        segment = SegmentGeometry(chains[0].layout.slot_bytes, slots)
        self._config = StoreConfig(
            disk_bytes=2 * segment.file_bytes,
            segment_bytes=segment.file_bytes,
            dram_bytes=_DRAM_BYTES,
        )

    def write(self, *, every_group: bool, writers: int = WRITERS) -> Sample:
        """Put everything; each group durably, or only the last one of each chain."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with (
            BlockStore.open(self._folder, self._config) as store,
            ThreadPoolExecutor(writers) as threads,
        ):
            store.arena.prefault()
            self._first.put(store)  # makes the segment
            for chain in self._chains:
                store.open_namespace(chain.namespace)
            with Stopwatch() as watch:
                jobs = [
                    threads.submit(self._put, store, number, every_group)
                    for number in range(len(self._chains))
                ]
                for job in jobs:
                    job.result()
            return watch.sample(self._total_bytes)

    def _put(self, store: BlockStore, number: int, every_group: bool) -> None:
        chain, groups = self._chains[number], self._groups[number]
        namespace_id = store.open_namespace(chain.namespace)
        for place, (part, data) in enumerate(groups, 1):
            statuses = store.put(
                namespace_id,
                chain.hashes[part.start : part.stop],
                chain.parents[part.start : part.stop],
                data,
                durable=every_group or place == len(groups),
            )
            check_stored(statuses)

    def check(self) -> PageKind:
        """Write, reopen, compare every byte; the kind of pages of the arena. Raises Corrupt."""
        self.write(every_group=True)
        with BlockStore.open(self._folder, self._config) as store:
            for chain in self._chains:
                found = store.get(store.open_namespace(chain.namespace), chain.hashes)
                if len(found) != chain.count:
                    raise Unavailable(f"{len(found)} of {chain.count} blocks are there")
                for index, data in enumerate(found):
                    chain.check(index, memoryview(data), 0)
            return kind_of(store.arena.view)
