"""Interleaved rounds: everything that is compared is measured in turn, round by round.

Owns samples and what is computed from them. A machine that is slow for a while is slow for all
contestants of that round, so figures are compared within a round: a ratio is the median of the
rounds' ratios, never the ratio of two separate runs. The order turns by one each round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

GIB = float(1 << 30)


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement: bytes moved, wall time, processor time of all processes that took part."""

    nbytes: int
    seconds: float
    cpu_s: float = 0.0
    detail: Mapping[str, float] = field(default_factory=dict)
    """Further figures of the round, by name."""

    @property
    def gibs(self) -> float:
        """GiB a second."""
        return self.nbytes / GIB / max(self.seconds, 1e-9)

    @property
    def cpu_s_per_gib(self) -> float:
        """Processor seconds a GiB."""
        return self.cpu_s / max(self.nbytes / GIB, 1e-9)


@dataclass(frozen=True, slots=True)
class Series:
    """The rounds of one contestant, in order."""

    samples: tuple[Sample, ...]

    @property
    def gibs(self) -> float:
        """Median GiB a second."""
        return statistics.median(sample.gibs for sample in self.samples)

    @property
    def cpu_s_per_gib(self) -> float:
        """Median processor seconds a GiB."""
        return statistics.median(sample.cpu_s_per_gib for sample in self.samples)

    @property
    def spread(self) -> float:
        """(fastest - slowest) / median of the rates."""
        rates = [sample.gibs for sample in self.samples]
        return (max(rates) - min(rates)) / max(statistics.median(rates), 1e-9)

    def median(self, name: str) -> float:
        """Median of a further figure."""
        return statistics.median(sample.detail[name] for sample in self.samples)

    def ratio_to(self, other: Series) -> float:
        """Median over the rounds of this rate over the other's in the same round."""
        pairs = zip(self.samples, other.samples, strict=True)
        return statistics.median(mine.gibs / max(theirs.gibs, 1e-9) for mine, theirs in pairs)


def interleave(
    contestants: Mapping[str, Callable[[], Sample]],
    rounds: int,
    progress: Callable[[str], None],
    *,
    warm_up: bool = True,
) -> dict[str, Series]:
    """Measure each contestant once a round; `warm_up` runs each once more before, uncounted."""
    names = list(contestants)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    if warm_up:
        for name in names:
            progress(f"{name}: warming up")
            contestants[name]()
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            sample = contestants[name]()
            samples[name].append(sample)
            progress(
                f"round {number + 1}/{rounds} {name}: {sample.gibs:.2f} GiB/s, "
                f"{sample.cpu_s_per_gib:.3f} CPU-s/GiB"
            )
    return {name: Series(tuple(taken)) for name, taken in samples.items()}
