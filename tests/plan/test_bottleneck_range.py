"""The bottleneck-free range: the paper's example, and what must hold for any cluster."""

from __future__ import annotations

import dataclasses
import math

import pytest
from dualpath.bench.plan.bottleneck_range import NodeRates, as_ratio, bottleneck_range
from dualpath.transfer.errors import InvalidRequest
from hypothesis import assume, given
from hypothesis import strategies as st

PAPER = NodeRates(gpus=8, snic_bytes_per_s=50e9, cnic_bytes_per_s=50e9, dram_bytes_per_s=500e9)
RATES = st.builds(
    NodeRates,
    gpus=st.integers(1, 64),
    snic_bytes_per_s=st.floats(1e9, 4e11),
    cnic_bytes_per_s=st.floats(1e9, 4e11),
    dram_bytes_per_s=st.floats(1e10, 2e12),
)


def traffic(rates: NodeRates, prefill: int, decode: int) -> dict[str, float]:
    """Load over capacity of every device with all storage NICs busy, as the paper writes it: Tp of
    direct and Tc of relayed traffic for each pair of a prefill and a decode GPU."""
    g, b = rates.gpus, rates.cnic_bytes_per_s
    direct = rates.snic_bytes_per_s / (decode * g * g)
    relayed = rates.snic_bytes_per_s / (prefill * g * g)
    dram = (3 + 2 * prefill / decode) * rates.snic_bytes_per_s
    return {
        "prefill CNIC write": (direct + relayed) * decode * g / b,
        "decode CNIC read": (direct + 2 * relayed) * prefill * g / b,
        "decode CNIC write": (2 * direct + relayed) * prefill * g / b,
        "decode DRAM": dram / rates.dram_bytes_per_s,
    }


def test_the_papers_cluster_is_free_between_a_seventh_and_seven_halves() -> None:
    found = bottleneck_range(PAPER)
    assert found.low == pytest.approx(1 / 7)
    assert found.high == pytest.approx(7 / 2)
    assert (as_ratio(found.low), as_ratio(found.high)) == ("1/7", "7/2")
    bounds = {each.device: each.ratio for each in found.bounds}
    assert bounds["decode CNIC read"] == pytest.approx(6)
    assert bounds["decode DRAM"] == pytest.approx(7 / 2)
    assert found.holds(1, 7)
    assert found.holds(7, 2)
    assert not found.holds(1, 8)
    assert not found.holds(4, 1)


@given(RATES, st.integers(1, 40), st.integers(1, 40))
def test_a_ratio_is_in_the_range_just_when_no_device_carries_more_than_it_can(
    rates: NodeRates, prefill: int, decode: int
) -> None:
    loads = traffic(rates, prefill, decode)
    assume(all(abs(load - 1) > 1e-6 for load in loads.values()))
    free = all(load < 1 for load in loads.values())
    assert bottleneck_range(rates).holds(prefill, decode) == free


@given(RATES, st.integers(1, 40), st.integers(1, 40))
def test_each_bound_is_that_of_its_device(rates: NodeRates, prefill: int, decode: int) -> None:
    loads, ratio = traffic(rates, prefill, decode), prefill / decode
    for bound in bottleneck_range(rates).bounds:
        load = loads[bound.device]
        assume(abs(load - 1) > 1e-6)
        within = ratio >= bound.ratio if bound.least else ratio <= bound.ratio
        assert within == (load < 1), bound


@given(RATES, st.floats(1.01, 4))
def test_faster_devices_widen_the_range_and_a_faster_snic_narrows_it(
    rates: NodeRates, factor: float
) -> None:
    before = bottleneck_range(rates)
    for name in ("cnic_bytes_per_s", "dram_bytes_per_s"):
        faster = dataclasses.replace(rates, **{name: getattr(rates, name) * factor})
        after = bottleneck_range(faster)
        assert after.low <= before.low
        assert after.high >= before.high
    storage = dataclasses.replace(rates, snic_bytes_per_s=rates.snic_bytes_per_s * factor)
    after = bottleneck_range(storage)
    assert after.low >= before.low
    assert after.high <= before.high


def test_no_ratio_is_free_where_storage_is_as_fast_as_all_cnics() -> None:
    found = bottleneck_range(NodeRates(1, 50e9, 50e9, 500e9))
    assert found.empty
    assert math.isinf(found.low)
    assert as_ratio(found.low) == "none"
    assert not found.holds(1, 1)


@pytest.mark.parametrize("name", ["snic", "cnic", "dram"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_no_device_has_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=f"rate of the {name.upper()} is {value}"):
        dataclasses.replace(PAPER, **{f"{name}_bytes_per_s": value})  # type: ignore[arg-type]
