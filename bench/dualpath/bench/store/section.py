"""The sections of `dualpath bench store`: names, modules and the targets that each must hold.

A section is a module with `measure(scratch, rounds, progress)` that returns its figures as plain
values; it verifies the bytes that it reads and raises a DualPathError on the first wrong one.
`rounds == 1` asks for a run that only tries the code: small sizes, nothing judged. A section that
lacks a part (no fio, no such interface) says so in the keys `skipped` of its figures.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

Figures = dict[str, object]
Measure = Callable[[Path, int, Callable[[str], None]], Figures]

SKIPPED = "skipped"
"""Key of a section's figures: why something of it was not measured."""
JUDGED_ROUNDS_MIN = 3
_TURNS = 3
"""Turns of everybody in what the caller calls a round, where turns are short."""


def is_trial(rounds: int) -> bool:
    """Whether the run only tries the code: sizes are small."""
    return rounds == 1


def turns_in(rounds: int) -> int:
    """How many turns to take where one takes less than a second: few of them tell nothing of a
    machine that swings by a fifth meanwhile."""
    return rounds if is_trial(rounds) else _TURNS * rounds


@dataclass(frozen=True, slots=True)
class Target:
    """A figure of a section and its bound; `least` or `most` is None where there is none."""

    figure: str
    least: float | None = None
    most: float | None = None

    def missed(self, figures: Mapping[str, object]) -> str:
        """What to say about a miss; "" if the target holds."""
        value = figures.get(self.figure)
        if not isinstance(value, int | float):
            return f"{self.figure} was not measured: {figures.get(SKIPPED, 'no such figure')}"
        if self.least is not None and value < self.least:
            return f"{self.figure} is {value:.4g}, must be at least {self.least:g}"
        if self.most is not None and value > self.most:
            return f"{self.figure} is {value:.4g}, must be at most {self.most:g}"
        return ""

    def __str__(self) -> str:
        bounds = [f">= {self.least:,}"] if self.least is not None else []
        bounds += [f"<= {self.most:,}"] if self.most is not None else []
        return f"{self.figure} {' '.join(bounds)}"


@dataclass(frozen=True, slots=True)
class Section:
    """`function` of `module` measures; `title` is for people."""

    name: str
    title: str
    module: str
    function: str
    targets: Sequence[Target] = ()

    def measure(self) -> Measure:
        """Import it. Raises ImportError."""
        return cast(Measure, getattr(importlib.import_module(self.module), self.function))


_HERE = "dualpath.bench.store"
SECTIONS = (
    Section(
        "cold_read_1m",
        "cold reads of 1 MiB blocks, O_DIRECT, depth 32, checksums verified",
        f"{_HERE}.cold_read",
        "measure_1m",
        (Target("ratio", least=0.95), Target("cpu_ratio", most=1.3)),
    ),
    Section(
        "cold_read_256k",
        "cold reads of 256 KiB blocks",
        f"{_HERE}.cold_read",
        "measure_256k",
        (Target("ratio", least=0.9),),
    ),
    Section(
        "dram_copy",
        "local DRAM hits, copied into the caller's memory",
        f"{_HERE}.local",
        "measure_copy",
        (Target("ratio_to_memcpy", least=0.9),),
    ),
    Section(
        "dram_zero_copy",
        "local DRAM hits, mapped in batches: lookup, lease and mapping",
        f"{_HERE}.local",
        "measure_zero_copy",
        (Target("blocks_per_s", least=300_000),),
    ),
    Section(
        "tcp",
        "loads from a daemon over loopback TCP, verified at the destination",
        f"{_HERE}.tcp",
        "measure",
        (Target("ratio", least=0.95),),
    ),
    Section(
        "write",
        "durable writes in groups of 32 MiB",
        f"{_HERE}.write",
        "measure",
        (Target("ratio", least=0.9), Target("durable_cost", most=0.1)),
    ),
    Section(
        "lookup",
        "lookup of 1,000 keys among a million blocks",
        f"{_HERE}.lookup",
        "measure",
        (
            Target("grpc_added_ms", most=0.3),
            Target("socket_added_ms", most=0.1),
            Target("p99_over_p50", most=5),
            Target("in_process_keys_per_s", least=2_000_000),
        ),
    ),
    Section(
        "restart",
        "reopening with a million blocks",
        f"{_HERE}.restart",
        "measure",
        (
            Target("clean_s", most=2),
            Target("crash_s", most=20),
            Target("memory_bytes_a_block", most=200),
        ),
    ),
    Section("mixed", "reads and writes at once, at capacity", f"{_HERE}.mixed", "measure"),
)


def chosen(names: Sequence[str]) -> tuple[Section, ...]:
    """The named ones in their order, all if none is named. Raises KeyError with the bad name."""
    known = {section.name for section in SECTIONS}
    for name in names:
        if name not in known:
            raise KeyError(name)
    return tuple(section for section in SECTIONS if not names or section.name in names)
