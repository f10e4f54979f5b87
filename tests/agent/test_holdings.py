"""Chunks that are held: pins, the cache, what goes first, and what never goes."""

from __future__ import annotations

import pytest
from dualpath.agent.holdings import REQUEST_CHARS_MAX, ChunkName, HeldChunk, Holdings
from dualpath.agent.staging import SLAB_BYTES
from dualpath.kvstore.checksum import xxh3_64
from dualpath.transfer.errors import InvalidRequest, Overloaded
from dualpath.transfer.region import Region

HOLD_S = 10.0
NAMESPACE = b"n" * 16


def name(number: int, data: bytes = b"") -> ChunkName:
    return (NAMESPACE, number.to_bytes(16, "big"), 0, xxh3_64(data))


def made(slabs: int) -> Holdings:
    return Holdings(Region.of(bytearray(slabs * SLAB_BYTES)), HOLD_S)


def held(holdings: Holdings, number: int, request: str = "") -> HeldChunk:
    chunk = holdings.fill(name(number), SLAB_BYTES, claimed=True)
    assert chunk is not None
    if request:
        holdings.pin(chunk, request, 0.0)
    holdings.filled(chunk)
    holdings.unuse(chunk)
    return chunk


def test_what_was_used_longest_ago_goes_first() -> None:
    holdings = made(3)
    one, two, three = (held(holdings, number) for number in range(3))
    holdings.use(one)
    holdings.unuse(one)
    held(holdings, 3)
    held(holdings, 4)
    assert two.gone
    assert three.gone
    assert holdings.find(one.name) is one
    assert holdings.used_bytes == 3 * SLAB_BYTES
    assert holdings.events["hold_evicted"] == 2


def test_without_a_cache_only_what_somebody_needs_stays() -> None:
    holdings = Holdings(Region.of(bytearray(2 * SLAB_BYTES)), HOLD_S, cache=False)
    kept = held(holdings, 1, "r")
    room: list[bool] = []
    holdings.on_room = lambda: room.append(True)
    assert held(holdings, 2).gone
    assert room
    assert holdings.find(kept.name) is kept
    holdings.release((NAMESPACE, "r"))
    assert holdings.find(kept.name) is None
    assert (holdings.used_bytes, holdings.pinned_bytes) == (0, 0)


def test_pinned_read_and_filling_chunks_never_go() -> None:
    holdings = made(3)
    held(holdings, 1, "r")
    read = held(holdings, 2)
    holdings.use(read)
    filling = holdings.fill(name(3), SLAB_BYTES, claimed=True)
    assert filling is not None
    assert holdings.fill(name(4), SLAB_BYTES, claimed=True) is None
    room: list[bool] = []
    holdings.on_room = lambda: room.append(True)
    holdings.release((NAMESPACE, "r"))
    assert room
    assert held(holdings, 4).held
    assert holdings.find(name(1)) is None
    assert holdings.find(read.name) is read
    assert holdings.find(filling.name) is filling


def test_a_chunk_of_several_requests_stays_until_the_last_lets_it_go() -> None:
    holdings = made(1)
    chunk = held(holdings, 1, "a")
    holdings.pin(chunk, "b", 0.0)
    assert holdings.pinned_bytes == SLAB_BYTES
    holdings.release((NAMESPACE, "a"))
    assert holdings.fill(name(2), SLAB_BYTES, claimed=True) is None
    holdings.unpin(chunk, "b")
    assert (holdings.pinned_bytes, holdings.requests) == (0, 0)
    assert held(holdings, 2).held


def test_pins_that_nobody_comes_for_expire_and_those_in_use_do_not() -> None:
    holdings = made(2)
    held(holdings, 1, "forgotten")
    held(holdings, 2, "busy")
    holdings.begin((NAMESPACE, "busy"))
    assert holdings.expire(HOLD_S - 1) == 0
    assert holdings.expire(HOLD_S) == 1
    assert holdings.requests == 1
    holdings.end((NAMESPACE, "busy"), 2 * HOLD_S)
    assert holdings.expire(3 * HOLD_S - 1) == 0
    assert holdings.expire(3 * HOLD_S) == 1
    assert (holdings.pinned_bytes, holdings.requests) == (0, 0)
    assert holdings.events["hold_expired"] == 2


def test_a_chunk_that_was_not_filled_is_found_no_more_and_leaves_no_pin() -> None:
    holdings = made(1)
    chunk = holdings.fill(name(1), SLAB_BYTES, claimed=True)
    assert chunk is not None
    told: list[bool] = []
    chunk.waiters.append(lambda: told.append(chunk.held))
    holdings.pin(chunk, "r", 0.0)
    holdings.discard(chunk)
    assert told == [False]
    assert holdings.find(chunk.name) is None
    assert holdings.used_bytes == SLAB_BYTES  # whoever fills it may still write
    holdings.unuse(chunk)
    assert (holdings.used_bytes, holdings.pinned_bytes, holdings.requests) == (0, 0, 0)


