"""Whether the simulator agrees with a cluster that was measured: `dualpath simulate cluster`.

Owns the reduction of a simulated round to the figures that `bench cluster` reports (by its own
functions: the windows in which every engine has a backlog), and the comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dualpath.bench.cluster.backlog import Backlog, backlog_of, bytes_between, mean_balance
from dualpath.bench.simulate.bench_cluster import BenchSetup, bench_setup
from dualpath.bench.simulate.bench_measurement import BenchMeasurement, PolicyMeasurement
from dualpath.bench.simulate.result import SimulationResult
from dualpath.bench.simulate.simulation import simulate
from dualpath.bench.testbed.engine import LoadOutcome
from dualpath.bench.testbed.link_meter import Link, LinkKind, LinkUse

WITHIN = 0.10
DEVIATES = "DEVIATES"
_FIGURES = {
    "bytes_per_s": "MB/s",
    "ratio_to_direct": "x direct",
    "snic_balance": "SNIC balance",
}


@dataclass(frozen=True, slots=True)
class Agreement:
    """One figure of one policy in one topology."""

    topology: str
    policy: str
    figure: str
    measured: float
    simulated: float
    judged: bool

    @property
    def deviation(self) -> float:
        """Simulated over measured, less 1."""
        return self.simulated / self.measured - 1

    @property
    def verdict(self) -> str:
        """agrees, deviates, or not judged (the machine, not the links, bound the measurement)."""
        if not self.judged:
            return "not judged: CPU bound"
        return "agrees" if abs(self.deviation) <= WITHIN else DEVIATES

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "topology": self.topology,
            "policy": self.policy,
            "figure": self.figure,
            "measured": self.measured,
            "simulated": self.simulated,
            "deviation": self.deviation,
            "within": WITHIN,
            "verdict": self.verdict,
        }


HEADINGS = ("topology, policy", "figure", "measured", "simulated", "deviation", "verdict")


def rows(found: Sequence[Agreement]) -> list[Sequence[str]]:
    """For tables under HEADINGS; rates in MB/s."""
    shown: list[Sequence[str]] = []
    for one in found:
        unit = 1e6 if one.figure == "bytes_per_s" else 1.0
        shown.append(
            (
                f"{one.topology} {one.policy}",
                _FIGURES[one.figure],
                f"{one.measured / unit:.3f}",
                f"{one.simulated / unit:.3f}",
                f"{100 * one.deviation:+.1f} %",
                one.verdict,
            )
        )
    return shown


def compare(measured: BenchMeasurement) -> Iterator[Agreement]:
    """Simulate a round of each measured policy; its figures one by one."""
    rounds = {name: simulate_round(measured, name) for name in measured.policies}
    direct = rounds["direct"]
    for name, found in measured.policies.items():
        bytes_per_s, balance = rounds[name]
        simulated = PolicyMeasurement(bytes_per_s, bytes_per_s / direct[0], balance)
        for figure in _FIGURES:
            yield Agreement(
                measured.label,
                name,
                figure,
                getattr(found, figure),
                getattr(simulated, figure),
                not measured.cpu_bound,
            )


def simulate_round(measured: BenchMeasurement, policy: str) -> tuple[float, float]:
    """(bytes a second, balance of the storage links) while there is a backlog, of a round; of the
    whole round if none lasts."""
    setup = bench_setup(measured, policy)
    result = simulate(setup.setup)
    uses = link_uses(result)
    outcomes = loads_of(setup, result, measured.workload.block_bytes)
    backlog = backlog_of(outcomes, uses, engines=measured.engines, in_flight=measured.backlog)
    return _rate(backlog, uses, result), mean_balance((backlog,)) or result.snic_balance()


def _rate(backlog: Backlog, uses: Sequence[LinkUse], result: SimulationResult) -> float:
    if not backlog.windows:
        return result.bytes_read / float(result.records.column("first_token_s").max())
    carried = sum(bytes_between(use, window) for use in uses for window in backlog.windows)
    return carried / backlog.seconds


def link_uses(result: SimulationResult) -> tuple[LinkUse, ...]:
    """What the storage links carried, as the bench's meter tells it."""
    width = result.window_s
    return tuple(
        LinkUse(
            Link(name, LinkKind.SNIC_IN, 0.0),
            round(float(row.sum())),
            len(row) * width,
            tuple(((at + 1) * width, float(value) / width) for at, value in enumerate(row)),
        )
        for name, row in zip(result.snic_names, result.snic_windows, strict=True)
    )


def loads_of(setup: BenchSetup, result: SimulationResult, block_bytes: int) -> list[LoadOutcome]:
    """The loads of a round as the bench's engines see them: they end when the prompt's KV is in the
    prefill engine's memory."""
    records = result.records
    arrive_s, ended_s = records.column("arrive_s"), records.column("first_token_s")
    nbytes = records.column("bytes_by_prefill") + records.column("bytes_by_decode")
    upcoming = [iter(sessions) for sessions in setup.sessions]
    outcomes = []
    for at, agent in enumerate(records.agents):
        blocks = round(float(nbytes[at]) / block_bytes)
        outcomes.append(
            LoadOutcome(
                session=next(upcoming[agent]),
                turn=0,
                requested_blocks=blocks,
                verified_blocks=blocks,
                corrupt_blocks=0,
                nbytes=blocks * block_bytes,
                ended_s=float(ended_s[at]),
                elapsed_s=float(ended_s[at] - arrive_s[at]),
                failure="",
                detail="",
                shares={},
                events={},
            )
        )
    return outcomes
