"""A load that cannot end in time is cut to what can, before its deadline leaves it with nothing."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from dualpath.agent import load_forecast
from dualpath.agent.load_forecast import (
    LAST_LOOKS,
    LOOK_S,
    LOOKS,
    MARGIN,
    PERSISTS,
    Forecast,
    LoadForecast,
)
from dualpath.agent.load_progress import LoadProgress
from dualpath.kvstore.layout import KVLayout
from dualpath.transfer.placement import PathKind, PathView
from hypothesis import given
from hypothesis import strategies as st

LAYOUT = KVLayout(layers=8, block_tokens=64, layer_bytes=256 << 10, dtype="float16")
BLOCK = LAYOUT.block_bytes


@dataclass
class Load:
    progress: LoadProgress
    deadline_at: float
    started_at: float = 0.0


def load(blocks: int, deadline_at: float) -> Load:
    return Load(LoadProgress(LAYOUT, blocks), deadline_at)


def view(name: str, rate: float, *, settled: bool = True, up: bool = True) -> PathView:
    return PathView(name, PathKind.DIRECT, up, 0, 0, rate, settled)


def late(loads: dict[str, Load], *views: PathView, now: float = 0.0) -> list[Forecast]:
    names = tuple(each.name for each in views)
    return LoadForecast().late(loads, lambda _: names, lambda: views, now)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks late counts at the first look."""
    monkeypatch.setattr(load_forecast, "LOOKS", 1)
    monkeypatch.setattr(load_forecast, "LAST_LOOKS", 1)
    monkeypatch.setattr(load_forecast, "PERSISTS", 0.0)


@pytest.mark.usefixtures("at_once")
def test_a_load_is_cut_to_what_its_paths_bring_until_its_deadline() -> None:
    direct, relay = view("direct", 10 * BLOCK), view("relay:d", 30 * BLOCK)
    assert late({"a": load(40, 1.0)}, direct, relay) == []
    (found,) = late({"a": load(100, 1.0)}, direct, relay)
    assert (found.load_id, found.blocks) == ("a", int(40 * MARGIN))
    assert found.needed_s == pytest.approx(2.5)


@pytest.mark.usefixtures("at_once")
def test_what_is_there_already_stays() -> None:
    one = load(100, 1.0)
    chunks = LAYOUT.chunk_count
    one.progress.verified([chunk * 100 + block for chunk in range(chunks) for block in range(30)])
    (found,) = late({"a": one}, view("direct", 10 * BLOCK))
    assert found.blocks == 30 + int(10 * MARGIN)
    assert late({"a": one}, view("direct", 10 * BLOCK), now=5.0)[0].blocks == 30


@pytest.mark.usefixtures("at_once")
def test_loads_before_it_have_their_bytes_first() -> None:
    loads = {"first": load(60, 10.0), "second": load(60, 8.0), "third": load(10, 30.0)}
    (found,) = late(loads, view("direct", 10 * BLOCK))
    assert (found.load_id, found.blocks) == ("second", int(80 * MARGIN) - 60)


@pytest.mark.usefixtures("at_once")
def test_nothing_is_said_without_rates_to_count_on() -> None:
    loads = {"a": load(100, 1.0)}
    assert late(loads, view("direct", 0.0)) == []
    assert late(loads, view("direct", 10.0, settled=False)) == []
    assert late(loads, view("direct", 10 * BLOCK), view("relay:d", 0.0)) == []
    assert late(loads, view("direct", 10 * BLOCK), view("relay:d", 9.0, up=False)) == []
    assert late(loads) == []


@pytest.mark.usefixtures("at_once")
def test_it_looks_now_and_then() -> None:
    forecast = LoadForecast()
    direct = view("direct", BLOCK)

    def look(now: float) -> int:
        loads = {"a": load(100, 1.0)}
        return len(forecast.late(loads, lambda _: ("direct",), lambda: (direct,), now))

    assert [look(0.0), look(LOOK_S / 2), look(LOOK_S)] == [1, 0, 1]


def said(rates: list[float], *, looks_s: float = LOOK_S, deadline_at: float = 1.0) -> list[int]:
    """At which looks something is said of a load of 100 blocks, by the rate of its path at each."""
    forecast = LoadForecast()
    loads = {"a": load(100, deadline_at)}
    found = []
    for look, rate in enumerate(rates):
        direct = view("direct", rate)
        now = look * looks_s
        if forecast.late(loads, lambda _: ("direct",), lambda at=direct: (at,), now):  # type: ignore[misc]
            found.append(look)
    return found


def test_a_load_must_look_late_for_a_while() -> None:
    slow, fast = 2.0 * BLOCK, 1000.0 * BLOCK
    assert said([slow] * (LOOKS - 1), deadline_at=2.0) == []
    assert said([slow] * LOOKS, deadline_at=2.0) == [LOOKS - 1]
    assert said([slow] * (LOOKS - 1) + [fast] + [slow] * (LOOKS - 1), deadline_at=2.0) == []
    # Of a load that has long, it must be longer: by its time, not by how often somebody looks.
    assert said([slow] * 30, deadline_at=10.0) == [round(PERSISTS * 10.0 / LOOK_S)]
    assert said([slow] * LOOKS, looks_s=2.0, deadline_at=30.0) == [LOOKS - 1]


def test_in_its_last_part_a_load_that_is_late_at_all_is_cut_soon() -> None:
    slow = 100.0 * BLOCK / 0.81
    assert said([slow, slow], deadline_at=0.8) == [LAST_LOOKS - 1]
    assert said([slow, slow], deadline_at=0.89) == []
    assert said([slow, slow], looks_s=25.0, deadline_at=30.0) == []


def test_the_best_rate_while_it_looked_late_is_what_it_is_cut_by() -> None:
    forecast = LoadForecast()
    loads = {"a": load(100, 2.0)}
    found: list[Forecast] = []
    for look in range(LOOKS):
        direct = view("direct", (30 if look == 1 else 10) * BLOCK)
        now = look * LOOK_S
        found = forecast.late(loads, lambda _: ("direct",), lambda at=direct: (at,), now)  # type: ignore[misc]
    left_s = 2.0 - (LOOKS - 1) * LOOK_S
    assert [each.blocks for each in found] == [int(30 * MARGIN * left_s)]


@given(
    blocks=st.integers(1, 60),
    verified=st.sets(st.integers(0, 60 * LAYOUT.chunk_count - 1)),
    nbytes=st.floats(-1e9, 1e9),
)
def test_a_fitting_prefix_lacks_no_more_than_fits_and_the_next_one_does(
    blocks: int, verified: set[int], nbytes: float
) -> None:
    progress = LoadProgress(LAYOUT, blocks)
    marks = {index for index in verified if index < blocks * LAYOUT.chunk_count}
    progress.verified(marks)

    def lacks(prefix: int) -> float:
        missing = sum(
            index not in marks
            for index in range(blocks * LAYOUT.chunk_count)
            if index % blocks < prefix
        )
        return missing * BLOCK / LAYOUT.chunk_count

    kept = progress.fitting(nbytes)
    assert kept >= progress.complete_blocks()
    assert lacks(kept) <= max(0.0, nbytes)
    assert kept == blocks or lacks(kept + 1) > nbytes
    assert progress.left_bytes == int(lacks(blocks))
