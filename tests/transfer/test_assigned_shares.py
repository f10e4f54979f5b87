"""Loads whose sides have shares: each side takes its own, and the other all if one is away."""

from __future__ import annotations

import math
from typing import Any

import pytest
from dualpath.transfer.dispatcher import Dispatcher
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.placement import AssignedPolicy, PathKind, relay_of
from hypothesis import given, settings
from hypothesis import strategies as st

CHUNK = 256 << 10
PATHS = ("direct", "direct:eth1", "relay:d0", "relay:d1", "relay:d1:1")


def dispatcher(paths: tuple[str, ...] = PATHS) -> Dispatcher:
    made = Dispatcher()
    for name in paths:
        kind = PathKind.RELAY if relay_of(name) else PathKind.DIRECT
        made.add_path(name, kind, 0.0)
    return made


def add(made: Dispatcher, share: float, nbytes: list[int], peer: str = "d1", **more: Any) -> None:
    made.add_load("load", nbytes, AssignedPolicy(share), 0.0, decode_peer=peer, **more)


def land_all(made: Dispatcher, draw: Any, rates: dict[str, float] | None = None) -> None:
    """Chunks land in any order, or, with rates, each path at its own."""
    now, flying = 0.0, list[tuple[str, int]]()
    while not made.is_done("load"):
        for grant in made.grants(now):
            flying += [(grant.path, chunk) for chunk in grant.chunks]
        assert flying, "neither side takes what waits"
        path, chunk = flying.pop(draw(len(flying) - 1))
        now += 1e-3 if rates is None else CHUNK / rates[path]
        assert made.verified("load", [chunk], path, now)


def sides(made: Dispatcher) -> tuple[int, int]:
    shares = made.shares("load")
    direct = sum(nbytes for path, nbytes in shares.items() if not relay_of(path))
    return direct, sum(shares.values()) - direct


@settings(deadline=None)
@given(
    st.floats(0, 1),
    st.lists(st.integers(1, CHUNK), min_size=1, max_size=60),
    st.lists(st.sampled_from(PATHS), min_size=1, unique=True),
    st.data(),
)
def test_each_side_takes_its_share_to_the_nearest_chunk(
    share: float, nbytes: list[int], slow: list[str], data: st.DataObject
) -> None:
    made = dispatcher()
    add(made, share, nbytes)
    rates = {path: 1e5 if path in slow else 1e9 for path in PATHS}
    land_all(made, lambda most: data.draw(st.integers(0, most)), rates)
    direct, relayed = sides(made)
    assert direct + relayed == sum(nbytes)
    assert abs(direct - share * sum(nbytes)) <= max(nbytes)
    assert made.shares("load").keys() <= {*PATHS} - {"relay:d0"}
    assert not made.events("load")


@pytest.mark.parametrize(("share", "path"), [(1.0, "direct"), (0.0, "relay:d1")])
def test_a_whole_share_goes_by_one_side_however_slow(share: float, path: str) -> None:
    made = dispatcher(("direct", "relay:d0", "relay:d1"))
    add(made, share, [CHUNK] * 20)
    assert made.paths_of("load") == (path,)
    land_all(made, lambda most: 0, dict.fromkeys(PATHS, 1e4))
    assert made.shares("load") == {path: 20 * CHUNK}


def test_what_is_lost_is_taken_by_the_other_side_and_shares_hold_again_once_it_is_back() -> None:
    made = dispatcher(("direct", "relay:d1"))
    add(made, 0.5, [CHUNK] * 64)
    taken = {grant.path for grant in made.grants(0.0)}
    assert taken == {"direct", "relay:d1"}
    made.path_lost("relay:d1", "peer_lost", 0.1)
    assert made.paths_of("load") == ("direct",)
    events = made.events("load")
    assert events["fallback:peer_lost"] == 1
    # The copy that proves the path again, as the agent would have it.
    later = 0.1 + made.next_event_s(0.1) + 60
    made.path_lost("relay:d1", "peer_lost", 0.2)
    assert made.events("load")["fallback:peer_lost"] == 1
    made.set_up("relay:d1", True, later)
    assert made.paths_of("load") == ("direct", "relay:d1")
    flying = [(path, chunk) for path, chunks in made.inflight("load").items() for chunk in chunks]
    now = later
    while not made.is_done("load"):
        for grant in made.grants(now):
            flying += [(grant.path, chunk) for chunk in grant.chunks]
        path, chunk = flying.pop(0)
        now += 1e-3
        made.verified("load", [chunk], path, now)
    direct, relayed = sides(made)
    assert abs(direct - relayed) <= CHUNK


def test_without_a_path_through_the_decode_peer_direct_reads_all_and_says_so() -> None:
    made = dispatcher(("direct", "relay:d0"))
    add(made, 0.25, [CHUNK] * 8, "d9")
    assert made.paths_of("load") == ("direct",)
    assert made.events("load") == {"fallback:no_relay": 1}
    made.set_up("relay:d0", False, 0.1)
    made.add_load("second", [CHUNK], AssignedPolicy(0.0), 0.1, decode_peer="d0")
    assert made.paths_of("second") == ("direct",)
    assert made.events("second") == {"fallback:path_down": 1}


def test_with_both_sides_away_any_other_relay_serves() -> None:
    made = dispatcher(("direct", "relay:d0", "relay:d1"))
    add(made, 0.5, [CHUNK] * 8)
    for name in ("direct", "relay:d1"):
        made.set_up(name, False, 0.1)
    assert made.paths_of("load") == ("relay:d0",)
    assert made.events("load") == {"fallback:path_down": 1}


def test_chunks_that_fail_go_by_the_other_side_whatever_its_share() -> None:
    made = dispatcher(("direct", "relay:d1"))
    add(made, 0.5, [CHUNK] * 2)
    granted = {grant.path: grant.chunks for grant in made.grants(0.0)}
    assert {path: len(chunks) for path, chunks in granted.items()} == {"direct": 1, "relay:d1": 1}
    made.failed("load", granted["relay:d1"][0], "relay:d1", "corrupt", 0.1)
    assert [grant.path for grant in made.grants(0.1)] == ["direct"]


def test_shares_are_not_overtaken_by_an_idle_side() -> None:
    made = dispatcher(("direct", "relay:d1"))
    add(made, 0.5, [CHUNK] * 4)
    for grant in made.grants(0.0):
        if grant.path == "direct":
            made.verified("load", grant.chunks, "direct", 0.01)
    assert made.grants(0.02) == []
    assert made.overtaken(1.0) == []


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan, math.inf])
def test_shares_that_are_none_are_refused(share: float) -> None:
    with pytest.raises(InvalidRequest, match="direct_share"):
        AssignedPolicy(share)
