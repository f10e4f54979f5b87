"""The answer of `dualpath bench cluster`: medians over rounds, against direct and the limit.

Owns the reduction of the measurements to numbers and their JSON form. Pure; what must hold of the
numbers is `targets.py`'s, printing `table.py`'s.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from dualpath.bench.cluster.backlog import Backlog, backlog_of, mean_balance
from dualpath.bench.cluster.config import (
    BLOCK_BYTES,
    CPU_BOUND_SHARE,
    POLICIES,
    ClusterBenchConfig,
)
from dualpath.bench.cluster.fault import Fault
from dualpath.bench.cluster.fault_effects import FaultEffect, Points
from dualpath.bench.cluster.limits import limit_bytes_per_s
from dualpath.bench.cluster.lone import LoneLoad
from dualpath.bench.testbed.engine import LoadOutcome
from dualpath.bench.testbed.replay import PolicyRun
from dualpath.bench.testbed.scheduler_runs import SCHEDULER_PREFIX
from dualpath.bench.testbed.topology import Topology


@dataclass(frozen=True)
class PolicyResult:
    """All rounds of one policy in one topology. `direct` are those of the direct policy."""

    policy: str
    runs: tuple[PolicyRun, ...]
    direct: tuple[PolicyRun, ...]
    limit_bytes_per_s: float
    engines: int
    in_flight: int

    @cached_property
    def backlogs(self) -> tuple[Backlog, ...]:
        """Of each round."""
        return tuple(self._backlog(run) for run in self.runs)

    def _backlog(self, run: PolicyRun) -> Backlog:
        return backlog_of(run.outcomes, run.links, engines=self.engines, in_flight=self.in_flight)

    @property
    def bytes_per_s(self) -> float:
        """Verified bytes a second while there was a backlog; of whole rounds if none lasted."""
        return statistics.median(
            _rate(run, b) for run, b in zip(self.runs, self.backlogs, strict=True)
        )

    @property
    def whole_bytes_per_s(self) -> float:
        """Verified bytes a second of whole rounds, their ends included."""
        return statistics.median(run.bytes_per_s for run in self.runs)

    @cached_property
    def ratio_to_direct(self) -> float | None:
        """Median over the rounds of this rate over direct's in the same round."""
        if not self.direct:
            return None
        pairs = zip(self.runs, self.backlogs, self.direct, strict=True)
        return statistics.median(
            _rate(mine, b) / _rate(theirs, self._backlog(theirs)) for mine, b, theirs in pairs
        )

    @property
    def whole_ratio_to_direct(self) -> float | None:
        """The same of whole rounds."""
        if not self.direct:
            return None
        pairs = zip(self.runs, self.direct, strict=True)
        return statistics.median(mine.bytes_per_s / theirs.bytes_per_s for mine, theirs in pairs)

    @property
    def of_limit(self) -> float:
        """Share of what the links that this policy may use carry together."""
        return self.bytes_per_s / self.limit_bytes_per_s

    @property
    def snic_balance(self) -> float | None:
        """Mean over the windows with a backlog of most over mean of the storage links."""
        return mean_balance(self.backlogs)

    @property
    def queued_ms(self) -> float | None:
        """Median from a request's submission to its assignment; None without a scheduler."""
        waits = [1e3 * each.queued_s for each in self.outcomes if each.engine >= 0]
        return statistics.median(waits) if waits else None

    @property
    def outcomes(self) -> list[LoadOutcome]:
        """Of all rounds."""
        return [outcome for run in self.runs for outcome in run.outcomes]

    def utilisation(self) -> dict[str, float]:
        """By link: median over the rounds of its share of its rate while there was a backlog."""
        shares: dict[str, list[float]] = {}
        for backlog in self.backlogs:
            for name, share in backlog.utilisation.items():
                shares.setdefault(name, []).append(share)
        return {name: statistics.median(found) for name, found in shares.items()}

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        times = sorted(1e3 * each.elapsed_s for each in self.outcomes if not each.failure)
        return {
            "ratio_to_direct": self.ratio_to_direct,
            "of_limit": self.of_limit,
            "snic_balance": self.snic_balance,
            "bytes_per_s": self.bytes_per_s,
            "limit_bytes_per_s": self.limit_bytes_per_s,
            "whole_bytes_per_s": self.whole_bytes_per_s,
            "whole_ratio_to_direct": self.whole_ratio_to_direct,
            "snic_balance_worst": max(
                (value for backlog in self.backlogs for value in backlog.balances), default=None
            ),
            "backlog_windows": sum(len(backlog.windows) for backlog in self.backlogs),
            "utilisation": self.utilisation(),
            "load_ms_p50": statistics.median(times) if times else None,
            "queued_ms_p50": self.queued_ms,
            "cpu_cores": statistics.median(run.cpu_cores for run in self.runs),
            "rounds_bytes_per_s": [run.bytes_per_s for run in self.runs],
            **verdict(self.outcomes),
        }


