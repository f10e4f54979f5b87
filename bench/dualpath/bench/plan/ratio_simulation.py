"""What the simulator says of a ratio that was planned in closed form.

The same workload, rates and model, as turns a second: without an SLO of a cluster that has all the
agents that it can use, with one at the highest rate of Poisson arrivals at which the means over
turns keep it. The turns of agents are drawn from all turns, so that a run of seconds has the
workload's means; the beginning and the end of a run do not count. A cluster of more than
`NODES_MAX` nodes is simulated as a smaller one of the same ratio, and its turns are multiplied.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dualpath.bench.agents.arrivals import offline, poisson
from dualpath.bench.agents.drawn_turns import drawn_turns
from dualpath.bench.agents.trajectory import AgentArrival, Trajectory
from dualpath.bench.models.calibration import Calibration
from dualpath.bench.plan.capacity import Cluster, Loading, decode_sequences, first_token_s
from dualpath.bench.plan.planner import Plan, RatioPlan, model_of
from dualpath.bench.simulate.cluster import ClusterSpec
from dualpath.bench.simulate.result import SimulationResult
from dualpath.bench.simulate.simulated_model import modelled
from dualpath.bench.simulate.simulation import SimulationSetup, Told, simulate
from dualpath.bench.simulate.system import named_system

NODES_MAX = 12
TURNS = 12
ONLINE_TURNS = 4
"""Of an agent, with an SLO."""
AGENTS_LOW, AGENTS_HIGH = 32, 4096
CROWD = 1.0
"""Agents, in those that the closed form has in the cluster at once."""
STEADY = (0.2, 0.6)
"""Part of a run's turns, or of its arrivals' time, that counts."""
ARRIVALS_TURNS = 6_000
PROMISES = 10.0
"""Of an online run, in the promised TTFT, at least."""
STEPS = 6
"""Halvings of the range in which the rate at the SLO lies."""
AGREES = 0.10
UNEVEN = 1.1
FULL = 0.8
"""Of the host memory, on the mean: then turns wait for it."""
_SYSTEMS = {Loading.BASIC: "basic", Loading.DUAL: "dualpath", Loading.SPLIT: "split"}


@dataclass(frozen=True, slots=True)
class SimulatedRatio:
    """`turns_per_s` of the whole cluster; `why`: what the closed form leaves out here, "" where
    both agree within `AGREES`. `scale`: how many times smaller the simulated cluster was."""

    ratio: str
    loading: Loading
    closed_turns_per_s: float
    turns_per_s: float
    scale: int
    why: str

    @property
    def deviation(self) -> float:
        """Simulated over closed form, less 1."""
        return self.turns_per_s / self.closed_turns_per_s - 1

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "ratio": self.ratio,
            "loading": self.loading.value,
            "closed_form_turns_per_s": self.closed_turns_per_s,
            "simulated_turns_per_s": self.turns_per_s,
            "deviation": self.deviation,
            "scaled_down_by": self.scale,
            "why": self.why,
        }


def worth_simulating(plan: Plan) -> tuple[tuple[RatioPlan, Loading], ...]:
    """The ratio that is best for two paths and those beside it; the one path at the same and at its
    own best ratio; splitting at its best."""
    best = plan.best(Loading.DUAL)
    at = plan.ratios.index(best)
    beside = plan.ratios[max(0, at - 1) : at + 2]
    found = [(each, Loading.DUAL) for each in beside]
    for loading in (Loading.BASIC, Loading.SPLIT):
        found += [(best, loading), (plan.best(loading), loading)]
    return tuple({(each.name, loading): (each, loading) for each, loading in found}.values())


class RatioSimulation:
    """Simulates ratios of one plan; the trajectories are the plan's."""

    def __init__(
        self,
        plan: Plan,
        calibration: Calibration,
        trajectories: Sequence[Trajectory],
        *,
        staging_bytes: float,
        seed: int,
    ) -> None:
        self._plan = plan
        self._calibration = calibration
        self._trajectories = trajectories
        self._staging_bytes = staging_bytes
        self._seed = seed
        self._told: Told | None = None

    def run(self, ratio: RatioPlan, loading: Loading, told: Told | None = None) -> SimulatedRatio:
        """`told` as by `simulate`. Raises InvalidRequest where a turn fits no engine or node."""
        self._told = told
        cluster = ratio.cluster
        scale = _scale(cluster)
        closed = ratio.capacities[loading]
        slo = self._plan.request.slo
        promised = math.isfinite(slo.ttft_s) or math.isfinite(slo.tpot_s)
        measure = self._at_slo if promised else self._full
        rate, result = measure(cluster, loading, closed.turns_per_s / scale)
        found = rate * scale
        away = abs(found / closed.turns_per_s - 1) > AGREES
        why = ""
        if away:
            held = self._staging_held(cluster, result) if loading is not Loading.BASIC else 0.0
            why = _why(result, held, found < closed.turns_per_s, promised)
        return SimulatedRatio(ratio.name, loading, closed.turns_per_s, found, scale, why)

    def _staging_held(self, cluster: Cluster, result: SimulationResult) -> float:
        """Share of the decode nodes' host memory that prompts fill from the beginning of their read
        to their first token: by Little's law, in the steady part."""
        records = result.records
        first, last = (round(share * (len(records) - 1)) for share in STEADY)
        done_s = records.column("done_s")
        held_s = records.column("first_token_s") - records.column("read_begin_s")
        rate = (last - first) / float(done_s[last] - done_s[first])
        demand = self._plan.demand
        tokens = demand.cached_tokens + demand.new_tokens
        kv = (
            tokens
            * self._plan.geometry.kv_bytes_per_token
            * rate
            * float(held_s[first:last].mean())
        )
        return kv / (cluster.decode / _scale(cluster) * self._staging_bytes)

    def _full(
        self, cluster: Cluster, loading: Loading, expected: float
    ) -> tuple[float, SimulationResult]:
        """Turns a second of the simulated cluster with agents enough."""
        agents = self._crowd(cluster, loading, expected)
        drawn = drawn_turns(self._trajectories, agents=agents, turns=TURNS, seed=self._seed)
        result = self._simulate(cluster, loading, offline(drawn, agents=agents, seed=self._seed))
        done_s = result.records.column("done_s")
        first, last = (round(share * (len(done_s) - 1)) for share in STEADY)
        return (last - first) / float(done_s[last] - done_s[first]), result

    def _crowd(self, cluster: Cluster, loading: Loading, expected: float) -> int:
        """Agents that keep the cluster full: by Little's law, with those that memory would hold."""
        demand, scale = self._plan.demand, _scale(cluster)
        model = model_of(self._plan.geometry, self._calibration, cluster)
        sequences = decode_sequences(demand, model, self._plan.request.slo)
        engines = cluster.decode * cluster.rates.gpus / demand.engine_gpus / scale
        step_s = model.decode_step_s(max(1, sequences), round(sequences * demand.held_tokens))
        turn_s = first_token_s(cluster, demand, loading) + demand.generated_tokens * step_s
        wanted = min(sequences * engines, expected * turn_s * 2) + expected * turn_s
        return round(min(AGENTS_HIGH, max(AGENTS_LOW, CROWD * wanted)))

    def _at_slo(
        self, cluster: Cluster, loading: Loading, expected: float
    ) -> tuple[float, SimulationResult]:
        """The highest rate of turns at which the means keep the SLO, by halving. More than the full
        cluster does is not sustained, however well a run begins."""
        low, high = 0.0, self._full(cluster, loading, expected)[0]
        kept: SimulationResult | None = None
        result: SimulationResult | None = None
        for _ in range(STEPS):
            middle = (low + high) / 2
            good, result = self._keeps(cluster, loading, middle)
            if good:
                low, kept = middle, result
            else:
                high = middle
        found = kept or result
        assert found is not None
        return low, found

    def _keeps(
        self, cluster: Cluster, loading: Loading, turns_per_s: float
    ) -> tuple[bool, SimulationResult]:
        agents_per_s = turns_per_s / ONLINE_TURNS
        duration_s = ARRIVALS_TURNS / turns_per_s
        ttft_s = self._plan.request.slo.ttft_s
        if math.isfinite(ttft_s):
            # So long that a queue which grows is seen to.
            duration_s = max(duration_s, PROMISES * ttft_s)
        drawn = drawn_turns(
            self._trajectories,
            agents=ARRIVALS_TURNS // ONLINE_TURNS,
            turns=ONLINE_TURNS,
            seed=self._seed,
        )
        arrivals = poisson(drawn, agents_per_s=agents_per_s, duration_s=duration_s, seed=self._seed)
        result = self._simulate(cluster, loading, arrivals)
        records = result.records
        arrive_s = records.column("arrive_s")
        steady = (arrive_s >= STEADY[0] * duration_s) & (arrive_s <= duration_s)
        several = records.generate > 1
        tpot = records.tpot_s()[steady[several]]
        ttft_s = float(records.ttft_s()[steady].mean())
        tpot_s = float(tpot.mean()) if tpot.size else math.nan
        return self._plan.request.slo.excess(ttft_s, tpot_s) <= 1, result

    def _simulate(
        self, cluster: Cluster, loading: Loading, arrivals: Sequence[AgentArrival]
    ) -> SimulationResult:
        rates, scale = cluster.rates, _scale(cluster)
        spec = ClusterSpec(
            prefill_nodes=cluster.prefill // scale,
            decode_nodes=cluster.decode // scale,
            gpus_per_node=rates.gpus,
            snic_bytes_per_s=rates.snic_bytes_per_s,
            cnic_bytes_per_s=rates.cnic_bytes_per_s,
            dram_bytes_per_s=rates.dram_bytes_per_s,
            staging_bytes=self._staging_bytes,
        )
        model = modelled(self._plan.geometry, self._calibration, spec)
        # Experts are spread over all GPUs of a side, as the plan has them.
        compute = model_of(self._plan.geometry, self._calibration, cluster)
        model = dataclasses.replace(
            model, compute=compute, prefill_hbm_tokens=compute.prefill_hbm_tokens
        )
        system = named_system(_SYSTEMS[loading])
        return simulate(
            SimulationSetup(cluster=spec, model=model, system=system, arrivals=arrivals),
            self._told,
        )


