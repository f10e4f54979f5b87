"""Strided ranges cover exactly the bytes that they describe, however they are cut and copied."""

from __future__ import annotations

import pytest
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.region import Region
from dualpath.transfer.slice_copy import UNLOCKED_BYTES_MIN, buffers, copy_slices
from dualpath.transfer.slices import Slices
from hypothesis import given
from hypothesis import strategies as st

SPAN = 4096


@st.composite
def slices(draw: st.DrawFn, nbytes: int | None = None) -> Slices:
    length = draw(st.integers(1, 60))
    count = draw(st.integers(1, 20))
    stride = length + draw(st.integers(0, 60))
    skip = draw(st.integers(0, length * count))
    size = draw(st.integers(0, length * count - skip)) if nbytes is None else nbytes
    return Slices(draw(st.integers(0, 500)), stride, count, length, skip, size)


def offsets(these: Slices) -> list[int]:
    whole = [
        these.base + index * these.stride + at
        for index in range(these.count)
        for at in range(these.length)
    ]
    return whole[these.skip : these.skip + these.nbytes]


@given(slices())
def test_pieces_are_the_bytes_one_by_one(these: Slices) -> None:
    pieces = list(these.pieces())
    assert [at + i for at, nbytes in pieces for i in range(nbytes)] == offsets(these)
    assert len(pieces) == these.piece_count
    if these.nbytes:
        assert (these.start, these.end) == (min(offsets(these)), max(offsets(these)) + 1)


@given(slices(), st.data())
def test_a_part_is_a_part(these: Slices, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, these.nbytes))
    nbytes = data.draw(st.integers(0, these.nbytes - offset))
    assert offsets(these.part(offset, nbytes)) == offsets(these)[offset : offset + nbytes]
    with pytest.raises(InvalidRequest):
        these.part(offset, these.nbytes - offset + 1)


@given(slices(), slices())
def test_a_copy_moves_each_byte_to_its_place(source: Slices, target: Slices) -> None:
    nbytes = min(source.nbytes, target.nbytes)
    source, target = source.part(0, nbytes), target.part(target.nbytes - nbytes, nbytes)
    from_ = bytes(i * 7 % 251 for i in range(SPAN))
    to = bytearray(SPAN)
    copy_slices(memoryview(to), target, memoryview(from_), source)
    expected = bytearray(SPAN)
    for at, back in zip(offsets(target), offsets(source), strict=True):
        expected[at] = from_[back]
    assert to == expected


@given(slices(), st.integers(1, 5))
def test_buffers_are_the_first_pieces(these: Slices, limit: int) -> None:
    memory = bytes(i % 251 for i in range(SPAN))
    found = b"".join(buffers(memoryview(memory), these, limit))
    wanted = bytes(memory[at] for at in offsets(these))
    assert wanted.startswith(found)
    assert len(found) == len(wanted) or these.piece_count > limit


def test_large_pieces_are_copied_whole() -> None:
    nbytes = UNLOCKED_BYTES_MIN * 3 + 1
    source, target = Region.anonymous(nbytes), Region.anonymous(nbytes)
    source.view[:] = bytes(i % 253 for i in range(nbytes))
    whole = Slices.contiguous(0, nbytes)
    copy_slices(target.view, whole, source.view, whole)
    assert target.view == source.view
    target.close()
    source.close()


@pytest.mark.parametrize(
    "fields", [(-1, 1, 1, 1, 0, 1), (0, 1, 2, 2, 0, 4), (0, 4, 2, 2, 1, 4), (0, 0, 0, 0, 0, 1)]
)
def test_impossible_ranges_are_refused(fields: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest):
        Slices(*fields)
