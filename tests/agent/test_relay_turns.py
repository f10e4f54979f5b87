"""A relay serves its requesters by turns, within credit, and lets none take all of the staging."""

from __future__ import annotations

from typing import cast

from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.holdings import Holdings
from dualpath.agent.relay_job import RelayChunk, RelayGrant, Requester, Source, Stage
from dualpath.agent.relay_turns import RelayTurns
from dualpath.agent.staging import SLAB_BYTES, Staging
from dualpath.transfer.credit import CreditConfig
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.slices import Slices

CHUNK = 256 << 10
MIB = 1 << 20


def requester(name: str, chunks: int) -> Requester:
    made = Requester(name, name)
    grant = RelayGrant(
        1,
        made,
        Source(cast(DaemonLink, None)),
        RegionDescriptor(1, 1, 0, MIB),
        Lane.LOAD_PREFILL,
        1e9,
        lambda _: None,
        chunks,
    )
    for index in range(chunks):
        made.queue.append(RelayChunk(grant, 0, index, index, Slices.contiguous(0, CHUNK)))
        made.waiting_bytes += CHUNK
    return made


def turns(slabs: int = 16) -> tuple[RelayTurns, Staging]:
    staging = Staging(Region.of(bytearray(slabs * SLAB_BYTES)))
    return RelayTurns(staging, Holdings(None, 1.0), CreditConfig()), staging


def test_a_greedy_requester_does_not_slow_a_modest_one() -> None:
    ring, _ = turns()
    greedy, modest = requester("greedy", 1000), requester("modest", 8)
    ring.add(greedy)
    ring.add(modest)
    ring.add(greedy)
    served = []
    for number in range(16):
        chunk = ring.next(number * CHUNK, 64 * MIB, 0.0)
        assert chunk is not None
        assert chunk.stage is Stage.READING
        served.append(chunk.grant.requester.name)
    assert served == ["greedy", "modest"] * 8


def test_chunks_of_one_requester_go_in_order() -> None:
    ring, _ = turns()
    ring.add(requester("one", 10))
    order: list[int] = []
    while (chunk := ring.next(len(order) * CHUNK, 64 * MIB, 0.0)) is not None:
        order.append(chunk.chunk)
    assert order == list(range(10))


def test_credit_bounds_what_is_read_at_once_but_never_to_nothing() -> None:
    ring, _ = turns()
    ring.add(requester("one", 100))
    reading = 0
    while ring.next(reading, 2 * MIB, 0.0) is not None:
        reading += CHUNK
    assert reading == 2 * MIB
    assert ring.next(0, 1, 0.0) is not None


def test_a_requester_that_takes_nothing_leaves_room_for_the_others() -> None:
    ring, staging = turns(16)
    slow, other = requester("slow", 1000), requester("other", 1000)
    ring.add(slow)
    while ring.next(0, 64 * MIB, 0.0) is not None:
        pass
    assert slow.staged_bytes <= staging.capacity_bytes // 2
    ring.add(other)
    while ring.next(0, 64 * MIB, 0.0) is not None:
        pass
    assert other.staged_bytes >= staging.capacity_bytes // 4
    assert slow.staged_bytes + other.staged_bytes <= staging.capacity_bytes


def test_nothing_starts_without_a_slot() -> None:
    ring, staging = turns(1)
    assert staging.take(SLAB_BYTES) is not None
    ring.add(requester("one", 1))
    assert ring.next(0, 64 * MIB, 0.0) is None
