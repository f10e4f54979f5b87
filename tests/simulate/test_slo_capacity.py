"""The capacity at an SLO: what is read from a sweep of rates, and which rates are not run."""

from __future__ import annotations

import math

import pytest
from dualpath.bench.simulate.slo_capacity import FAR, RatePoint, is_far_past, slo_capacity
from dualpath.bench.slo import PAPER_SLO, Slo, parse_slo
from dualpath.transfer.errors import InvalidRequest
from hypothesis import given
from hypothesis import strategies as st

NAN = float("nan")


def test_the_capacity_lies_between_the_last_rate_that_keeps_it_and_the_first_that_does_not() -> (
    None
):
    points = [RatePoint(0.3, 6.0, 0.01), RatePoint(0.1, 1.0, 0.01), RatePoint(0.2, 3.0, 0.01)]
    found = slo_capacity(points, PAPER_SLO)
    assert found.agents_per_s == pytest.approx(0.2 + 0.1 / 3)
    assert not found.at_least


def test_the_tighter_promise_binds() -> None:
    points = [RatePoint(1.0, 0.1, 0.04), RatePoint(2.0, 0.1, 0.06)]
    assert slo_capacity(points, PAPER_SLO).agents_per_s == pytest.approx(1.5)
    assert slo_capacity(points, Slo(ttft_s=4.0)).agents_per_s == 2.0


def test_a_rate_after_the_first_that_breaks_the_slo_does_not_count() -> None:
    points = [RatePoint(1, 5.0, NAN), RatePoint(2, 1.0, NAN)]
    assert slo_capacity(points, PAPER_SLO).agents_per_s == 0


def test_a_sweep_that_keeps_it_throughout_says_at_least() -> None:
    found = slo_capacity([RatePoint(1.0, 0.1, NAN)], PAPER_SLO)
    assert (found.agents_per_s, found.at_least) == (1.0, True)


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.floats(1e-3, 1e3)), min_size=1, max_size=12),
    st.floats(0.01, 100),
)
def test_the_capacity_is_a_rate_of_the_sweep_or_between_two_and_falls_with_the_promise(
    drawn: list[tuple[float, float]], promise: float
) -> None:
    points = [RatePoint(rate, ttft, NAN) for rate, ttft in drawn]
    found = slo_capacity(points, Slo(ttft_s=promise)).agents_per_s
    assert 0 <= found <= max(rate for rate, _ in drawn) * (1 + 1e-12)
    tighter = slo_capacity(points, Slo(ttft_s=promise / 2)).agents_per_s
    assert tighter <= found * (1 + 1e-12)
    if all(ttft <= promise for _, ttft in drawn):
        assert found == max(rate for rate, _ in drawn)


def test_higher_rates_are_left_out_after_two_that_are_far_past_it() -> None:
    near, far = RatePoint(1, 4.0 * FAR, 0.01), RatePoint(2, 4.1 * FAR, 0.01)
    assert not is_far_past([far], PAPER_SLO)
    assert not is_far_past([far, near], PAPER_SLO)
    assert is_far_past([near, far, far], PAPER_SLO)
    assert not is_far_past([far, far], Slo())


def test_an_slo_is_read_with_its_units_and_told_without_infinities() -> None:
    assert parse_slo("ttft=4s, tpot=50ms") == PAPER_SLO
    assert parse_slo("").to_json() == {"ttft_s": None, "tpot_s": None}
    assert PAPER_SLO.excess(2.0, 0.1) == 2
    assert PAPER_SLO.excess(2.0, NAN) == 0.5
    assert math.isinf(parse_slo("ttft=1s").tpot_s)
    with pytest.raises(InvalidRequest, match="did you mean 'tpot'"):
        parse_slo("tpop=1s")
