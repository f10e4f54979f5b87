"""How many turns a second each device of a cluster carries, under one way of loading.

Of the bytes that hit, `direct` is the share that prefill nodes read themselves; decode nodes read
and relay the rest. A byte crosses, by the traffic counted in arXiv 2602.21548:

                        direct   relayed
    prefill SNIC           1        -
    decode SNIC            -        1
    prefill CNIC write     1        1
    decode CNIC read       1        2
    decode CNIC write      2        1
    decode DRAM            2        3
    prefill DRAM           2        -

`basic` reads all directly. `dual` balances the storage NICs, as the paper's rule of the shorter
queue does in the mean. `split` takes the share that carries the most turns: it may use less of one
side where that side's other devices bind. Closed form: means only, no queues, no bursts; what is
won by splitting single loads at low load is not in it.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from dualpath.bench.models.roofline import Roofline
from dualpath.bench.plan.bottleneck_range import NodeRates
from dualpath.bench.plan.demand import Demand
from dualpath.bench.slo import Slo

_SPLIT_STEPS = 60
_AS_SOON = 1 + 1e-9
"""Rates that differ by less are the same."""


class Loading(enum.Enum):
    """A way to bring hit blocks to prefill engines."""

    BASIC = "basic"
    DUAL = "dual path"
    SPLIT = "split"


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of device and the turns a second that all of it carries together."""

    name: str
    turns_per_s: float


@dataclass(frozen=True, slots=True)
class Capacity:
    """Of one cluster under one way of loading. `devices` begin with the one that binds."""

    loading: Loading
    direct: float
    devices: tuple[Device, ...]

    @property
    def turns_per_s(self) -> float:
        """Of the whole cluster."""
        return self.devices[0].turns_per_s

    @property
    def binds(self) -> str:
        """The devices that are full first, at the same rate."""
        full = self.turns_per_s * _AS_SOON
        return " and ".join(each.name for each in self.devices if each.turns_per_s <= full)

    @property
    def binds_next(self) -> Device | None:
        """What would be full, were those no limit."""
        full = self.turns_per_s * _AS_SOON
        return next((each for each in self.devices if each.turns_per_s > full), None)


@dataclass(frozen=True, slots=True)
class Cluster:
    """P prefill and D decode nodes of the same kind."""

    rates: NodeRates
    prefill: int
    decode: int


def capacity_of(
    cluster: Cluster, demand: Demand, model: Roofline, loading: Loading, slo: Slo
) -> Capacity:
    """See the module docstring. An SLO takes what its promise costs: on TPOT fewer sequences a
    step, on TTFT the share of time that a device must idle (M/D/1) to keep waits within it."""
    if loading is Loading.BASIC:
        direct = 1.0
    elif loading is Loading.DUAL:
        direct = cluster.prefill / (cluster.prefill + cluster.decode)
    else:
        direct = _best_share(cluster, demand)
    engines = cluster.rates.gpus / demand.engine_gpus
    compute = cluster.prefill * engines / demand.prefill_engine_s
    compute *= _busy_share(demand.prefill_engine_s, first_token_s(cluster, demand, loading), slo)
    devices = [
        *_links(cluster, demand, direct, loading, slo),
        Device("prefill compute", compute),
        Device("decode", cluster.decode * engines * _decode_turns_per_s(demand, model, slo)),
    ]
    return Capacity(loading, direct, tuple(sorted(devices, key=lambda each: each.turns_per_s)))


def first_token_s(cluster: Cluster, demand: Demand, loading: Loading) -> float:
    """TTFT of a mean turn with nobody else there: load and compute overlap layer by layer, except
    under `basic`, which loads all of it first."""
    snic = cluster.rates.snic_bytes_per_s
    cnics = cluster.rates.cnic_bytes_per_s * demand.engine_gpus
    reading = min(cnics, 2 * snic if loading is Loading.SPLIT else snic)
    load_s = demand.load_bytes / reading
    if loading is Loading.BASIC:
        return load_s + demand.prefill_engine_s
    return max(load_s, demand.prefill_engine_s)


def decode_sequences(demand: Demand, model: Roofline, slo: Slo) -> int:
    """How many sequences one decode engine steps together: what fits its memory, and, where TPOT
    is promised, what a step of that time allows; 0 where not even one does."""
    most = int(model.hbm_tokens / max(1.0, demand.held_tokens))
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if model.decode_step_s(middle, round(middle * demand.held_tokens)) <= slo.tpot_s:
            low = middle
        else:
            high = middle - 1
    return low


def _decode_turns_per_s(demand: Demand, model: Roofline, slo: Slo) -> float:
    if not demand.generated_tokens:
        return math.inf
    sequences = decode_sequences(demand, model, slo)
    if not sequences:
        return 0.0
    step_s = model.decode_step_s(sequences, round(sequences * demand.held_tokens))
    return sequences / (demand.generated_tokens * step_s)


def _links(
    cluster: Cluster, demand: Demand, direct: float, loading: Loading, slo: Slo
) -> list[Device]:
    rates, loaded = cluster.rates, demand.load_bytes
    if not loaded:
        return []
    relayed = 1 - direct
    prefill, decode = float(cluster.prefill), float(cluster.decode)
    prefill_cnics, decode_cnics = prefill * rates.gpus, decode * rates.gpus
    cnic, dram, snic = rates.cnic_bytes_per_s, rates.dram_bytes_per_s, rates.snic_bytes_per_s
    snic *= _busy_share(loaded / snic, first_token_s(cluster, demand, loading), slo)
    rows = (
        ("prefill SNIC", prefill * snic, direct),
        ("decode SNIC", decode * snic, relayed),
        ("prefill CNIC write", prefill_cnics * cnic, 1.0),
        ("decode CNIC read", decode_cnics * cnic, direct + 2 * relayed),
        ("decode CNIC write", decode_cnics * cnic, 2 * direct + relayed),
        ("decode DRAM", decode * dram, 2 * direct + 3 * relayed),
        ("prefill DRAM", prefill * dram, 2 * direct),
    )
    return [Device(name, rate / (loaded * share)) for name, rate, share in rows if share > 0]


def _best_share(cluster: Cluster, demand: Demand) -> float:
    """The direct share that carries the most bytes: the least of functions of which each rises or
    falls in the share has one peak, found by narrowing thirds."""

    def carried(direct: float) -> float:
        rows = _links(cluster, demand, direct, Loading.SPLIT, Slo())
        return min((each.turns_per_s for each in rows), default=math.inf)

    balanced = cluster.prefill / (cluster.prefill + cluster.decode)
    low, high = 0.0, 1.0
    for _ in range(_SPLIT_STEPS):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if carried(left) < carried(right):
            low = left
        else:
            high = right
    best = (low + high) / 2
    return best if carried(best) > carried(balanced) * (1 + 1e-9) else balanced


def _busy_share(service_s: float, alone_s: float, slo: Slo) -> float:
    """How busy a device may be so that the mean wait of M/D/1 leaves TTFT within its promise."""
    if not math.isfinite(slo.ttft_s):
        return 1.0
    slack = max(0.0, slo.ttft_s - alone_s)
    return 2 * slack / (service_s + 2 * slack) if service_s else 1.0
