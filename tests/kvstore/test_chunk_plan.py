"""Planning a batch, and hashing it: what the arrays say is what a plain loop would say."""

from __future__ import annotations

import random

import numpy as np
import pytest
import xxhash
from dualpath.kvstore import checksum
from dualpath.kvstore.chunk_plan import (
    READ_BYTES_AIM,
    chunk_keys,
    distinct,
    distinct_rows,
    extents,
    plan_reads,
    runs,
)
from dualpath.kvstore.layout import KVLayout
from hypothesis import given
from hypothesis import strategies as st

layouts = st.builds(
    KVLayout,
    layers=st.integers(1, 64),
    block_tokens=st.just(16),
    layer_bytes=st.integers(1, 1 << 20),
    dtype=st.just("bf16"),
)


@given(layouts, st.data())
def test_reads_join_neighbours_and_nothing_else(layout: KVLayout, data: st.DataObject) -> None:
    last = layout.chunk_count - 1
    item = st.tuples(st.integers(0, 3), st.integers(0, last), st.booleans(), st.booleans())
    ordered = [(row, chunk, True, True) for row in range(3) for chunk in range(min(last, 9) + 1)]
    items = data.draw(st.one_of(st.lists(item, min_size=1, max_size=30), st.just(ordered)))
    rows, chunks = (np.array([i[k] for i in items], np.int32) for k in (0, 1))
    needed, buffered = (np.array([i[k] for i in items], np.bool_) for k in (2, 3))
    inside, nbytes = extents(layout, chunks)
    for index, (_, chunk, _, _) in enumerate(items):
        assert (int(inside[index]), int(nbytes[index])) == layout.chunk_extent(chunk)
    reads = plan_reads(
        layout.chunk_bytes, chunk_keys(rows, chunks), chunks, inside, nbytes, needed, buffered
    )
    served: list[int] = []
    for read in range(len(reads)):
        first, count = int(reads.first[read]), int(reads.count[read])
        mine = list(range(first, first + count))
        served += mine
        assert all(reads.of_item[index] == read for index in mine)
        assert len({(items[index][0], items[index][3]) for index in mine}) == 1
        assert [items[index][1] for index in mine] == list(
            range(items[first][1], items[first][1] + count)
        )
        whole = sum(int(nbytes[index]) for index in mine)
        assert whole <= int(reads.nbytes[read]) < whole + 4096
        assert count == 1 or whole <= READ_BYTES_AIM
    assert served == [index for index in range(len(items)) if items[index][2]]
    assert all(reads.of_item[index] == -1 for index in range(len(items)) if not items[index][2])
    assert runs(reads.first, reads.count).tolist() == served


@given(st.lists(st.integers(0, 20), max_size=40), st.booleans())
def test_distinct_rows_are_each_there_once(values: list[int], ascending: bool) -> None:
    rows = np.array(sorted(values) if ascending else values, np.int32)
    found, of_item = distinct_rows(rows)
    assert sorted(found.tolist()) == sorted(set(values))
    assert found[of_item].tolist() == rows.tolist()
    assert sorted(distinct(rows)) == sorted(set(values))


@pytest.mark.parametrize("native", [True, False])
def test_extents_are_hashed_as_one_by_one(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(checksum, "native", None)
    dice = random.Random(11)
    memory = memoryview(bytearray(dice.randbytes(1 << 20)))
    sizes = [*range(1, 600, 7), *range(1000, 1100), 4096, 65536, 262144, 300000, 1 << 20]
    at = [dice.randint(0, memory.nbytes - size) for size in sizes]
    for some in (slice(None), slice(60, None)):
        starts, lengths = np.array(at[some], np.int64), np.array(sizes[some], np.int64)
        sums = checksum.of_extents(memory, starts, lengths)
        assert sums.tolist() == [
            xxhash.xxh3_64_intdigest(memory[start : start + size])
            for start, size in zip(at[some], sizes[some], strict=True)
        ]
    assert len(checksum.of_extents(memory, starts[:0], lengths[:0])) == 0
    for start, size in ((1, 1 << 20), (-1, 500), (0, 1 << 40), (2**62, 2**62)):
        with pytest.raises(ValueError, match="extent"):
            checksum.of_extents(memory, np.array([start]), np.array([size]))
