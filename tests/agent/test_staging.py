"""Staging: slots never overlap, sizes are bounded, everything comes back."""

from __future__ import annotations

import pytest
from dualpath.agent.staging import SLAB_BYTES, Slot, Staging
from dualpath.kvstore.layout import CHUNK_BYTES_MIN
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.region import Region
from hypothesis import given, settings
from hypothesis import strategies as st

SIZES = st.integers(1, SLAB_BYTES)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), SIZES, st.integers(0, 1 << 30)), max_size=80))
def test_slots_never_overlap_and_stay_inside(steps: list[tuple[bool, int, int]]) -> None:
    region = Region.of(bytearray(4 * SLAB_BYTES))
    staging = Staging(region)
    held: list[Slot] = []
    for take, nbytes, which in steps:
        if take:
            slot = staging.take(nbytes)
            if slot is None:
                assert staging.used_bytes + SLAB_BYTES > staging.capacity_bytes - 3 * SLAB_BYTES
                continue
            assert slot.nbytes == nbytes
            assert slot.offset >= 0
            assert slot.offset + nbytes <= region.nbytes
            for other in held:
                apart = (
                    slot.offset + slot.nbytes <= other.offset
                    or other.offset + other.nbytes <= slot.offset
                )
                assert apart, (slot, other)
            held.append(slot)
        elif held:
            staging.give_back(held.pop(which % len(held)))
    for slot in held:
        staging.give_back(slot)
    assert staging.used_bytes == 0
    assert all(staging.take(SLAB_BYTES) is not None for _ in range(4))
    assert staging.take(1) is None


def test_small_chunks_share_a_slab_and_a_full_staging_says_none() -> None:
    staging = Staging(Region.of(bytearray(SLAB_BYTES)))
    slots = [staging.take(CHUNK_BYTES_MIN) for _ in range(SLAB_BYTES // CHUNK_BYTES_MIN)]
    assert None not in slots
    assert staging.used_bytes == staging.capacity_bytes == SLAB_BYTES
    assert staging.take(1) is None


@pytest.mark.parametrize("nbytes", [0, -1, SLAB_BYTES + 1])
def test_a_size_out_of_bounds_is_refused(nbytes: int) -> None:
    with pytest.raises(InvalidRequest, match=str(nbytes)):
        Staging(Region.of(bytearray(SLAB_BYTES))).take(nbytes)


def test_a_slot_given_back_twice_is_a_bug_that_shows() -> None:
    staging = Staging(Region.of(bytearray(SLAB_BYTES)))
    first, second = staging.take(1), staging.take(1)
    assert first is not None
    assert second is not None
    staging.give_back(first)
    with pytest.raises(AssertionError, match="twice"):
        staging.give_back(first)
