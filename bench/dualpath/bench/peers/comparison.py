"""Runs the entries in turn, round by round, and collects their figures.

Each entry is started, measured with every size of block and ended before the next one starts: none
takes memory or processor from another. The order turns by one each round.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dualpath.bench.peers.catalogue import ENVIRONMENTS, REDIS, Entry, Reach
from dualpath.bench.peers.driver_process import PIECE_BYTES, DriverProcess
from dualpath.bench.peers.environments import Environments
from dualpath.bench.rounds import GIB
from dualpath.transfer.errors import Unavailable

FAILURES_MAX = 2
Measured = Mapping[str, float]


@dataclass(slots=True)
class Row:
    """What was found of one entry; `runs` by size of block."""

    entry: Entry
    version: str = ""
    skipped: str = ""
    runs: dict[int, list[Measured]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def gibs(self, way: str, block_bytes: int, total_bytes: int) -> float | None:
        """Median of `put` or `get`; None if it was not measured."""
        runs = self.runs.get(block_bytes)
        if not runs:
            return None
        return statistics.median(total_bytes / GIB / max(run[f"{way}_s"], 1e-9) for run in runs)

    def cpu_s_per_gib(
        self, way: str, block_bytes: int, total_bytes: int
    ) -> tuple[float, float] | None:
        """Medians of the client's and the servers' processor time."""
        runs = self.runs.get(block_bytes)
        if not runs:
            return None
        client, server = (
            statistics.median(run[f"{way}_{who}_cpu_s"] for run in runs) * GIB / total_bytes
            for who in ("client", "server")
        )
        return client, server


class Comparison:
    """See the module docstring."""

    def __init__(
        self,
        entries: Sequence[Entry],
        scratch: Path,
        environments: Environments,
        progress: Callable[[str], None],
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        """`piece_bytes` is what one put or get moves at once."""
        self.rows = [Row(entry) for entry in entries]
        self._scratch = scratch
        self._environments = environments
        self._progress = progress
        self.piece_bytes = piece_bytes
        self._pythons: dict[str, Path] = {"": Path(sys.executable)}

    def prepare(self, *, install: bool) -> None:
        """Find or install what the entries need; those that cannot run are skipped."""
        needed = {row.entry.environment for row in self.rows if row.entry.environment}
        needed |= {REDIS.name for row in self.rows if row.entry.redis}
        reasons: dict[str, str] = {}
        for environment in ENVIRONMENTS:
            if environment.name in needed:
                try:
                    python = self._environments.python(environment, install=install)
                    self._pythons[environment.name] = python
                except Unavailable as error:
                    reasons[environment.name] = str(error)
                    self._progress(f"skipped: {environment.name}: {error}")
        for row in self.rows:
            row.skipped = reasons.get(row.entry.environment, "")
            if row.entry.redis and not row.skipped:
                row.skipped = reasons.get(REDIS.name, "")

    def run(self, rounds: int, sizes: Sequence[int], total_bytes: int) -> None:
        """Measure. An entry that fails is tried again in the next round, but not a third time."""
        for number in range(rounds):
            turn = number % len(self.rows)
            for row in self.rows[turn:] + self.rows[:turn]:
                if row.skipped or len(row.failures) >= FAILURES_MAX:
                    continue
                self._progress(f"round {number + 1}/{rounds}: {row.entry.name}")
                groups = [[size] for size in sizes] if row.entry.fresh else [list(sizes)]
                for group in groups:
                    try:
                        self._measure(row, group, total_bytes)
                    except Unavailable as error:
                        row.failures.append(str(error))
                        self._progress(f"  {row.entry.name}: {error}")
                        break

    def _measure(self, row: Row, sizes: Sequence[int], total_bytes: int) -> None:
        entry = row.entry
        folder = self._scratch / entry.name
        folder.mkdir()
        python = self._pythons[entry.environment]
        try:
            log = self._scratch / f"{entry.name}.log"
            with DriverProcess(python, entry.driver, log, self.piece_bytes) as driver:
                row.version = driver.open(
                    {
                        **entry.settings,
                        **self._redis(entry),
                        "folder": str(folder),
                        "bin": str(python.parent),
                        "capacity_bytes": total_bytes * len(sizes),
                    }
                )
                for size in sizes:
                    found = driver.run(size, total_bytes)
                    row.runs.setdefault(size, []).append(found)
                    put, get = (total_bytes / GIB / found[f"{way}_s"] for way in ("put", "get"))
                    self._progress(f"  {size >> 10} KiB: put {put:.2f}, get {get:.2f} GiB/s")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _redis(self, entry: Entry) -> dict[str, object]:
        if not entry.redis:
            return {}
        program, environment = self._environments.redis_server(REDIS)
        return {"server": program, "environment": environment}

    def fastest_peer(self, reach: Reach, way: str, size: int, total_bytes: int) -> Row | None:
        """Of the others."""
        found = [
            (rate, row)
            for row in self.rows
            if not row.entry.ours
            and row.entry.reach is reach
            and (rate := row.gibs(way, size, total_bytes)) is not None
        ]
        return max(found, key=lambda pair: pair[0])[1] if found else None
