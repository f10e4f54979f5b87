"""What `dualpath bench cluster` is asked to do: one frozen value, checked once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from dualpath.bench.cluster.fault import Fault, parse_faults
from dualpath.bench.cluster.limits import limit_bytes_per_s
from dualpath.bench.testbed.scheduler_runs import (
    SCHEDULER_PREFIX,
    check_scheduler_nodes,
    check_scheduler_policies,
)
from dualpath.bench.testbed.shaping import LinkRates
from dualpath.bench.testbed.topology import Topology
from dualpath.bench.testbed.workload import Context
from dualpath.transfer.errors import InvalidRequest

POLICIES = {
    "direct": "direct",
    "round-robin": "round-robin",
    "paper": "shorter-queue",
    "split": "split",
}
"""Names in the table, and the placement policies that they stand for."""
LAYERS = 30
LAYER_BYTES = 64 * 656
"""The KV of the paper's 27B model: 64 tokens of a layer, 656 bytes a token."""
BLOCK_BYTES = LAYERS * LAYER_BYTES
LONE_WIDTHS = (1, 2, 8)
LONE_LOAD_BYTES = 64 << 20
LOAD_BYTES = 6 << 20
LOADS_A_LINK = 4
"""Loads in flight for each storage link."""
ROUNDS_MAX = 50
SEED_MAX = (1 << 63) - 1
CPU_BOUND_SHARE = 0.4
"""Above this share of the unshaped throughput the links do not clearly bind."""
FITTING_SHARE = 0.33
STORAGE_BYTES_PER_S_MAX = 50e6
STORAGE_BYTES_PER_S_MIN = 4e6
RATE_STEP = 1e6
NODE_COMPUTE_RATIO = 8.0
"""The paper's nodes: eight compute links, each as fast as the storage link."""