def _scale(cluster: Cluster) -> int:
    """How many times smaller a cluster of the same ratio has at most `NODES_MAX` nodes; the
    smallest that divides both sides, else as far as they can be divided."""
    common = math.gcd(cluster.prefill, cluster.decode)
    nodes = cluster.prefill + cluster.decode
    for scale in _divisors(common):
        if nodes / scale <= NODES_MAX:
            return scale
    return common


def _divisors(number: int) -> Iterator[int]:
    return (each for each in range(1, number + 1) if number % each == 0)


def _why(result: SimulationResult, held: float, lower: bool, promised: bool) -> str:
    """What of the run explains it; `held`: share of decode nodes' host memory in use."""
    if not lower:
        return (
            "the wait that M/D/1 leaves for is not needed: turns of one agent follow each other"
            if promised
            else "the closed form's means are not those of the turns that were simulated"
        )
    found = []
    if held > FULL:
        found.append(
            f"host memory of decode nodes is full ({held:.0%} held by prompts from their read to "
            "their first token): more --staging"
        )
    balance = result.snic_balance()
    if balance > UNEVEN:
        found.append(f"storage links are uneven, {balance:.2f} of the mean in a window")
    if result.prefill_busy > UNEVEN * result.prefill_compute:
        found.append(
            f"prefill steps last {result.prefill_busy / result.prefill_compute:.2f} times what "
            "they compute, since KV holds them up"
        )
    if result.attention_balance > UNEVEN:
        found.append(
            "engines that step together wait for the slowest, whose attention is "
            f"{result.attention_balance:.2f} of the mean"
        )
    return "; ".join(found) or "queues and bursts, which means leave out"
