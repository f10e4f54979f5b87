"""The answer of a demo: what each policy reached, what bound it, and whether to believe it.

Owns the reduction of the measurements to numbers and their JSON form. Pure; printing is
`table.py`'s, drawing `plot.py`'s.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dualpath.bench.demo.config import CPU_BOUND_SHARE, DemoConfig
from dualpath.bench.testbed.link_meter import LinkKind, LinkUse
from dualpath.bench.testbed.replay import PolicyRun
from dualpath.bench.testbed.workload import Workload

BINDING_UTILISATION = 0.85
GIB = 1 << 30


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """One row of the answer. Times in ms are of single loads, as the engine saw them."""

    run: PolicyRun
    direct: PolicyRun | None

    @property
    def load_ms(self) -> list[float]:
        """Time of each complete load."""
        return [1e3 * each.elapsed_s for each in self.run.outcomes if not each.failure]

    @property
    def ratio_to_direct(self) -> float | None:
        """Throughput as a multiple of the direct policy's in the same run."""
        if self.direct is None or self.direct.bytes_per_s == 0:
            return None
        return self.run.bytes_per_s / self.direct.bytes_per_s

    @property
    def load_time_ratio_to_direct(self) -> float | None:
        """Time of the same loads, summed, as a multiple of the direct policy's."""
        if self.direct is None:
            return None
        direct_s = sum(each.elapsed_s for each in self.direct.outcomes)
        return sum(each.elapsed_s for each in self.run.outcomes) / direct_s if direct_s else None

    @property
    def verified_blocks(self) -> int:
        """Blocks of which every byte was right."""
        return sum(each.verified_blocks for each in self.run.outcomes)

    @property
    def corrupt_blocks(self) -> int:
        """Blocks that were handed to the engine with a wrong byte."""
        return sum(each.corrupt_blocks for each in self.run.outcomes)

    @property
    def failures(self) -> Mapping[str, int]:
        """Loads that did not bring every block, by reason."""
        return Counter(each.failure for each in self.run.outcomes if each.failure)

    @property
    def events(self) -> Mapping[str, int]:
        """What went wrong on the way and was made good, by reason."""
        return _summed(each.events for each in self.run.outcomes)

    @property
    def bytes_by_path(self) -> Mapping[str, int]:
        """Verified payload by path."""
        return _summed(each.shares for each in self.run.outcomes)

    @property
    def storage_balance(self) -> float | None:
        """Most over mean of the bytes into the storage links; 1 is even."""
        counts = [each.nbytes for each in self.run.links if each.link.kind is LinkKind.SNIC_IN]
        return max(counts) * len(counts) / sum(counts) if counts and sum(counts) else None

    def bound_by(self, *, cpu_bound: bool) -> str:
        """Names what limited this policy."""
        busiest = sorted(
            (use for use in self.run.links if use.utilisation is not None),
            key=lambda use: use.utilisation or 0.0,
            reverse=True,
        )
        full = [use for use in busiest if (use.utilisation or 0.0) >= BINDING_UTILISATION]
        if not busiest:
            return "not known: the links have no limits"
        most = busiest[0]
        if cpu_bound:
            return (
                f"not claimed, as the processor may be what binds; {most.link.name} is the "
                f"busiest link with {_percent(most)}, {self.run.cpu_cores:.1f} cores in use"
            )
        if not full:
            return (
                f"no link: {most.link.name} is the busiest with {_percent(most)}; so latency or "
                f"an uneven choice of paths, with {self.run.cpu_cores:.1f} cores in use"
            )
        return ", ".join(f"{use.link.name} ({_percent(use)})" for use in full)

    def to_json(self, *, cpu_bound: bool) -> dict[str, object]:
        """Plain values."""
        times = self.load_ms
        return {
            "loads": len(self.run.outcomes),
            "bytes_loaded": self.run.nbytes,
            "gib_loaded": self.run.nbytes / GIB,
            "seconds": self.run.seconds,
            "bytes_per_s": self.run.bytes_per_s,
            "gib_per_s": self.run.bytes_per_s / GIB,
            "ratio_to_direct": self.ratio_to_direct,
            "load_time_ratio_to_direct": self.load_time_ratio_to_direct,
            "load_ms": {
                "p50": percentile(times, 0.5),
                "p99": percentile(times, 0.99),
                "max": max(times, default=0.0),
            },
            "requested_blocks": sum(each.requested_blocks for each in self.run.outcomes),
            "hit_blocks": self.verified_blocks + self.corrupt_blocks,
            "verified_blocks": self.verified_blocks,
            "corrupt_blocks": self.corrupt_blocks,
            "bytes_by_path": dict(self.bytes_by_path),
            "links": {use.link.name: _link_json(use) for use in self.run.links},
            "storage_balance": self.storage_balance,
            "failed_loads": sum(self.failures.values()),
            "failures": dict(self.failures),
            "events": dict(self.events),
            "cpu_cores": self.run.cpu_cores,
            "bound_by": self.bound_by(cpu_bound=cpu_bound),
        }


