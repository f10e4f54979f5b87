"""Weighs every ratio of prefill to decode nodes, and says which is best and what binds there.

Closed form throughout: see capacity.py for what that leaves out. Experts of a model are spread over
all GPUs of a side, so a side may be too small for its weights; such ratios are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dualpath.bench.agents.trajectory import Trajectory
from dualpath.bench.models.calibration import Calibration
from dualpath.bench.models.geometry import ModelGeometry
from dualpath.bench.models.roofline import Roofline
from dualpath.bench.plan.bottleneck_range import BottleneckRange, bottleneck_range
from dualpath.bench.plan.capacity import (
    Capacity,
    Cluster,
    Loading,
    capacity_of,
    decode_sequences,
    first_token_s,
)
from dualpath.bench.plan.demand import Demand, demand_of
from dualpath.bench.plan.plan_request import PlanRequest
from dualpath.transfer.errors import InvalidRequest

LOW_HIT_SHARE = 0.5
LITTLE_GAIN = 1.02
_EQUAL = 1e-9


@dataclass(frozen=True, slots=True)
class RatioPlan:
    """One ratio of the sweep."""

    cluster: Cluster
    capacities: dict[Loading, Capacity]

    @property
    def name(self) -> str:
        """`2P4D`."""
        return f"{self.cluster.prefill}P{self.cluster.decode}D"


@dataclass(frozen=True, slots=True)
class Plan:
    """`ratios` in order of prefill nodes; `left_out` are those that the model does not fit."""

    request: PlanRequest
    geometry: ModelGeometry
    workload: str
    range: BottleneckRange
    demand: Demand
    ratios: tuple[RatioPlan, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]

    def best(self, loading: Loading) -> RatioPlan:
        """The ratio that carries the most turns; of equal ones the one of fewer prefill nodes."""
        most = max(each.capacities[loading].turns_per_s for each in self.ratios)
        as_many = (
            each
            for each in self.ratios
            if each.capacities[loading].turns_per_s >= most * (1 - _EQUAL)
        )
        return next(as_many)

    def speed_up(self, loading: Loading) -> float:
        """Over basic, each at its own best ratio."""
        best, basic = self.best(loading), self.best(Loading.BASIC)
        most = basic.capacities[Loading.BASIC].turns_per_s
        return best.capacities[loading].turns_per_s / most

    @property
    def pays(self) -> bool:
        """Whether a second path carries more, each way at its best ratio."""
        return self.speed_up(Loading.DUAL) >= LITTLE_GAIN

    def speed_up_at(self, loading: Loading) -> float:
        """Over basic at the ratio that is best for `loading`."""
        capacities = self.best(loading).capacities
        return capacities[loading].turns_per_s / capacities[Loading.BASIC].turns_per_s


def make_plan(
    request: PlanRequest,
    geometry: ModelGeometry,
    calibration: Calibration,
    workload: str,
    trajectories: Sequence[Trajectory],
) -> Plan:
    """Raises InvalidRequest: the model fits no ratio, the SLO cannot be kept at all, or GPUs of a
    node that engines do not fill."""
    rates = request.rates
    if rates.gpus % geometry.gpus_per_engine:
        raise InvalidRequest(
            f"an engine of {geometry.name} takes {geometry.gpus_per_engine} GPUs, of which a node "
            f"of {rates.gpus} has no whole number; change gpus_per_engine or --gpus-per-node"
        )
    ratios, left_out, demand = [], [], None
    for prefill in range(1, request.nodes):
        cluster = Cluster(rates, prefill, request.nodes - prefill)
        try:
            model = model_of(geometry, calibration, cluster)
        except InvalidRequest as error:
            left_out.append(f"{prefill}P{cluster.decode}D: {error}")
            continue
        # Means of the workload do not depend on the ratio.
        demand = demand or demand_of(trajectories, model)
        ratios.append(
            RatioPlan(
                cluster,
                {each: capacity_of(cluster, demand, model, each, request.slo) for each in Loading},
            )
        )
    if demand is None:
        raise InvalidRequest(
            f"no ratio of {request.nodes} nodes: {left_out[-1] if left_out else 'too few nodes'}"
        )
    _check_slo(request, demand, ratios, geometry, calibration)
    found = bottleneck_range(rates)
    plan = Plan(
        request,
        geometry,
        workload,
        found,
        demand,
        tuple(ratios),
        tuple(left_out),
        request.warnings(),
    )
    return _with_warnings(plan)


def model_of(geometry: ModelGeometry, calibration: Calibration, cluster: Cluster) -> Roofline:
    """With experts over all GPUs of a side. Raises InvalidRequest where the weights do not fit."""
    gpus = cluster.rates.gpus
    return Roofline(
        geometry,
        calibration,
        prefill_expert_gpus=cluster.prefill * gpus if geometry.experts else None,
        decode_expert_gpus=cluster.decode * gpus if geometry.experts else None,
    )


def _check_slo(
    request: PlanRequest,
    demand: Demand,
    ratios: Sequence[RatioPlan],
    geometry: ModelGeometry,
    calibration: Calibration,
) -> None:
    slo = request.slo
    # The side with the most decode nodes has the fastest steps and the most memory.
    widest = ratios[0].cluster
    alone_s = first_token_s(widest, demand, Loading.SPLIT)
    if alone_s >= slo.ttft_s:
        raise InvalidRequest(
            f"--slo ttft={slo.ttft_s:g}s cannot be kept: a mean turn alone on the cluster takes "
            f"{alone_s:.3g} s to its first token; allow more, or give faster links"
        )
    model = model_of(geometry, calibration, widest)
    if not decode_sequences(demand, model, slo):
        step_s = model.decode_step_s(1, round(demand.held_tokens))
        raise InvalidRequest(
            f"--slo tpot={slo.tpot_s * 1e3:g}ms cannot be kept: one sequence alone takes "
            f"{step_s * 1e3:.3g} ms a token, and memory holds {model.hbm_tokens} tokens an engine; "
            "allow more, or give decode more GPUs"
        )


def _with_warnings(plan: Plan) -> Plan:
    found = list(plan.warnings)
    if plan.range.empty:
        found.append(
            "no ratio of prefill to decode nodes is free of other bottlenecks than storage: "
            "faster CNICs or DRAM, or a slower --snic, would make one"
        )
    elif not plan.range.holds(
        plan.best(Loading.DUAL).cluster.prefill, plan.best(Loading.DUAL).cluster.decode
    ):
        found.append(
            f"{plan.best(Loading.DUAL).name} lies outside of the bottleneck-free range: with more "
            "load per turn a CNIC or DRAM would bind before storage"
        )
    if plan.demand.hit_share < LOW_HIT_SHARE:
        found.append(
            f"only {plan.demand.hit_share:.0%} of the prompts' tokens hit: there is little to load"
        )
    if not plan.pays:
        found.append(
            "a second path gains less than 2 %: "
            f"{plan.best(Loading.BASIC).capacities[Loading.BASIC].binds} binds already without it"
        )
    return Plan(
        plan.request,
        plan.geometry,
        plan.workload,
        plan.range,
        plan.demand,
        plan.ratios,
        plan.left_out,
        tuple(found),
    )
