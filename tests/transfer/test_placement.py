"""The placement policies: which paths they name, and that they never name one that is down."""

from __future__ import annotations

import pytest
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.placement import (
    POLICY_NAMES,
    LoadView,
    PathKind,
    PathView,
    policy_named,
    relay_path,
)
from hypothesis import given
from hypothesis import strategies as st


def view(
    name: str, queue_bytes: int = 0, up: bool = True, rate: float = 0, spare: bool = False
) -> PathView:
    kind = PathKind.DIRECT if name == "direct" else PathKind.RELAY
    return PathView(name, kind, up, queue_bytes, 0, rate, spare=spare)


def load(turn: int = 0, decode_peer: str = "") -> LoadView:
    return LoadView("load", 1 << 20, decode_peer, turn)


@st.composite
def path_views(draw: st.DrawFn) -> list[PathView]:
    names = ["direct", *(relay_path(f"d{index}") for index in range(draw(st.integers(0, 4))))]
    return [
        view(
            name,
            draw(st.integers(0, 5)),
            draw(st.booleans()),
            draw(st.floats(0, 1e9)),
            name != "direct" and draw(st.booleans()),
        )
        for name in names
    ]


@given(st.sampled_from(POLICY_NAMES), path_views(), st.integers(0, 99), st.sampled_from(["", "d1"]))
def test_a_policy_names_only_up_paths_and_some_path_whenever_one_is_up(
    name: str, paths: list[PathView], turn: int, peer: str
) -> None:
    chosen = policy_named(name).paths_for(load(turn, peer), paths)
    up = {path.name for path in paths if path.up}
    assert set(chosen) <= up
    assert bool(chosen) == bool(up)
    assert len(set(chosen)) == len(chosen)
    assert chosen == policy_named(name).paths_for(load(turn, peer), paths)


@given(path_views())
def test_split_uses_all_up_paths_and_spare_ones_only_in_place_of_direct(
    paths: list[PathView],
) -> None:
    chosen = policy_named("split").paths_for(load(), paths)
    direct = paths[0].up
    assert set(chosen) == {path.name for path in paths if path.up and not (path.spare and direct)}


@given(path_views())
def test_direct_uses_only_the_direct_path_while_it_is_up(paths: list[PathView]) -> None:
    chosen = policy_named("direct").paths_for(load(), paths)
    if paths[0].up:
        assert chosen == ("direct",)


@given(path_views())
def test_round_robin_gives_each_up_path_the_same_number_of_loads(paths: list[PathView]) -> None:
    up = [path.name for path in paths if path.up]
    policy = policy_named("round-robin")
    chosen = [policy.paths_for(load(turn), paths) for turn in range(3 * len(up))]
    for name in up:
        assert chosen.count((name,)) == 3


@given(path_views())
def test_shorter_queue_picks_the_least_queue_and_direct_among_equals(
    paths: list[PathView],
) -> None:
    chosen = policy_named("shorter-queue").paths_for(load(), paths)
    up = [path for path in paths if path.up]
    if up:
        least = min(path.queue_bytes for path in up)
        names = [path.name for path in up if path.queue_bytes == least]
        assert chosen == (("direct",) if "direct" in names else (names[0],))


def test_shorter_queue_compares_direct_with_the_requests_own_decode_node() -> None:
    paths = [view("direct", 5), view("relay:d0", 0), view("relay:d1", 4)]
    policy = policy_named("shorter-queue")
    assert policy.paths_for(load(decode_peer="d1"), paths) == ("relay:d1",)
    paths = [view("direct", 3), view("relay:d0", 0), view("relay:d1", 4)]
    assert policy.paths_for(load(decode_peer="d1"), paths) == ("direct",)


def test_shorter_queue_takes_the_least_relay_when_the_decode_nodes_path_is_down() -> None:
    paths = [view("direct", 5), view("relay:d0", 1), view("relay:d1", 0, up=False)]
    policy = policy_named("shorter-queue")
    assert policy.paths_for(load(decode_peer="d1"), paths) == ("relay:d0",)


def test_an_unknown_policy_is_refused_with_the_known_names() -> None:
    with pytest.raises(InvalidRequest, match=r"'fastest'.*direct, round-robin, shorter-queue"):
        policy_named("fastest")
