"""What is remembered of requests: bounded, and nothing that came makes way for empty names."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest
from dualpath.agent import handed_request
from dualpath.agent import holdings as holdings_module
from dualpath.agent.handed_request import HandedRequests
from dualpath.agent.holdings import Holdings
from dualpath.agent.staging import SLAB_BYTES
from dualpath.transfer.errors import Overloaded
from dualpath.transfer.region import Region

NAMESPACE = b"n" * 16
HOLD_S = 60.0
MOST = 4


def _fill(requests: HandedRequests, holdings: Holdings, name: str, sharer: str) -> None:
    """A request of which a chunk came."""
    record = requests.of(NAMESPACE, name, sharer)
    requests.begin_intake(record, SimpleNamespace(finish=lambda _reason, _detail: None))
    number = len(holdings._chunks)
    chunk = holdings.fill((NAMESPACE, b"h" * 16, number, 0), 4096)
    assert chunk is not None
    holdings.filled(chunk)
    requests.final(record, chunk.name[:3], chunk, had=False)
    holdings.unuse(chunk)
    requests.end_intake(record, "", "")


def test_names_of_one_peer_leave_room_for_those_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handed_request, "REQUESTS_MAX", 4 * MOST)

    async def body() -> None:
        holdings = Holdings(Region.of(bytearray(MOST * SLAB_BYTES)), HOLD_S)
        requests = HandedRequests(holdings, HOLD_S, Counter(), asyncio.get_running_loop())
        for number in range(2 * MOST):
            _fill(requests, holdings, f"greedy-{number}", "greedy")
        with pytest.raises(Overloaded, match="greedy has 8 requests held") as refused:
            requests.of(NAMESPACE, "greedy", "greedy")
        assert refused.value.reason == "quota"
        assert requests.of(NAMESPACE, "greedy-0", "greedy").final  # what it has, it keeps
        for number in range(MOST):
            _fill(requests, holdings, f"modest-{number}", "modest")
        for number in range(2 * MOST):  # the engines of this node have what they need
            requests.begin_receive(
                requests.of(NAMESPACE, f"own-{number}"), SimpleNamespace(on_final=lambda _: None)
            )
        # What ended is given back.
        record = requests.of(NAMESPACE, "greedy-0")
        requests.begin_receive(record, SimpleNamespace(on_final=lambda _: None))
        requests.end_receive(record, "", "")
        assert len(requests._shares) == 3 * MOST - 1
        _fill(requests, holdings, "third", "third")
        requests.close()

    asyncio.run(body())


def test_retained_requests_of_one_peer_leave_room_for_those_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(holdings_module, "REQUESTS_MAX", MOST)
    holdings = Holdings(Region.of(bytearray(MOST * SLAB_BYTES)), HOLD_S)
    chunk = holdings.fill((NAMESPACE, b"h" * 16, 0, 0), 4096)
    assert chunk is not None
    holdings.filled(chunk)
    for number in range(MOST // 2):
        holdings.pin(chunk, f"greedy-{number}", 0.0, "greedy")
    with pytest.raises(Overloaded, match="greedy has 2 requests held here"):
        holdings.pin(chunk, "greedy", 0.0, "greedy")
    holdings.pin(chunk, "modest", 0.0, "modest")
    holdings.release((NAMESPACE, "greedy-0"))
    holdings.pin(chunk, "greedy", 0.0, "greedy")


def test_names_of_which_nothing_came_make_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handed_request, "REQUESTS_MAX", MOST)

    async def body() -> None:
        holdings = Holdings(Region.of(bytearray(MOST * SLAB_BYTES)), HOLD_S)
        requests = HandedRequests(holdings, HOLD_S, Counter(), asyncio.get_running_loop())
        intake = SimpleNamespace(finish=lambda _reason, _detail: None)
        for number in range(3 * MOST):
            record = requests.of(NAMESPACE, f"empty-{number}", f"peer-{number}")
            requests.begin_intake(record, intake)
            requests.end_intake(record, "peer_lost", "it went away")
        assert len(requests) == MOST
        for number in range(MOST):
            record = requests.of(NAMESPACE, f"full-{number}", f"peer-{number}")
            requests.begin_intake(record, intake)
            chunk = holdings.fill((NAMESPACE, b"h" * 16, number, 0), SLAB_BYTES // 2)
            assert chunk is not None
            holdings.filled(chunk)
            requests.final(record, chunk.name[:3], chunk, had=False)
            holdings.unuse(chunk)
            requests.end_intake(record, "", "")
        with pytest.raises(Overloaded, match="4 requests held"):
            requests.of(NAMESPACE, "one more", "another")
        assert all(requests.of(NAMESPACE, f"full-{number}").final for number in range(MOST))
        requests.close()

    asyncio.run(body())
