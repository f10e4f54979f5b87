"""The log of events: numbered without gaps, bounded, honest about what it lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from dualpath.kvstore.block_events import BlockEvents, EventKind
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.store_api import InvalidationScope, MissReason
from hypothesis import given
from hypothesis import strategies as st

SPACES = (b"n" * 16, b"m" * 16)


def _hash(number: int, size: int = 32) -> bytes:
    return number.to_bytes(4, "big").rjust(size, b"h")


@given(
    capacity=st.integers(16, 40),
    count=st.integers(0, 120),
    reads=st.lists(st.tuples(st.integers(0, 130), st.integers(1, 50)), max_size=8),
)
def test_what_is_read_is_what_was_told_and_what_is_lost_is_counted(
    capacity: int, count: int, reads: list[tuple[int, int]]
) -> None:
    log = BlockEvents(capacity)
    for number in range(1, count + 1):
        space, size = SPACES[number % 2], (16, 32)[number % 2]
        if number % 5:
            log.stored(space, _hash(number, size), _hash(number - 1, size) if number > 1 else b"")
        else:
            log.removed(space, _hash(number, size), b"", MissReason.EVICTED)
    assert log.last == count
    for after, limit in reads:
        batch = log.read(after, limit)
        first = max(after + 1, count - capacity + 1)
        wanted = list(range(first, min(count, first + limit - 1) + 1))
        assert [event.sequence for event in batch.events] == wanted
        if after <= count:
            assert batch.lost == max(0, first - after - 1)
        for event in batch.events:
            number = event.sequence
            size = (16, 32)[number % 2]
            assert event.namespace_id == SPACES[number % 2]
            assert event.hash == _hash(number, size)
            stored = number % 5 != 0
            assert event.kind is (EventKind.STORED if stored else EventKind.REMOVED)
            assert event.reason is (MissReason.NONE if stored else MissReason.EVICTED)
            assert event.parent == (_hash(number - 1, size) if stored and number > 1 else b"")
        only = log.read(after, limit, SPACES[0])
        assert only.last == batch.last
        assert only.events == tuple(e for e in batch.events if e.namespace_id == SPACES[0])


def test_reading_on_from_the_last_answer_misses_nothing_while_the_log_keeps_up() -> None:
    log, seen, after = BlockEvents(32), [], 0
    for number in range(1, 200):
        log.stored(SPACES[0], _hash(number), b"")
        if number % 7 == 0:
            batch = log.read(after, 1000)
            assert batch.lost == 0
            seen += [event.sequence for event in batch.events]
            after = batch.last
    assert seen == list(range(1, after + 1))


def test_a_log_without_memory_counts_what_it_loses() -> None:
    log = BlockEvents(0)
    for number in range(3):
        log.stored(SPACES[0], _hash(number), b"")
    batch = log.read(0, 10)
    assert (batch.events, batch.last, batch.lost) == ((), 3, 3)


def test_a_waiting_reader_is_called_once_at_the_next_event() -> None:
    log, calls = BlockEvents(16), []
    log.call_at_news(0, lambda: calls.append("waited"))
    log.stored(SPACES[0], _hash(1), b"")
    log.stored(SPACES[0], _hash(2), b"")
    assert calls == ["waited"]
    log.call_at_news(1, lambda: calls.append("at once"))
    assert calls == ["waited", "at once"]

    def never() -> None:
        calls.append("never")

    log.call_at_news(2, never)
    log.forget_callback(never)
    log.stored(SPACES[0], _hash(3), b"")
    assert calls == ["waited", "at once"]


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_a_router_that_applies_the_events_knows_what_the_store_holds(store_path: Path) -> None:
    layout = KVLayout(layers=1, block_tokens=4, layer_bytes=4096, dtype="u8")
    config = StoreConfig(
        disk_bytes=1 << 20, dram_bytes=1 << 20, segment_bytes=256 << 10, read_buffers_bytes=1 << 20
    )
    with BlockStore.open(store_path, config) as store:
        spaces = [store.open_namespace(Namespace(model=m, layout=layout)) for m in ("a", "b")]
        chains = [chain_hashes(range(1000 * i, 1000 * i + 40), 4) for i in range(40)]
        for index, hashes in enumerate(chains):
            data = [bytes([index]) * 4096] * len(hashes)
            store.put(spaces[index % 2], hashes, parents_of(hashes), data, durable=index % 3 == 0)
            if index == 30:
                store.invalidate(InvalidationScope(spaces[0]))
            if index == 35:
                store.invalidate(InvalidationScope(spaces[1], chains[35][3]))
        known: set[tuple[bytes, bytes]] = set()
        reasons = set()
        batch = store.events.read(0, 1 << 20)
        assert batch.lost == 0
        for event in batch.events:
            key = event.namespace_id, event.hash
            if event.kind is EventKind.STORED:
                assert key not in known
                assert not event.parent or (event.namespace_id, event.parent) in known
                known.add(key)
            elif event.kind is EventKind.REMOVED:
                known.remove(key)
            else:
                known = {each for each in known if each[0] != event.namespace_id}
            reasons.add(event.reason)
        present = set()
        for index, hashes in enumerate(chains):
            space = spaces[index % 2]
            hit = store.lookup(space, hashes, owner="t", lease_s=0)
            present |= {(space, each) for each in hashes[: hit.blocks]}
        assert known == present
        assert {MissReason.EVICTED, MissReason.INVALIDATED} <= reasons
