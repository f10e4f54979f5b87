"""What all rounds of random faults came to: text and plain values. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from dualpath.bench.faults.rest import Footprint
from dualpath.bench.faults.rounds import RoundResult


@dataclass(slots=True)
class FaultsReport:
    """`grown`: what grew over the rounds; `footprints`: first and last of each process."""

    topology: str
    seed: int
    planned: int
    rounds: list[RoundResult] = field(default_factory=list)
    grown: list[str] = field(default_factory=list)
    footprints: dict[str, tuple[Footprint, Footprint]] = field(default_factory=dict)
    elapsed_s: float = 0.0

    def add(self, result: RoundResult) -> None:
        """One more round."""
        self.rounds.append(result)

    @property
    def bad(self) -> list[RoundResult]:
        """Rounds in which something was wrong."""
        return [result for result in self.rounds if result.wrong]

    @property
    def ok(self) -> bool:
        """Whether all held."""
        return not self.bad and not self.grown and len(self.rounds) == self.planned

    @property
    def counts(self) -> Counter[str]:
        """Of all rounds."""
        return sum((result.counts for result in self.rounds), Counter())

    @property
    def faults(self) -> Counter[str]:
        """How often each thing was done to each kind of node."""
        return Counter(
            f"{fault.action.value} {fault.node.partition('-')[0]}"
            for result in self.rounds
            for fault in result.faults
        )

    @property
    def overrun_s(self) -> float:
        """The latest end of any load, after its deadline, without the machine's freezes."""
        return max((result.overrun_s for result in self.rounds), default=-math.inf)

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "topology": self.topology,
            "seed": self.seed,
            "ok": self.ok,
            "rounds": len(self.rounds),
            "elapsed_s": self.elapsed_s,
            "faults": dict(self.faults),
            "counts": dict(self.counts),
            "overrun_s": self.overrun_s if math.isfinite(self.overrun_s) else None,
            "rest_s_max": max((each.rest_s for each in self.rounds), default=0.0),
            "frozen_s": sum(each.frozen_s for each in self.rounds),
            "grown": self.grown,
            "footprints": {
                name: {"first": asdict(first), "last": asdict(last)}
                for name, (first, last) in self.footprints.items()
            },
            "bad": [
                {"round": each.number, "schedule": each.schedule, "wrong": each.wrong}
                for each in self.bad
            ],
        }

    def lines(self) -> Iterator[str]:
        """For people."""
        yield (
            f"{len(self.rounds)} schedules on {self.topology}, seed {self.seed}, "
            f"{self.elapsed_s:.0f} s"
        )
        yield "faults: " + ", ".join(f"{what} {n}" for what, n in self.faults.most_common())
        yield "\n".join(f"  {what}: {n}" for what, n in sorted(self.counts.items()))
        yield (
            f"latest end {self.overrun_s:+.2f} s after its deadline; at rest within "
            f"{max((each.rest_s for each in self.rounds), default=0.0):.1f} s; the machine stood "
            f"still for {sum(each.frozen_s for each in self.rounds):.1f} s"
        )
        for name, (first, last) in sorted(self.footprints.items()):
            yield (
                f"  {name}: {first.descriptors} -> {last.descriptors} descriptors, "
                f"{first.threads} -> {last.threads} threads, {first.memory_bytes >> 20} -> "
                f"{last.memory_bytes >> 20} MiB"
            )
        for text in self.grown:
            yield f"GREW: {text}"
        for each in self.bad:
            yield f"BAD: --seed {self.seed} --round {each.number}: {each.schedule}"
            yield from (f"  {text}" for text in each.wrong)
        yield "all held" if self.ok else "FAILED"
