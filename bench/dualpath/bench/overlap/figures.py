"""What `dualpath bench overlap` found: values, a table, the same for a document. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dualpath.bench.machine import busy_line
from dualpath.bench.table import Row, markdown_table

RATIO_MAX = 1.1
"""The target: of the least time that loads could take whose chunks are of several layers."""
JUDGED_ROUNDS_MIN = 3
HEADINGS = (
    "layer of a block",
    "layers a chunk",
    "compute / load",
    "load s",
    "compute s",
    "overlapped s",
    "x ideal",
    "x chunks' ideal",
    "one after the other s",
    "faster by",
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A load of `blocks` blocks of layers of `layer_bytes` each. `opens[i]`: the part of the load
    after which layer i is there, since chunks are verified as a whole."""

    layer_bytes: int
    blocks: int
    opens: tuple[float, ...]

    @property
    def layers(self) -> int:
        """Of a block."""
        return len(self.opens)

    @property
    def layers_per_chunk(self) -> float:
        """On average."""
        return round(self.layers / len(set(self.opens)), 1)

    @property
    def nbytes(self) -> int:
        """Of the whole load."""
        return self.layer_bytes * self.layers * self.blocks


@dataclass(frozen=True, slots=True)
class Case:
    """A shape whose engine computes for `part` of the time that the load takes alone."""

    shape: Shape
    part: float


@dataclass(frozen=True, slots=True)
class Run:
    """One round of a case, in seconds: the load alone just before, the compute of all layers as
    its timers took it, both overlapped in the order of layers, and one after the other."""

    load_s: float
    compute_s: float
    overlapped_s: float
    serial_s: float


def ideal_s(load_s: float, compute_s: float, layers: int) -> float:
    """The least time of a load and a compute of so many equal layers each: the longer of the two,
    and one layer of the other. A layer is computed once it is there, after the layer before."""
    return max(load_s, compute_s) + min(load_s, compute_s) / layers


def reachable_s(load_s: float, compute_s: float, opens: Sequence[float]) -> float:
    """The least time with chunks of several layers: each layer is computed after the one before,
    once the part `opens` of the load is there."""
    computed_s = 0.0
    for part in opens:
        computed_s = max(computed_s, part * load_s) + compute_s / len(opens)
    return computed_s


@dataclass(slots=True)
class Figures:
    """Runs by case."""

    rate_bytes_per_s: float
    machine: Mapping[str, object]
    date: str
    runs: dict[Case, list[Run]] = field(default_factory=dict)

    def ratio(self, case: Case) -> float:
        """Overlapped time over the ideal: the median of the rounds' ratios."""
        return statistics.median(
            run.overlapped_s / ideal_s(run.load_s, run.compute_s, case.shape.layers)
            for run in self.runs[case]
        )

    def chunk_ratio(self, case: Case) -> float:
        """Overlapped time over what chunks allow, likewise."""
        return statistics.median(
            run.overlapped_s / reachable_s(run.load_s, run.compute_s, case.shape.opens)
            for run in self.runs[case]
        )

    def gain(self, case: Case) -> float:
        """Time one after the other over the overlapped time, likewise."""
        return statistics.median(run.serial_s / run.overlapped_s for run in self.runs[case])

    def misses(self) -> list[str]:
        """Cases over RATIO_MAX; none if there were not rounds enough to tell."""
        return [
            f"compute {case.part:g} of the load, {case.shape.layer_bytes >> 10} KiB a layer: "
            f"{self.chunk_ratio(case):.2f} of what chunks allow, must be {RATIO_MAX:g}"
            for case, runs in self.runs.items()
            if len(runs) >= JUDGED_ROUNDS_MIN and self.chunk_ratio(case) > RATIO_MAX
        ]

    def to_json(self) -> dict[str, object]:
        """The link, then a list of cases."""
        return {
            "link_bytes_per_s": self.rate_bytes_per_s,
            "cases": [
                {
                    "layer_bytes": case.shape.layer_bytes,
                    "layers": case.shape.layers,
                    "blocks": case.shape.blocks,
                    "compute_of_load": case.part,
                    "ratio_to_ideal": self.ratio(case),
                    "ratio_to_ideal_of_chunks": self.chunk_ratio(case),
                    "serial_ratio": self.gain(case),
                    "overlapped_s": [run.overlapped_s for run in runs],
                    "load_s": [run.load_s for run in runs],
                    "compute_s": [run.compute_s for run in runs],
                    "serial_s": [run.serial_s for run in runs],
                }
                for case, runs in self.runs.items()
            ],
            "misses": self.misses(),
            "date": self.date,
            "machine": dict(self.machine),
        }


def rows(figures: Figures) -> list[Row]:
    """A row a case, in the order of HEADINGS."""
    found: list[Row] = []
    for case, runs in figures.runs.items():

        def median(name: str, runs: list[Run] = runs) -> str:
            return f"{statistics.median(getattr(run, name) for run in runs):.2f}"

        found.append(
            (
                f"{case.shape.layer_bytes >> 10} KiB",
                f"{case.shape.layers_per_chunk:g}",
                f"{case.part:g}",
                median("load_s"),
                median("compute_s"),
                median("overlapped_s"),
                f"{figures.ratio(case):.2f}",
                f"{figures.chunk_ratio(case):.2f}",
                median("serial_s"),
                f"{figures.gain(case):.2f}",
            )
        )
    return found


def lines(figures: Figures) -> list[str]:
    """What it was measured on, and the target."""
    machine, cases = figures.machine, list(figures.runs)
    sizes = ", ".join(
        dict.fromkeys(f"{case.shape.nbytes >> 20} MiB in {case.shape.layers}" for case in cases)
    )
    said = [
        f"loads of {sizes} layers over a link paced to {figures.rate_bytes_per_s / 1e6:g} MB/s; "
        f"{len(figures.runs[cases[0]])} rounds, medians; {machine['cores']} cores of "
        f"{machine['processor']}, {machine['system']} {machine['kernel']}; {figures.date}"
    ]
    said += [text for text in (busy_line(machine),) if text]
    said += [f"missed: {miss}" for miss in figures.misses()]
    if len(figures.runs[cases[0]]) < JUDGED_ROUNDS_MIN:
        said.append(f"the target was not judged: that takes {JUDGED_ROUNDS_MIN} rounds")
    return said


def markdown(figures: Figures) -> str:
    """For a document."""
    listed = "\n".join(f"- {line}" for line in lines(figures))
    return f"{markdown_table(HEADINGS, rows(figures))}\n\n{listed}\n"
