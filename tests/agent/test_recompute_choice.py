"""What would come later than its engine computes it is not loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from dualpath.agent.load_cuts import LoadCuts
from dualpath.agent.load_progress import LoadProgress
from dualpath.agent.recompute_choice import (
    LOOK_S,
    LOOKS,
    PATIENCE,
    TRUST_S,
    RecomputeChoice,
    Slower,
    soonest_prefix,
)
from dualpath.kvstore.layout import KVLayout
from dualpath.transfer.placement import PathKind, PathView
from hypothesis import given
from hypothesis import strategies as st

LAYOUT = KVLayout(layers=8, block_tokens=64, layer_bytes=256 << 10, dtype="float16")
BLOCK = LAYOUT.block_bytes
RATES = st.floats(1.0, 1e4)
LACKING = st.lists(st.one_of(st.just(0.0), st.floats(0.0, 1e4)), max_size=20)


@dataclass
class Load:
    progress: LoadProgress
    recompute_block_s: float
    started_at: float = 0.0
    deadline_at: float = 1e9
    looking: object | None = None


def load(blocks: int, compute_rate: float) -> Load:
    """Of so many blocks, of which its engine computes `compute_rate` a second (0: not said)."""
    return Load(LoadProgress(LAYOUT, blocks), 1 / compute_rate if compute_rate else 0.0)


def view(name: str, blocks_per_s: float, *, settled: bool = True, up: bool = True) -> PathView:
    return PathView(name, PathKind.DIRECT, up, 0, 0, blocks_per_s * BLOCK, settled)


class Looks:
    """A choice that is asked again and again about loads over the path `direct`."""

    def __init__(self) -> None:
        self.choice = RecomputeChoice()
        self.now = 100.0

    def look(self, loads: dict[str, Load], *views: PathView) -> list[Slower]:
        names = tuple(each.name for each in views)
        return self.choice.slower(loads, lambda _: names, lambda: views, self.now)

    def carried(self, view: PathView) -> Looks:
        """Somebody's load has just shown how fast the paths are."""
        assert self.look({"before": load(1, 0)}, view) == []
        return self


def ready_s(
    lacking: Sequence[float], kept: int, ahead: float, rate: float, block_s: float
) -> float:
    """When all blocks are there, if `kept` are loaded and the others are computed then."""
    loading = sum(lacking[:kept]) / rate
    waiting = ahead / rate if any(lacking[:kept]) else 0.0
    return waiting + loading + (len(lacking) - kept) * block_s


@given(LACKING, st.floats(0, 1e5), RATES, st.floats(0.001, 100))
def test_no_other_prefix_is_there_sooner(
    lacking: list[float], ahead: float, rate: float, block_s: float
) -> None:
    kept = soonest_prefix(lacking, ahead, rate, block_s)
    times = [ready_s(lacking, each, ahead, rate, block_s) for each in range(len(lacking) + 1)]
    assert times[kept] == pytest.approx(min(times))


@given(LACKING, st.floats(0, 1e5), RATES, RATES, st.floats(0.001, 100))
def test_a_faster_path_or_a_slower_engine_never_loads_less(
    lacking: list[float], ahead: float, rate: float, more: float, block_s: float
) -> None:
    kept = soonest_prefix(lacking, ahead, rate, block_s)
    assert soonest_prefix(lacking, ahead, rate + more, block_s * 1.001) >= kept
    assert soonest_prefix(lacking, ahead, rate, block_s * (1 + more)) >= kept


@given(st.integers(1, 50), RATES, st.floats(0.001, 100))
def test_of_equal_blocks_all_or_none_are_loaded(blocks: int, rate: float, block_s: float) -> None:
    assert soonest_prefix([100.0] * blocks, 0, rate, block_s) in (0, blocks)


def test_what_is_there_costs_nothing_and_stays() -> None:
    assert soonest_prefix([0, 0, 5, 5], 1e9, 1.0, 1.0) == 2
    assert soonest_prefix([], 1e9, 1.0, 1.0) == 0