def _direct(name: str) -> bool:
    return name.removeprefix(SCHEDULER_PREFIX) == "direct"


def _rate(run: PolicyRun, backlog: Backlog) -> float:
    return backlog.bytes_per_s or run.bytes_per_s


def verdict(outcomes: Sequence[LoadOutcome]) -> dict[str, object]:
    """Whether every byte arrived and was right."""
    return {
        "loads": len(outcomes),
        "verified_blocks": sum(each.verified_blocks for each in outcomes),
        "corrupt_blocks": sum(each.corrupt_blocks for each in outcomes),
        "failed_loads": sum(1 for each in outcomes if each.failure),
        "failures": dict(Counter(each.failure for each in outcomes if each.failure)),
        "events": _summed(each.events for each in outcomes),
        "bytes_by_path": _summed(each.shares for each in outcomes),
        "handed_off": handed_off(outcomes),
    }


def handed_off(outcomes: Sequence[LoadOutcome]) -> dict[str, object]:
    """What the decode engines received: prompts that were whole, why others were not, blocks, and
    bytes by whether their node held them already."""
    received = [each.handed_off for each in outcomes if each.handed_off is not None]
    return {
        "whole": sum(1 for each in received if not each.failure),
        "failures": dict(Counter(each.failure for each in received if each.failure)),
        "verified_blocks": sum(each.verified_blocks for each in received),
        "corrupt_blocks": sum(each.corrupt_blocks for each in received),
        "bytes": _summed(each.shares for each in received),
    }


def _summed(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)


def hand_off_note(config: ClusterBenchConfig) -> str:
    """Whether the figures carry hand-off traffic, in words."""
    return "with hand-off traffic" if config.hands_off else "without hand-off traffic"


@dataclass(frozen=True, slots=True)
class LoneResult:
    """The rounds of lone loads of one width under one policy."""

    policy: str
    width: int
    loads: tuple[LoneLoad, ...]

    @property
    def ratio(self) -> float:
        """Median of the time over the limit's."""
        return statistics.median(load.ratio for load in self.loads)

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "policy": self.policy,
            "width": self.width,
            "bytes": self.loads[0].nbytes,
            "seconds": statistics.median(load.seconds for load in self.loads),
            "limit_s": self.loads[0].limit_s,
            "over_limit": self.ratio,
            "rounds_over_limit": [load.ratio for load in self.loads],
            "parts_s": [[part.elapsed_s for part in load.outcomes] for load in self.loads],
            "parts_bytes_by_path": [
                [dict(part.shares) for part in load.outcomes] for load in self.loads
            ],
            **verdict([part for load in self.loads for part in load.outcomes]),
        }


@dataclass(frozen=True, slots=True)
class FaultRun:
    """One run with faults. `rate` is loaded bytes a second over time, `full_bytes_per_s` what the
    links carry before the first fault."""

    run: PolicyRun
    faults: tuple[Fault, ...]
    effects: tuple[FaultEffect, ...]
    rate: Points
    full_bytes_per_s: float

    @property
    def past_deadline_s(self) -> float:
        """Longest wait of a load past its deadline, 0 if none waited longer."""
        return max((o.elapsed_s - o.deadline_s for o in self.run.outcomes), default=0.0)

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "faults": [str(fault) for fault in self.faults],
            "effects": [effect.to_json() for effect in self.effects],
            "past_deadline_s": max(0.0, self.past_deadline_s),
            "full_bytes_per_s": self.full_bytes_per_s,
            "load_ms_max": max((1e3 * o.elapsed_s for o in self.run.outcomes), default=0.0),
            **verdict(self.run.outcomes),
        }