def _percent(use: LinkUse) -> str:
    return f"{100 * (use.utilisation or 0.0):.0f} %"


def _link_json(use: LinkUse) -> dict[str, object]:
    return {
        "bytes": use.nbytes,
        "limit_bytes_per_s": use.link.limit_bytes_per_s,
        "utilisation": use.utilisation,
    }


def _summed(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)


@dataclass(frozen=True, slots=True)
class DemoReport:
    """All policies of one run on one cluster."""

    config: DemoConfig
    topology: str
    shaping: str
    shaping_reason: str
    unshaped_bytes_per_s: float
    workload: Workload
    runs: tuple[PolicyRun, ...]
    machine: Mapping[str, object]
    versions: Mapping[str, str]
    seconds: float

    @property
    def policies(self) -> Mapping[str, PolicyReport]:
        """By name, in the order in which they ran."""
        direct = next((run for run in self.runs if run.policy == "direct"), None)
        return {run.policy: PolicyReport(run, direct) for run in self.runs}

    @property
    def links_sum_bytes_per_s(self) -> float:
        """What the shaped links allow."""
        return self.config.links_sum_bytes_per_s

    @property
    def cpu_bound(self) -> bool:
        """Whether this machine is too slow for the links to be what binds."""
        return self.links_sum_bytes_per_s > CPU_BOUND_SHARE * self.unshaped_bytes_per_s

    @property
    def verified_blocks(self) -> int:
        """Over all policies."""
        return sum(policy.verified_blocks for policy in self.policies.values())

    @property
    def corrupt_blocks(self) -> int:
        """Over all policies."""
        return sum(policy.corrupt_blocks for policy in self.policies.values())

    @property
    def failed_loads(self) -> int:
        """Over all policies."""
        return sum(sum(policy.failures.values()) for policy in self.policies.values())

    @property
    def ok(self) -> bool:
        """Every block of every load arrived and was right."""
        return self.corrupt_blocks == 0 and self.failed_loads == 0

    @property
    def verdict(self) -> list[str]:
        """Sentences that say what was found."""
        lines = []
        for name, policy in self.policies.items():
            ratio = policy.ratio_to_direct
            times = f", {ratio:.2f}x direct" if ratio is not None and name != "direct" else ""
            lines.append(f"{name}{times}: bound by {policy.bound_by(cpu_bound=self.cpu_bound)}")
        if self.shaping == "none":
            lines.append("Nothing limits the links here: these numbers say nothing about paths.")
        elif self.cpu_bound:
            lines.append(
                "CPU BOUND: the links allow "
                f"{self.links_sum_bytes_per_s / 1e6:.0f} MB/s, more than "
                f"{CPU_BOUND_SHARE:.0%} of the {self.unshaped_bytes_per_s / 1e6:.0f} MB/s that "
                "this machine moves without limits. Do not read the result as bound by "
                "bandwidth; take a lower --storage-rate."
            )
        if self.config.decode and self.shaping != "none" and not self.config.relay_helps:
            lines.append(
                "The compute link into a prefill node is no faster than its storage link: every "
                "byte passes it on either path, so a second path gains nothing."
            )
        return lines

    def to_json(self) -> dict[str, object]:
        """Plain values, for `--json`."""
        config = self.config
        return {
            "topology": self.topology,
            "shaping": self.shaping,
            "shaping_reason": self.shaping_reason,
            "cpu_bound": self.cpu_bound,
            "policies": {
                name: policy.to_json(cpu_bound=self.cpu_bound)
                for name, policy in self.policies.items()
            },
            "verified_blocks": self.verified_blocks,
            "corrupt_blocks": self.corrupt_blocks,
            "failed_loads": self.failed_loads,
            "links_sum_bytes_per_s": self.links_sum_bytes_per_s,
            "unshaped_bytes_per_s": self.unshaped_bytes_per_s,
            "verdict": self.verdict,
            "workload": {
                "source": self.workload.source,
                "sessions": len(self.workload.sessions),
                "loads": self.workload.loads,
                "block_tokens": self.workload.block_tokens,
                "block_bytes": self.workload.block_bytes,
                "bytes": self.workload.load_bytes,
                "stored_bytes": self.workload.stored_blocks * self.workload.block_bytes,
            },
            "config": {
                "prefill": config.prefill,
                "decode": config.decode,
                "concurrency": config.concurrency,
                "destination": config.destination.value,
                "storage_bytes_per_s": config.storage_bytes_per_s,
                "compute_bytes_per_s": config.compute_bytes_per_s,
                "seed": config.seed,
            },
            "seconds": self.seconds,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
        }