def test_a_load_that_is_slower_than_computing_is_refused_at_once() -> None:
    direct = view("direct", 10)
    looks = Looks().carried(direct)
    loads = {"slow": load(40, 100), "fast": load(40, 2), "silent": load(40, 0)}
    (found,) = looks.look(loads, direct)
    assert (found.load_id, found.blocks) == ("slow", 0)
    assert found.load_s == pytest.approx(4.0)
    assert found.compute_s == pytest.approx(0.4)
    assert "4 s" in str(found)


def test_about_as_fast_is_loaded() -> None:
    direct = view("direct", 10)
    assert not Looks().carried(direct).look({"a": load(40, 10 * PATIENCE * 0.99)}, direct)
    assert Looks().carried(direct).look({"a": load(40, 10 * PATIENCE * 1.01)}, direct)


def test_paths_add_up_and_loads_before_it_have_their_bytes_first() -> None:
    direct, relay = view("direct", 10), view("relay:d", 30)
    assert Looks().carried(direct).look({"a": load(40, 20)}, direct)
    assert not Looks().carried(direct).look({"a": load(40, 20)}, direct, relay)
    waits = {"first": load(400, 0), "a": load(40, 20)}
    (found,) = Looks().carried(direct).look(waits, direct, relay)
    assert (found.load_id, found.blocks) == ("a", 0)
    assert found.load_s == pytest.approx(11.0)


def test_nobody_waits_for_a_load_that_was_refused() -> None:
    direct = view("direct", 10)
    loads = {"refused": load(4000, 100), "a": load(40, 5)}
    assert [each.load_id for each in Looks().carried(direct).look(loads, direct)] == ["refused"]


@pytest.mark.parametrize(
    "views",
    [
        (view("direct", 0),),
        (view("direct", 1, settled=False),),
        (view("direct", 1), view("relay:d", 0)),
        (view("direct", 1), view("relay:d", 1, up=False)),
        (),
    ],
)
def test_nothing_is_said_without_rates_to_count_on(views: tuple[PathView, ...]) -> None:
    looks = Looks().carried(view("direct", 1))
    for _ in range(3 * LOOKS):
        assert looks.look({"a": load(40, 100)}, *views) == []
        looks.now += LOOK_S


def test_rates_of_paths_that_carried_nothing_for_long_refuse_nobody_but_what_comes_counts() -> None:
    direct = view("direct", 10)
    looks = Looks().carried(direct)
    looks.now += TRUST_S + 0.1
    trial = {"trial": load(40, 100)}
    answers = []
    for _ in range(LOOKS + 1):
        answers.append(len(looks.look(trial, direct)))
        looks.now += LOOK_S
    assert answers.index(1) in (LOOKS - 1, LOOKS)
    # It has shown how fast the path is: who comes next is refused at once again.
    assert looks.look({"next": load(40, 100)}, direct)


def test_a_load_that_runs_is_cut_only_after_it_has_looked_slower_for_a_while() -> None:
    slow, fast = view("direct", 10), view("direct", 1000)
    looks = Looks()
    loads = {"a": load(40, 100)}
    said = []
    for each in [fast] + [slow] * (LOOKS - 1) + [fast] + [slow] * LOOKS:
        said.append(len(looks.look(loads, each)))
        assert looks.look(loads, slow) == []  # too soon to look again
        looks.now += LOOK_S
    assert said == [0] * (2 * LOOKS) + [1]


def test_a_load_that_has_most_of_some_blocks_keeps_those() -> None:
    one = load(100, 100)
    layers = LAYOUT.chunk_count
    one.progress.verified([chunk * 100 + at for chunk in range(layers) for at in range(30)])
    looks = Looks().carried(view("direct", 10))
    (found,) = looks.look({"a": one}, view("direct", 10))
    assert found.blocks == 30
    assert found.compute_s == pytest.approx(0.7)


def test_loads_that_are_still_looked_up_are_left_alone_and_judged_then() -> None:
    cuts, direct = LoadCuts(), view("direct", 10)

    def due(loads: dict[str, Load], now: float) -> list[tuple[str, int, str]]:
        found = cuts.due(loads, lambda _: ("direct",), lambda: (direct,), now)
        return [(each.load_id, each.blocks, each.reason) for each in found]

    assert due({"before": load(1, 0)}, 0.0) == []
    one = load(40, 100)
    one.looking = object()
    assert due({"a": one}, 0.1) == []
    one.looking = None
    assert due({"a": one}, 0.2) == [("a", 0, "recompute")]