assert FITTING_SHARE < CPU_BOUND_SHARE


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterBenchConfig:
    """See `dualpath bench cluster --help`. Rates in bytes a second, 0: chosen."""

    topologies: tuple[tuple[int, int], ...] = ((1, 2),)
    snic_bytes_per_s: float = 0.0
    further_snics: tuple[float, ...] = ()
    """Rates of further storage links of each node; then that of the first is given, too."""
    cnic_bytes_per_s: float = 0.0
    gpus: int = 1
    converged: bool = False
    lone: bool = False
    hand_off: bool = True
    """Prompts go on to their decode engines; never of lone loads."""
    policies: tuple[str, ...] = tuple(POLICIES)
    schedulers: tuple[str, ...] = ()
    """Policies of `dualpath scheduler` that requests go through, beside those."""
    rounds: int = 3
    seconds: float = 14.0
    """How long the direct policy shall need for a round."""
    load_bytes: int = LOAD_BYTES
    """Mean of a load, or all of a lone one."""
    concurrency: int = 0
    """Loads in flight; 0: LOADS_A_LINK for each storage link."""
    context: Context = Context.K64
    faults: str = ""
    seed: int = 1
    data: str = ""

    def __post_init__(self) -> None:
        if not self.topologies:
            raise InvalidRequest("--topology is empty; write for example 1P1D,1P2D")
        self._check_converged()
        for prefill, decode in self.topologies:
            self.topology(prefill, decode)
        unknown = [name for name in self.policies if name not in POLICIES]
        if unknown or not self.policies:
            what = f"unknown policy {unknown[0]!r}" if unknown else "--policies is empty"
            raise InvalidRequest(f"{what}; there are {', '.join(POLICIES)}")
        _within("--rounds", self.rounds, 1, ROUNDS_MAX)
        _within("--seconds", self.seconds, 0.5, 600)
        _within("--load-mib", self.load_bytes / (1 << 20), 1, 1024)
        _within("--concurrency", self.concurrency, 0, 256)
        _within("--seed", self.seed, 0, SEED_MAX)
        snics = (self.snic_bytes_per_s, *self.further_snics)
        for flag, rate in (
            *(("--snic", each) for each in snics),
            ("--cnic", self.cnic_bytes_per_s),
        ):
            if rate:
                _within(flag, rate, 1e6, 1e11)
        if self.further_snics and not all(snics):
            raise InvalidRequest("--snic: give the rate of each of several storage links")
        self._check_schedulers()
        self._check_combination()

    def _check_schedulers(self) -> None:
        check_scheduler_policies(self.schedulers)
        if not self.schedulers:
            return
        if self.lone or self.faults:
            raise InvalidRequest("--scheduler goes with rounds, not with --lone or --faults")
        if self.gpus > 1:
            raise InvalidRequest(
                f"--scheduler: --gpus is {self.gpus}; its engines have one compute link a node, "
                "since an agent reaches those of its own rail only"
            )
        for _, decode in self.topologies:
            check_scheduler_nodes(decode)

    def _check_converged(self) -> None:
        """Before the topology, whose own limits say less."""
        if self.converged and self.cnic_bytes_per_s:
            raise InvalidRequest("--converged: the one NIC of a node has the rate --snic")
        if self.lone and self.converged:
            raise InvalidRequest("--lone counts compute links, of which --converged has none")
        if self.converged and self.gpus > 1:
            raise InvalidRequest(f"--converged: one NIC a node serves one engine, not {self.gpus}")

    def _check_combination(self) -> None:
        if self.faults:
            if self.lone or len(self.topologies) > 1:
                raise InvalidRequest("--faults are made in one topology, not in --lone loads")
            self.planned_faults()
        if self.data and not Path(self.data).is_dir():
            raise InvalidRequest(f"--data {self.data}: there is no such folder")

    def topology(self, prefill: int, decode: int) -> Topology:
        """The nodes with their rails. Raises InvalidRequest."""
        snics = 1 + len(self.further_snics)
        return Topology.of(prefill, decode, rails=self.gpus, converged=self.converged, snics=snics)

    def planned_faults(self) -> tuple[Fault, ...]:
        """`faults` for the one topology. Raises InvalidRequest."""
        return parse_faults(self.faults, self.topology(*self.topologies[0]))

    @property
    def run_names(self) -> tuple[str, ...]:
        """What is measured in a round, in the order of the table."""
        mine = [name for name in POLICIES if name in self.policies]
        return (*mine, *(SCHEDULER_PREFIX + name for name in self.schedulers))

    @property
    def hands_off(self) -> bool:
        """Whether the measurements carry hand-off traffic."""
        return self.hand_off and not self.lone

    @property
    def rates(self) -> LinkRates:
        """The limits of the links, once the storage rate is known."""
        return self._rates_at(self.snic_bytes_per_s, self.cnic_bytes_per_s)

    def _rates_at(self, storage: float, compute: float) -> LinkRates:
        all_snics = storage + sum(self.further_snics)
        compute = compute or all_snics * NODE_COMPUTE_RATIO / self.gpus
        return LinkRates(storage, storage if self.converged else compute, self.further_snics)

    def storage_links(self, topology: Topology, *, relays: bool = True) -> float:
        """What can be loaded at most, in units of a node's storage links, by compute links as they
        are chosen."""
        compute = 1.0 if self.converged else NODE_COMPUTE_RATIO / self.gpus
        rates = LinkRates(1.0, compute)
        one = topology.with_one_snic
        return limit_bytes_per_s(one, rates, relays=relays)

    def loads_in_flight(self, topology: Topology) -> int:
        """How many loads run at once."""
        links = len(topology.prefill) + len(topology.decode)
        return self.concurrency or LOADS_A_LINK * links * topology.snics

    def fitting(self, topology: Topology, unshaped_bytes_per_s: float) -> ClusterBenchConfig:
        """With a storage rate: as asked, else one at which the links bind and not the processor,
        given what the same topology moves without limits."""
        if self.snic_bytes_per_s:
            return self
        fits = FITTING_SHARE * unshaped_bytes_per_s / self.storage_links(topology)
        rate = min(STORAGE_BYTES_PER_S_MAX, max(STORAGE_BYTES_PER_S_MIN, fits))
        return replace(self, snic_bytes_per_s=rate // RATE_STEP * RATE_STEP)


def _within(flag: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{flag} must lie in {low:g}..{high:g}, not {value:g}")