@dataclass(frozen=True)
class TopologyResult:
    """What was measured in one topology: rounds of policies, lone loads, or faults."""

    config: ClusterBenchConfig
    topology: Topology
    unshaped_bytes_per_s: float
    runs: tuple[PolicyRun, ...]
    lone: tuple[LoneResult, ...]
    faults: FaultRun | None

    @property
    def limit_bytes_per_s(self) -> float:
        """What the links carry together."""
        return limit_bytes_per_s(self.topology, self.config.rates)

    @property
    def cpu_bound(self) -> bool:
        """Whether this machine is too slow for the links to be what binds."""
        return self.limit_bytes_per_s > CPU_BOUND_SHARE * self.unshaped_bytes_per_s

    @cached_property
    def policies(self) -> dict[str, PolicyResult]:
        """By their names in the table, in its order."""
        links = len(self.topology.prefill) + len(self.topology.decode)
        engines = len(self.topology.prefill) * self.topology.rails
        direct = tuple(run for run in self.runs if run.policy == "direct")
        return {
            name: PolicyResult(
                name,
                tuple(run for run in self.runs if run.policy == name),
                direct,
                limit_bytes_per_s(self.topology, self.config.rates, relays=not _direct(name)),
                engines,
                max(1, min(links, self.config.loads_in_flight(self.topology)) // engines),
            )
            for name in dict.fromkeys((*POLICIES, *(run.policy for run in self.runs)))
            if any(run.policy == name for run in self.runs)
        }

    @property
    def outcomes(self) -> list[LoadOutcome]:
        """Of every load."""
        found = [outcome for run in self.runs for outcome in run.outcomes]
        found += [o for each in self.lone for load in each.loads for o in load.outcomes]
        return found + list(self.faults.run.outcomes if self.faults else ())

    def to_json(self) -> dict[str, object]:
        """Plain values; the policies by name."""
        rates = self.config.rates
        return {
            "topology": self.topology.label,
            **{name: policy.to_json() for name, policy in self.policies.items()},
            **({"lone": [each.to_json() for each in self.lone]} if self.lone else {}),
            **({"faults": self.faults.to_json()} if self.faults else {}),
            "cpu_bound": self.cpu_bound,
            "limit_bytes_per_s": self.limit_bytes_per_s,
            "unshaped_bytes_per_s": self.unshaped_bytes_per_s,
            "snic_bytes_per_s": rates.storage_bytes_per_s,
            "further_snics": list(rates.further_bytes_per_s),
            "cnic_bytes_per_s": rates.compute_bytes_per_s,
            "loads_in_flight": self.config.loads_in_flight(self.topology),
        }


@dataclass(frozen=True, slots=True)
class ClusterReport:
    """Everything of one command."""

    config: ClusterBenchConfig
    results: tuple[TopologyResult, ...]
    machine: Mapping[str, object]
    versions: Mapping[str, str]
    seconds: float

    @property
    def ok(self) -> bool:
        """Every block of every load arrived and was right, and of every prompt that was handed off
        unless a decode node was harmed on purpose."""
        outcomes = [o for result in self.results for o in result.outcomes]
        received = [o.handed_off for o in outcomes if o.handed_off is not None]
        wrong = any(each.corrupt_blocks for each in received)
        short = any(each.failure for each in received) and not self.config.faults
        return not any(o.failure for o in outcomes) and not wrong and not short

    def to_json(self) -> dict[str, object]:
        """Plain values. One topology: its own values; several: those of each by its label."""
        if len(self.results) == 1:
            values = self.results[0].to_json()
        else:
            values = {result.topology.label: result.to_json() for result in self.results}
            values["cpu_bound"] = any(result.cpu_bound for result in self.results)
        config = self.config
        return {
            **values,
            "ok": self.ok,
            "handoff": hand_off_note(config),
            "gpus": config.gpus,
            "converged": config.converged,
            "rounds": config.rounds,
            "load_bytes_mean": config.load_bytes,
            "block_bytes": BLOCK_BYTES,
            "context": config.context.value,
            "seed": config.seed,
            "seconds": self.seconds,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
        }
