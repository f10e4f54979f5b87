"""Rows are gathered alike natively and in numpy, and nothing outside of the columns is touched."""

from __future__ import annotations

import numpy as np
import pytest
from dualpath.kvstore import row_gather
from dualpath.kvstore.row_gather import Gathered, gather_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

ROWS = 50
native_only = pytest.mark.skipif(
    row_gather.native_gather is None, reason="the native extension is not built"
)


class Columns:
    """A table's columns with checksums that tell rows apart."""

    def __init__(self, chunks: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.leases = rng.integers(0, 5, ROWS).astype(np.int32)
        self.resident = rng.integers(0, 2, ROWS).astype(np.bool_)
        self.checksum_rows = rng.permutation(ROWS).astype(np.int32)
        self.values = rng.integers(0, 1 << 63, (ROWS, chunks)).astype(np.uint64)

    def gather(self, rows: NDArray[np.int32], *, lease: bool) -> Gathered:
        return gather_rows(
            rows, self.leases, self.resident, self.checksum_rows, self.values, lease=lease
        )


@given(
    chunks=st.integers(1, 64),
    seed=st.integers(0, 1000),
    rows=st.lists(st.integers(0, ROWS - 1), unique=True),
    lease=st.booleans(),
    native=st.booleans(),
)
@settings(deadline=None)
def test_tiers_checksums_and_leases_are_those_of_the_rows(
    chunks: int, seed: int, rows: list[int], lease: bool, native: bool
) -> None:
    columns, before = Columns(chunks, seed), Columns(chunks, seed)
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(row_gather, "native_gather", None)
        gathered = columns.gather(np.array(rows, np.int32), lease=lease)
    assert gathered.tiers.tolist() == [int(not before.resident[row]) for row in rows]
    assert gathered.in_dram == sum(bool(before.resident[row]) for row in rows)
    expected = before.values[before.checksum_rows[rows]] if rows else np.empty((0, chunks))
    assert np.array_equal(gathered.checksums, expected)
    before.leases[rows] += lease
    assert np.array_equal(columns.leases, before.leases)


@native_only
@pytest.mark.parametrize("rows", [[-1], [ROWS], [1, 2, 1 << 30]])
def test_a_row_outside_of_the_table_is_refused_and_nothing_changes(rows: list[int]) -> None:
    columns, before = Columns(2, 0), Columns(2, 0)
    with pytest.raises(ValueError, match="outside"):
        columns.gather(np.array(rows, np.int32), lease=True)
    assert np.array_equal(columns.leases, before.leases)


@native_only
@pytest.mark.parametrize("at", [-1, ROWS])
def test_a_row_without_checksums_is_refused_and_nothing_changes(at: int) -> None:
    columns, before = Columns(2, 0), Columns(2, 0)
    columns.checksum_rows[3] = at
    with pytest.raises(ValueError, match="no checksums"):
        columns.gather(np.array([1, 3], np.int32), lease=True)
    assert np.array_equal(columns.leases, before.leases)


@native_only
def test_columns_of_other_lengths_are_refused() -> None:
    columns = Columns(2, 0)
    columns.leases = columns.leases[:-1]
    with pytest.raises(ValueError, match="lengths"):
        columns.gather(np.array([0], np.int32), lease=False)
