"""What must hold of a report, and whether it does.

Pure. A figure that the processor may have bound is not judged. Ties compare topologies with equal
storage bandwidth: loading must take equally long (the paper, P/D sweep).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dualpath.bench.cluster.fault import FaultAction
from dualpath.bench.cluster.fault_effects import BACK_S_MAX
from dualpath.bench.cluster.limits import limit_bytes_per_s
from dualpath.bench.cluster.report import ClusterReport, TopologyResult

RATIOS = {"1P1D": 1.94, "1P2D": 2.9, "2P4D": 2.9, "2P1D": 1.45}
"""Loaded bytes a second of split over direct, by topology."""
OF_LIMIT = 0.97
"""The same for other topologies, as a share of what their links allow."""
BALANCE_MAX = 1.05
CONVERGED_RATIO = 0.98
LONE_OVER_LIMIT_MAX = 1.10
TIES = ((("direct", "2P1D"), ("split", "1P1D")), (("split", "2P1D"), ("split", "1P2D")))
TIE_WITHIN = 0.03


@dataclass(frozen=True, slots=True)
class Judgement:
    """One target: what it is about, what was found, what was wanted; `met` None: not judged."""

    what: str
    found: str
    wanted: str
    met: bool | None

    @property
    def word(self) -> str:
        """For tables."""
        return {True: "met", False: "MISSED", None: "not judged: CPU bound"}[self.met]


@dataclass(frozen=True, slots=True)
class Tie:
    """Two policies in two topologies of equal storage bandwidth; rates in bytes a second."""

    first: str
    second: str
    first_bytes_per_s: float
    second_bytes_per_s: float

    @property
    def ratio(self) -> float:
        """First over second."""
        return self.first_bytes_per_s / self.second_bytes_per_s

    @property
    def holds(self) -> bool:
        """Whether they are equal within TIE_WITHIN."""
        return abs(self.ratio - 1) <= TIE_WITHIN


def ties_of(report: ClusterReport) -> list[Tie]:
    """The pairs of which both sides were measured, with the same storage rate."""
    rates = {
        (name, result.topology.label): policy.bytes_per_s
        for result in report.results
        for name, policy in result.policies.items()
        if not result.topology.converged
    }
    return [
        Tie(" ".join(first), " ".join(second), rates[first], rates[second])
        for first, second in TIES
        if first in rates and second in rates
    ]


def judge(report: ClusterReport) -> list[Judgement]:
    """Every target that this report can tell of."""
    found = [each for result in report.results for each in _of_topology(result)]
    bound = {each.topology.label for each in report.results if each.cpu_bound}
    for tie in ties_of(report):
        met = None if bound & set(f"{tie.first} {tie.second}".split()) else tie.holds
        what = f"{tie.first} ties with {tie.second}"
        found.append(Judgement(what, f"{tie.ratio:.3f}", "0.97..1.03", met))
    return found


def _of_topology(result: TopologyResult) -> Iterator[Judgement]:
    label, bound = result.topology.label, result.cpu_bound

    def at_least(what: str, value: float, wanted: float) -> Judgement:
        met = None if bound else value >= wanted
        return Judgement(f"{label} {what}", f"{value:.3f}", f">= {wanted:g}", met)

    def at_most(what: str, value: float, wanted: float) -> Judgement:
        met = None if bound else value <= wanted
        return Judgement(f"{label} {what}", f"{value:.3f}", f"<= {wanted:g}", met)

    split = result.policies.get("split")
    if split is not None and split.ratio_to_direct is not None:
        yield at_least("split over direct", split.ratio_to_direct, _ratio_wanted(result))
    if split is not None and split.snic_balance is not None and not result.topology.converged:
        yield at_most("balance of the storage links", split.snic_balance, BALANCE_MAX)
    for lone in result.lone:
        if lone.policy == "split":
            what = f"lone load, width {lone.width}, over the limit's time"
            yield at_most(what, lone.ratio, LONE_OVER_LIMIT_MAX)
    if result.faults is not None:
        yield from _of_faults(result)


def _ratio_wanted(result: TopologyResult) -> float:
    topology, rates = result.topology, result.config.rates
    if topology.converged:
        return CONVERGED_RATIO
    direct = limit_bytes_per_s(topology, rates, relays=False)
    return RATIOS.get(topology.label, OF_LIMIT * result.limit_bytes_per_s / direct)


def _of_faults(result: TopologyResult) -> Iterator[Judgement]:
    assert result.faults is not None
    label, bound = result.topology.label, result.cpu_bound
    failed = sum(1 for each in result.faults.run.outcomes if each.failure)
    yield Judgement(f"{label} failed loads", str(failed), "0", failed == 0)
    late_s = max(0.0, result.faults.past_deadline_s)
    yield Judgement(f"{label} longest wait past a deadline", f"{late_s:.2f} s", "0 s", late_s == 0)
    for effect in result.faults.effects:
        fault = effect.made.fault
        back = "not before the next" if effect.back_s is None else f"{effect.back_s:.2f} s"
        met = effect.back_s is not None and effect.back_s <= BACK_S_MAX
        what = f"{label} {fault}: back at 0.95 of the new limit"
        if fault.action is FaultAction.RESTORE:
            continue
        yield Judgement(what, back, f"<= {BACK_S_MAX:g} s", None if bound else met)
        yield Judgement(
            f"{label} {fault}: last of {effect.in_flight} loads in flight",
            f"{effect.last_s:.2f} s",
            f"<= {effect.bound_s:.2f} s",
            None if bound else effect.last_s <= effect.bound_s,
        )
