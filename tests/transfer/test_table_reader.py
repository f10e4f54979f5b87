"""The pieces of a table's bytes: in order, none twice, adjoining ones as one."""

from __future__ import annotations

from dualpath.transfer.slice_table import SliceTable, TableReader
from hypothesis import given
from hypothesis import strategies as st

MEMORY = memoryview(bytes(range(256)) * 8)


@st.composite
def tables(draw: st.DrawFn) -> SliceTable:
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=12))
    gaps = draw(st.lists(st.sampled_from([0, 0, 5]), min_size=len(sizes), max_size=len(sizes)))
    offsets, at = [], 0
    for size, gap in zip(sizes, gaps, strict=True):
        offsets.append(at)
        at += size + gap
    order = draw(st.permutations(range(len(sizes))))
    return SliceTable.contiguous([offsets[i] for i in order], [sizes[i] for i in order])


@given(tables(), st.data())
def test_pieces_are_the_bytes_asked_for_in_order(table: SliceTable, data: st.DataObject) -> None:
    whole = b"".join(
        bytes(MEMORY[base : base + size])
        for base, size in zip(table.bases, table.sizes, strict=True)
    )
    offset = data.draw(st.integers(0, len(whole) - 1))
    nbytes = data.draw(st.integers(1, len(whole) - offset))
    limit = data.draw(st.integers(1, 14))
    pieces = TableReader(table).buffers(MEMORY, offset, nbytes, limit)
    assert 1 <= len(pieces) <= limit
    got = b"".join(pieces)
    assert whole[offset : offset + nbytes].startswith(got)
    if limit > len(table):
        assert len(got) == nbytes


def test_parts_that_adjoin_are_one_piece() -> None:
    table = SliceTable.contiguous([10, 20, 30, 50], [10, 10, 10, 10])
    pieces = TableReader(table).buffers(MEMORY, 5, 35, 64)
    assert [len(piece) for piece in pieces] == [25, 10]
