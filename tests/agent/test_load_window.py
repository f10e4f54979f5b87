"""What has landed in a load's window: verdicts, each once, and who is told when."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import pytest
from dualpath.agent.load_window import ArmedChunks, LoadWindow
from dualpath.agent.mailbox import Mailbox
from dualpath.agent.network import Network
from dualpath.transfer.memory_transport import MemoryHub, MemoryTransport
from dualpath.transfer.region import Region
from dualpath.transfer.slice_table import SliceTable

COUNT, NBYTES = 8, 4096
TAGS = range(10, 10 + COUNT)
SUMS = [1000 + index for index in range(COUNT)]


class _Told(Mailbox[LoadWindow]):
    """Remembers which news were urgent."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop, lambda _: None)
        self.urgent: list[bool] = []

    def put(self, item: LoadWindow, *, urgent: bool = False) -> None:
        self.urgent.append(urgent)


@contextmanager
def _armed(sums: Sequence[int] = SUMS) -> Iterator[tuple[LoadWindow, _Told]]:
    with closing(asyncio.new_event_loop()) as loop:
        hub = MemoryHub()
        network = Network("n", lambda name, lost: MemoryTransport(name, lost, hub), loop)
        told = _Told(loop)
        region = Region.anonymous(COUNT * NBYTES)
        window = LoadWindow("load", "direct", network, region, (0, COUNT * NBYTES), told)
        offsets = [NBYTES * index for index in range(COUNT)]
        targets = SliceTable.contiguous(offsets, [NBYTES] * COUNT)
        zeros = [0] * COUNT
        window.arm(ArmedChunks(TAGS[0], range(COUNT), zeros, zeros, targets, sums), now=1.0)
        yield window, told
        window.close()
        network.transport.close()


def test_verdicts_come_once_with_the_chunk_and_how_long_it_waited() -> None:
    with _armed() as (window, _):
        assert window._hashed(TAGS[:3], SUMS[:3]) == [True] * 3
        assert window._hashed(TAGS[3:5], [SUMS[3], 7]) == [True, False]
        landed = window.take_landed(1.5)
        assert (landed.intact, landed.corrupt) == ([0, 1, 2, 3], [4])
        assert landed.waits_s == {0.5: 4}
        assert list(window.outstanding) == list(TAGS[5:])
        assert window.take_landed(2.0).intact == []


def test_what_was_fenced_or_never_armed_has_no_verdict() -> None:
    with _armed() as (window, _):
        assert window._hashed(TAGS[:2], SUMS[:2]) == [True, True]
        window.outstanding.pop(TAGS[1])  # given up after it had landed
        window.fence([TAGS[2]])
        assert window._hashed([TAGS[2], TAGS[3], 99], [SUMS[2], SUMS[3], 1]) == [False, True, False]
        landed = window.take_landed(1.0)
        assert (landed.intact, landed.corrupt) == ([0, 3], [])


@pytest.mark.parametrize("hungry", [False, True])
def test_news_are_urgent_at_half_only_while_more_waits_and_always_at_the_end(hungry: bool) -> None:
    with _armed() as (window, told):
        window.hungry = hungry
        for index in range(6):
            window._hashed(TAGS[index : index + 1], SUMS[index : index + 1])
        assert told.urgent == ([False, True] if hungry else [False])
        window.take_landed(1.0)
        window._hashed(TAGS[6:], SUMS[6:])
        assert told.urgent[-1]
        window.take_landed(1.0)
        window._hashed([99], [1])
        assert not window.outstanding


def test_what_lands_before_its_checksums_are_known_is_judged_when_they_come() -> None:
    with _armed(sums=()) as (window, told):
        assert window._hashed(TAGS[:2], [SUMS[0], 7]) == [True, True]
        window.fence([TAGS[2]])
        assert (window.take_landed(1.0).intact, told.urgent) == ([], [])
        window.reveal(lambda armed: SUMS)
        landed = window.take_landed(1.5)
        assert (landed.intact, landed.corrupt) == ([0], [1])
        assert window._hashed(TAGS[3:5], [SUMS[3], 7]) == [True, False]
        landed = window.take_landed(2.0)
        assert (landed.intact, landed.corrupt) == ([3], [4])
