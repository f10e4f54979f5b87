"""What is remembered of requests: bounded, and nothing that came makes way for empty names."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest
from dualpath.agent import handed_request
from dualpath.agent.handed_request import HandedRequests
from dualpath.agent.holdings import Holdings
from dualpath.agent.staging import SLAB_BYTES
from dualpath.transfer.errors import Overloaded
from dualpath.transfer.region import Region

NAMESPACE = b"n" * 16
HOLD_S = 60.0
MOST = 4


def test_names_of_which_nothing_came_make_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handed_request, "REQUESTS_MAX", MOST)

    async def body() -> None:
        holdings = Holdings(Region.of(bytearray(MOST * SLAB_BYTES)), HOLD_S)
        requests = HandedRequests(holdings, HOLD_S, Counter(), asyncio.get_running_loop())
        intake = SimpleNamespace(finish=lambda _reason, _detail: None)
        for number in range(3 * MOST):
            record = requests.of(NAMESPACE, f"empty-{number}")
            requests.begin_intake(record, intake)
            requests.end_intake(record, "peer_lost", "it went away")
        assert len(requests) == MOST
        for number in range(MOST):
            record = requests.of(NAMESPACE, f"full-{number}")
            requests.begin_intake(record, intake)
            chunk = holdings.fill((NAMESPACE, b"h" * 16, number, 0), SLAB_BYTES // 2)
            assert chunk is not None
            holdings.filled(chunk)
            requests.final(record, chunk.name[:3], chunk, had=False)
            holdings.unuse(chunk)
            requests.end_intake(record, "", "")
        with pytest.raises(Overloaded, match="held already"):
            requests.of(NAMESPACE, "one more")
        assert all(requests.of(NAMESPACE, f"full-{number}").final for number in range(MOST))
        requests.close()

    asyncio.run(body())