def test_wrong_bytes_are_found_out_and_discarded_even_while_they_are_pinned() -> None:
    holdings = made(1)
    data = bytes(SLAB_BYTES)
    chunk = holdings.fill(name(1, data), SLAB_BYTES, claimed=True)
    assert chunk is not None
    holdings.pin(chunk, "r", 0.0)
    holdings.filled(chunk)
    holdings.unuse(chunk)
    assert not holdings.doubt(chunk)
    holdings.region.view[chunk.slot.offset] ^= 1
    assert holdings.doubt(chunk)
    assert holdings.find(chunk.name) is None
    assert (holdings.used_bytes, holdings.pinned_bytes, holdings.requests) == (0, 0, 0)
    assert holdings.events["hold_corrupt"] == 1


def test_nothing_is_held_without_memory_for_it() -> None:
    holdings = Holdings(None, HOLD_S)
    assert holdings.fill(name(1), 1) is None
    assert holdings.capacity_bytes == 0
    with pytest.raises(InvalidRequest, match="at least"):
        Holdings(Region.of(bytearray(1)), HOLD_S)


def test_of_two_that_fill_one_chunk_the_first_stays_with_all_pins() -> None:
    holdings = made(2)
    slow = holdings.fill(name(1), SLAB_BYTES, claimed=True)
    assert slow is not None
    holdings.pin(slow, "r", 0.0)
    told: list[str] = []
    slow.waiters.append(lambda: told.append("slow"))
    fast = holdings.fill(name(1), SLAB_BYTES, claimed=True)
    assert fast is not None
    assert holdings.find(name(1)) is slow
    assert holdings.filled(fast) is fast
    holdings.unuse(fast)
    assert told == ["slow"]
    assert holdings.find(name(1)) is fast
    assert (slow.gone, slow.pins, fast.pins) == (True, 0, 1)
    assert holdings.pinned_bytes == SLAB_BYTES
    assert holdings.filled(slow) is fast
    holdings.unuse(slow)
    assert holdings.used_bytes == SLAB_BYTES
    holdings.release((NAMESPACE, "r"))
    assert holdings.pinned_bytes == 0
    assert holdings.find(name(1)) is fast


@pytest.mark.parametrize("first_ends", [True, False])
def test_of_two_that_fill_one_chunk_one_may_give_up(first_ends: bool) -> None:
    holdings = made(2)
    pair = [holdings.fill(name(1), SLAB_BYTES, claimed=True) for _ in range(2)]
    gone, kept = pair if first_ends else reversed(pair)
    assert gone is not None
    assert kept is not None
    holdings.discard(gone)
    holdings.unuse(gone)
    assert holdings.used_bytes == SLAB_BYTES
    assert holdings.filled(kept) is kept
    holdings.unuse(kept)
    assert holdings.find(name(1)) is kept
    assert held(holdings, 2).held


def test_requests_that_nobody_receives_get_half() -> None:
    holdings = made(4)
    room: list[bool] = []
    holdings.on_room = lambda: room.append(True)
    cached = held(holdings, 9)
    for number in (1, 2):
        chunk = holdings.fill(name(number), SLAB_BYTES)
        assert chunk is not None
        holdings.filled(chunk)
        holdings.pin(chunk, "late", 0.0)
        holdings.unuse(chunk)
    assert holdings.unclaimed_bytes == 2 * SLAB_BYTES
    assert holdings.fill(name(3), SLAB_BYTES) is None
    with pytest.raises(Overloaded, match="half"):
        holdings.pin(cached, "other", 0.0)
    assert holdings.requests == 1
    other = holdings.fill(name(3), SLAB_BYTES, claimed=True)
    assert other is not None
    room.clear()
    holdings.begin((NAMESPACE, "late"), claims=True)
    assert room
    assert holdings.unclaimed_bytes == 0
    again = holdings.fill(name(4), SLAB_BYTES)
    assert again is not None
    for each in (other, again):
        holdings.discard(each)
        holdings.unuse(each)
    holdings.release((NAMESPACE, "late"))
    holdings.end((NAMESPACE, "late"), 0.0)
    assert (holdings.unclaimed_bytes, holdings.pinned_bytes, holdings.requests) == (0, 0, 0)


@pytest.mark.parametrize("request_name", ["", "x" * (REQUEST_CHARS_MAX + 1)])
def test_a_request_has_a_name_of_bounded_length(request_name: str) -> None:
    with pytest.raises(InvalidRequest, match="characters"):
        made(1).begin((NAMESPACE, request_name))
