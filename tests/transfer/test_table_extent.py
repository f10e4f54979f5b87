"""What a table covers: native and in Python alike, and its bytes come back."""

from __future__ import annotations

from array import array
from types import ModuleType

import pytest
from dualpath.transfer import table_extent_twin
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.slice_table import PART_BYTES, SliceTable
from hypothesis import given, settings
from hypothesis import strategies as st

try:
    from dualpath.transfer import _native
except ImportError:
    _native = None  # type: ignore[assignment]

QUIET = settings(max_examples=150, deadline=None)
NUMBERS = st.one_of(st.integers(0, 100), st.integers(0, (1 << 64) - 1))


@pytest.fixture(params=["native", "python"], scope="module")
def measurer(request: pytest.FixtureRequest) -> ModuleType:
    if request.param == "python":
        return table_extent_twin
    if _native is None:
        pytest.skip("the native extension is not built")
    return _native


@st.composite
def tables(draw: st.DrawFn) -> SliceTable:
    length, count = draw(st.integers(1, 300)), draw(st.integers(1, 5))
    stride = length + draw(st.sampled_from([0, 1, 100]))
    rows = [
        (draw(st.integers(0, 10_000)), skip, draw(st.integers(0, length * count - skip)))
        for skip in draw(st.lists(st.integers(0, length), min_size=1, max_size=8))
    ]
    bases, skips, sizes = zip(*rows, strict=True)
    return SliceTable(stride, count, length, bases, skips, sizes)


@QUIET
@given(tables())
def test_an_extent_is_that_of_all_pieces(measurer: ModuleType, table: SliceTable) -> None:
    nbytes, least, most, start, end = measurer.extent_of(
        table.stride, table.count, table.length, table.bases, table.skips, table.sizes
    )
    assert (nbytes, least, most) == (sum(table.sizes), min(table.sizes), max(table.sizes))
    pieces = [piece for part in range(len(table)) for piece in table.part(part).pieces()]
    if pieces:
        assert start == min(at for at, _ in pieces)
        assert end == max(at + size for at, size in pieces)
    else:
        assert start == end


@QUIET
@given(
    st.tuples(NUMBERS, NUMBERS, NUMBERS),
    st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=4),
)
def test_any_numbers_have_the_same_extent_or_are_refused_by_both(
    shape: tuple[int, int, int], rows: list[tuple[int, int, int]]
) -> None:
    if _native is None:
        pytest.skip("the native extension is not built")
    columns = [array("Q", column) for column in zip(*rows, strict=True)]
    found = []
    for measurer in (_native, table_extent_twin):
        try:
            found.append(measurer.extent_of(*shape, *columns))
        except ValueError:
            found.append(None)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("shape", "rows", "why"),
    [
        ((1, 1, 1), ([0], [0], [2]), "beyond its 1 slices"),
        ((1, 1, 1), ([0], [2], [0]), "beyond its 1 slices"),
        ((9, 2, 10), ([0], [0], [20]), "overlap"),
        ((1, 1, 1), ([(1 << 64) - 1], [0], [1]), "64 bits"),
        ((1 << 63, 3, 1), ([0], [2], [1]), "64 bits"),
        ((1, 1, 1 << 63), ([0, 0], [0, 0], [1 << 63, 1 << 63]), "64 bits"),
        ((1, 1, 1), ([0, 0], [0], [1]), "as many"),
        ((1, 1, 1), ([], [], []), "at least one"),
    ],
)
def test_what_is_no_table_is_refused_by_name(
    measurer: ModuleType,
    shape: tuple[int, int, int],
    rows: tuple[list[int], list[int], list[int]],
    why: str,
) -> None:
    with pytest.raises(ValueError, match=why):
        measurer.extent_of(*shape, *(array("Q", each) for each in rows))


@pytest.mark.parametrize("value", [-1, 1 << 64])
@pytest.mark.parametrize("field", range(6))
def test_a_field_that_is_no_64_bit_number_is_the_callers_mistake(field: int, value: int) -> None:
    fields: list[object] = [1, 1, 1, [0], [0], [1]]
    fields[field] = value if field < 3 else [value]
    with pytest.raises(InvalidRequest):
        SliceTable(*fields)  # type: ignore[arg-type]


@QUIET
@given(tables(), st.data())
def test_a_table_comes_back_from_its_bytes(table: SliceTable, data: st.DataObject) -> None:
    shape = (table.stride, table.count, table.length)
    raw = table.to_bytes()
    assert len(raw) == PART_BYTES * len(table)
    assert SliceTable.from_bytes(*shape, raw) == table
    places = table.places_to_bytes()
    assert SliceTable.from_bytes(*shape, memoryview(places), table.sizes) == table
    cut = data.draw(st.integers(0, len(places) - 1))
    with pytest.raises(InvalidRequest):
        SliceTable.from_bytes(*shape, places[:cut], table.sizes)


@QUIET
@given(tables(), st.data())
def test_parts_are_those_of_another_table_if_they_have_the_same_fields(
    table: SliceTable, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(table) - 1))
    last = data.draw(st.integers(first + 1, len(table)))
    other = table.parts(first, last)
    if data.draw(st.booleans()):  # one slice can be named in many ways
        moved = [base + skip for base, skip in zip(other.bases, other.skips, strict=True)]
        length = other.length + 7
        if table.count == 1:
            other = SliceTable(length, 1, length, moved, [0] * len(moved), other.sizes)
    column = data.draw(st.sampled_from(["none", "bases", "sizes"]))
    if column == "bases":
        bases = [other.bases[0] + 1, *other.bases[1:]]
        shape = (other.stride, other.count, other.length)
        other = SliceTable(*shape, bases, other.skips, other.sizes)
    same = list(table.fields())[first:last] == list(other.fields())
    assert table.has(first, other) == same
    assert [table.fields_of(part) for part in range(len(table))] == list(table.fields())
