"""What a demo is asked to do: one frozen value, checked once."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, replace
from pathlib import Path

from dualpath.bench.testbed.device_graph import device_graph, direct_path, relay_path
from dualpath.bench.testbed.scheduler_runs import (
    SCHEDULER_PREFIX,
    check_scheduler_nodes,
    check_scheduler_policies,
)
from dualpath.bench.testbed.topology import Topology
from dualpath.bench.testbed.workload import Context
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.links import LinkGraph

POLICIES = ("direct", "round-robin", "shorter-queue", "split")
CONCURRENCY_MAX = 256
SESSIONS_MAX = 10_000
BUDGET_BYTES_MIN = 1 << 20
BUDGET_BYTES_MAX = 1 << 40
LAYERS = 16
LAYER_BYTES = 16 << 10
STORAGE_BYTES_PER_S = 50e6
DIRECT_S = 14.0
STORAGE_BYTES_PER_S_MIN = 10e6
RATE_STEP = 1e6
CPU_BOUND_SHARE = 0.4
"""Above this share of the unshaped throughput, the links do not clearly bind."""
FITTING_SHARE = 0.35
LONE_FITTING_SHARE = 0.25
"""The time of a single load feels a busy processor sooner than the throughput of many."""
RATE_MIN_BYTES_PER_S = 1e6
RATE_MAX_BYTES_PER_S = 1e11

assert LONE_FITTING_SHARE < FITTING_SHARE < CPU_BOUND_SHARE

_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmg]i?)?(b|bit)(?:/s|ps)", re.IGNORECASE)
_SCALE = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def parse_rate(text: str) -> float:
    """Bytes a second of `50MB/s`, `400Mbit/s`, `1GiB/s`. Raises InvalidRequest."""
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise InvalidRequest(f"{text!r} is not a rate; write for example 50MB/s or 400Mbit/s")
    rate = float(match[1]) * _SCALE[(match[2] or "").lower()]
    rate /= 8 if match[3].lower() == "bit" else 1
    if not RATE_MIN_BYTES_PER_S <= rate <= RATE_MAX_BYTES_PER_S:
        raise InvalidRequest(f"the rate {text!r} is outside of 1 MB/s .. 100 GB/s")
    return rate


class Shaping(enum.Enum):
    """How links get their limits."""

    AUTO = "auto"
    """The kernel where it can, else pacing."""
    KERNEL = "kernel"
    PACING = "pacing"
    """Token buckets in the agents."""
    NONE = "none"


class Destination(enum.Enum):
    """What kind of engine memory loads go into."""

    GPU = "gpu"
    """Behind the compute link: every byte crosses the node's CNIC, on the direct path too."""
    HOST = "host"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """See `dualpath demo --help`. `sessions` 0: as many as fit the concurrency.

    `budget_bytes` is what each policy loads. `data` "" uses a temporary folder. `keep` leaves that
    folder in place.
    """

    prefill: int = 1
    decode: int = 2
    policies: tuple[str, ...] = POLICIES
    schedulers: tuple[str, ...] = ()
    """Policies of `dualpath scheduler` that requests go through, beside those."""
    concurrency: int = 24
    sessions: int = 0
    trace: str = ""
    context: Context = Context.K64
    storage_bytes_per_s: float = 0.0
    """0: STORAGE_BYTES_PER_S, or less where this machine is too slow for that (`fitting`)."""
    compute_ratio: float = 8.0
    destination: Destination = Destination.GPU
    budget_bytes: int = 0
    """0: what the direct policy loads in about DIRECT_S."""
    shaping: Shaping = Shaping.AUTO
    seed: int = 1
    json: str = ""
    plot: str = ""
    data: str = ""
    keep: bool = False

    def __post_init__(self) -> None:
        Topology.of(self.prefill, self.decode)
        unknown = [name for name in self.policies if name not in POLICIES]
        if unknown or not self.policies:
            raise InvalidRequest(
                f"unknown policy {unknown[0]!r}; there are {', '.join(POLICIES)}"
                if unknown
                else f"--policies is empty; there are {', '.join(POLICIES)}"
            )
        if len(set(self.policies)) != len(self.policies):
            raise InvalidRequest(f"--policies names one twice: {','.join(self.policies)}")
        check_scheduler_policies(self.schedulers)
        if self.schedulers:
            check_scheduler_nodes(self.decode)
        _within("--concurrency", self.concurrency, 1, CONCURRENCY_MAX)
        _within("--sessions", self.sessions, 0, SESSIONS_MAX)
        if self.budget_bytes:
            _within("--budget-mib", self.budget_bytes, BUDGET_BYTES_MIN, BUDGET_BYTES_MAX)
        _within("--compute-ratio", self.compute_ratio, 0.1, 100)
        _within("--seed", self.seed, 0, (1 << 63) - 1)
        if self.storage_bytes_per_s:
            _within(
                "--storage-rate",
                self.storage_bytes_per_s,
                RATE_MIN_BYTES_PER_S,
                RATE_MAX_BYTES_PER_S,
            )
        for flag, path in (("--json", self.json), ("--plot", self.plot)):
            if path and not Path(path).absolute().parent.is_dir():
                raise InvalidRequest(f"{flag} {path}: there is no folder {Path(path).parent}")
        if self.trace and not Path(self.trace).is_file():
            raise InvalidRequest(f"--trace {self.trace}: there is no such file")

    @property
    def run_names(self) -> tuple[str, ...]:
        """What is measured, in order."""
        return (*self.policies, *(SCHEDULER_PREFIX + name for name in self.schedulers))

    @property
    def links_sum_bytes_per_s(self) -> float:
        """What the links allow a split over all paths, in loaded bytes a second."""
        return self.storage_bytes_per_s * self._links_sum

    @property
    def _links_sum(self) -> float:
        """The same in units of a storage link."""
        graph = self._graph
        return graph.expected_bytes_per_s(path.name for path in graph.paths)

    @property
    def relay_helps(self) -> bool:
        """Whether a relay adds to what the links carry into a prefill node directly."""
        return self.decode > 0 and self._graph.relay_helps(direct_path(0), relay_path(0, 0))

    @property
    def _graph(self) -> LinkGraph:
        return device_graph(
            self.prefill,
            self.decode,
            self.compute_ratio,
            behind_compute_link=self.destination is Destination.GPU,
        )

    def fitting(self, unshaped_bytes_per_s: float) -> DemoConfig:
        """With a storage rate: as asked, else one at which the links bind and not the processor,
        given what the same cluster moves without limits."""
        if self.storage_bytes_per_s:
            return self
        share = LONE_FITTING_SHARE if self.lone else FITTING_SHARE
        fits = share * unshaped_bytes_per_s / self._links_sum
        rate = min(STORAGE_BYTES_PER_S, max(STORAGE_BYTES_PER_S_MIN, fits))
        return replace(self, storage_bytes_per_s=rate // RATE_STEP * RATE_STEP)

    @property
    def planned_bytes(self) -> int:
        """How much to plan and store, before the storage rate is known."""
        rate = self.storage_bytes_per_s or STORAGE_BYTES_PER_S
        return self.budget_bytes or round(DIRECT_S * self.prefill * rate)

    @property
    def compute_bytes_per_s(self) -> float:
        """Rate of each compute link, each direction."""
        return self.storage_bytes_per_s * self.compute_ratio

    @property
    def lone(self) -> bool:
        """Loads go one at a time: what counts is the time of one load."""
        return self.concurrency == 1


def _within(flag: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{flag} must lie in {low:g}..{high:g}, not {value:g}")
