"""Facts in columns: the filters, and records decoded in bulk as they are one by one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from dualpath.kvstore.block_columns import BlockColumns
from dualpath.kvstore.block_table import GONE, NO_ROW
from dualpath.kvstore.record import BlockRecord
from dualpath.kvstore.record_columns import NamespaceShape, RecordColumns
from hypothesis import given, settings
from hypothesis import strategies as st

KNOWN, OTHER = b"k" * 16, b"o" * 16


def columns(parents: list[int], places: list[tuple[int, int]] | None = None) -> BlockColumns:
    n = len(parents)
    places = places or [(0, i) for i in range(n)]
    return BlockColumns(
        namespaces=np.zeros(n, np.int32),
        hashes=np.zeros((n, 32), np.uint8),
        hash_bytes=np.full(n, 32, np.uint8),
        parents=np.array(parents, np.int32).reshape(n),
        segments=np.array([p[0] for p in places], np.int32),
        slots=np.array([p[1] for p in places], np.int32),
        generations=np.arange(n, dtype=np.int64),
        used=np.arange(n, dtype=np.int64),
        chunks=np.arange(n, dtype=np.int32) % 3 + 1,
        checksums=np.arange(int((np.arange(n) % 3 + 1).sum()), dtype=np.uint64),
    )


@settings(deadline=None)
@given(st.data())
def test_a_block_is_rooted_if_all_its_ancestors_are_kept(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 40))
    parents = [data.draw(st.integers(GONE, count - 1)) for _ in range(count)]
    kept = [data.draw(st.booleans()) for _ in range(count)]

    def rooted(at: int) -> bool:
        for _ in range(count + 1):
            if at == NO_ROW:
                return True
            if at == GONE or not kept[at]:
                return False
            at = parents[at]
        return False  # a circle

    found = columns(parents).rooted(np.array(kept, np.bool_))
    assert found.tolist() == [rooted(at) for at in range(count)]


def test_a_very_long_chain_is_rooted() -> None:
    count = 100_000
    long = columns(list(range(-1, count - 1)))
    kept = np.ones(count, np.bool_)
    assert long.rooted(kept).all()
    kept[70_000] = False
    assert long.rooted(kept).sum() == 70_000


def test_of_two_blocks_for_a_slot_the_later_is_true() -> None:
    found = columns([-1] * 5, [(0, 1), (0, 2), (0, 1), (1, 1), (0, 1)]).latest_of_slots()
    assert found.tolist() == [False, True, False, True, True]


def test_taking_some_keeps_their_facts_and_parents() -> None:
    whole = columns([-1, 0, 1, 1, 3, GONE])
    part = whole.take(np.array([3, 1, 5, 4]))
    assert part.parents.tolist() == [1, GONE, GONE, 0]
    assert part.generations.tolist() == [3, 1, 5, 4]
    starts = [0, 1, 3, 6, 7, 9, 12]
    expected = [list(range(starts[i], starts[i + 1])) for i in (3, 1, 5, 4)]
    assert part.checksums.tolist() == [value for values in expected for value in values]
    assert part.chunks.tolist() == [len(e) for e in expected]


HASHES = st.binary(min_size=16, max_size=18) | st.binary(min_size=32, max_size=32)
RECORDS = st.builds(
    BlockRecord,
    namespace_id=st.sampled_from([KNOWN, OTHER, b"?" * 16]),
    hash=HASHES,
    parent=st.just(b"") | HASHES,
    length=st.sampled_from([1000, 2000]),
    segment=st.integers(0, 2**31 - 1),
    slot=st.integers(0, 2**31 - 1),
    generation=st.integers(0, 2**62),
    checksums=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3).map(tuple),
    writer=st.text(max_size=5),
    sealed_unix_s=st.floats(0, 2**40),
)
SHAPES = {KNOWN: NamespaceShape(7, 1000, 2), OTHER: NamespaceShape(0, 2000, 3)}


@settings(deadline=None, max_examples=60)
@given(
    records=st.lists(RECORDS, max_size=30, unique_by=lambda record: record.key),
    flips=st.lists(st.tuples(st.integers(0), st.integers(0), st.integers(0, 7)), max_size=4),
    batch=st.integers(1, 40),
)
def test_bulk_decoding_takes_what_decoding_one_by_one_takes(
    records: list[BlockRecord], flips: list[tuple[int, int, int]], batch: int
) -> None:
    pairs = [(record.key, bytearray(record.to_bytes())) for record in records]
    flipped = set()
    for which, where, bit in flips:
        if pairs:
            value = pairs[which % len(pairs)][1]
            value[where % len(value)] ^= 1 << bit
            flipped.add(which % len(pairs))
    decoder = RecordColumns(SHAPES)
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        decoder.add([key for key, _ in part], [bytes(value) for _, value in part])
    found = decoder.finish()
    good = [
        record
        for at, record in enumerate(records)
        if bytes(pairs[at][1]) == record.to_bytes()
        and (shape := SHAPES.get(record.namespace_id)) is not None
        and (shape.block_bytes, shape.chunks) == (record.length, len(record.checksums))
    ]
    assert len(found) == len(good)
    assert sorted(decoder.refused) == sorted({r.key for r in records} - {r.key for r in good})
    assert not decoder.damaged or flipped
    keys = {
        (int(n), h[: int(size)].tobytes()): at
        for at, (n, h, size) in enumerate(
            zip(found.namespaces, found.hashes, found.hash_bytes, strict=True)
        )
    }
    starts = np.concatenate(([0], np.cumsum(found.chunks)))
    for record in good:
        number = SHAPES[record.namespace_id].number
        at = keys[number, record.hash]
        sums = found.checksums[starts[at] : starts[at + 1]].tolist()
        assert tuple(sums) == record.checksums
        assert (found.segments[at], found.slots[at]) == (record.segment, record.slot)
        assert found.generations[at] == record.generation
        above = keys.get((number, record.parent), GONE) if record.parent else NO_ROW
        assert found.parents[at] == above
    assert (np.diff(found.generations) >= 0).all()


def test_a_record_under_another_key_is_refused() -> None:
    record = BlockRecord(KNOWN, b"h" * 32, b"", 1000, 0, 0, 1, (1, 2), "w", 0.0)
    value = record.to_bytes()
    for key in (KNOWN + b"g" * 32, OTHER + b"h" * 32, KNOWN + b"h" * 31, b"x"):
        decoder = RecordColumns(SHAPES)
        decoder.add([key, record.key], [value, value])
        assert decoder.refused == [key]
        assert len(decoder.finish()) == 1
    empty = RecordColumns(SHAPES)
    empty.add([KNOWN + b"h" * 32], [b""])
    assert empty.damaged
    assert len(empty.finish()) == 0


@pytest.mark.parametrize("field", ["segment", "slot"])
def test_a_place_beyond_all_segments_is_kept_for_the_check_of_segments(field: str) -> None:
    record = BlockRecord(KNOWN, b"h" * 32, b"", 1000, 0, 0, 1, (1, 2), "w", 0.0)
    decoder = RecordColumns(SHAPES)
    change: dict[str, Any] = {field: 2**32 - 1}
    wild = dataclasses.replace(record, **change)
    decoder.add([wild.key], [wild.to_bytes()])
    assert getattr(decoder.finish(), field + "s").tolist() == [-1]
