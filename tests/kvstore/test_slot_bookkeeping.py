"""Slots never overlap, never leak, and come back."""

from __future__ import annotations

import pytest
from dualpath.kvstore.segment import SegmentGeometry
from dualpath.kvstore.slab_space import SlabSpace
from dualpath.kvstore.slot_allocator import SlotAllocator
from hypothesis import given
from hypothesis import strategies as st

SIZES = st.sampled_from([4096, 8192, 12288, 40960, 303104])


@given(
    st.integers(4096, 4 << 20).map(lambda n: n // 4096 * 4096),
    st.lists(st.tuples(st.booleans(), SIZES, st.integers(0, 100)), max_size=80),
)
def test_slots_of_a_space_lie_apart_and_inside(
    nbytes: int, steps: list[tuple[bool, int, int]]
) -> None:
    base = 1 << 20
    space = SlabSpace(base, nbytes)
    held: dict[int, int] = {}
    for take, size, pick in steps:
        if take:
            offset = space.take(size)
            if offset < 0:
                continue
            assert base <= offset <= base + nbytes - size
            assert offset % 4096 == 0
            assert all(offset + size <= o or o + s <= offset for o, s in held.items())
            held[offset] = size
        elif held:
            offset = list(held)[pick % len(held)]
            space.give(offset)
            del held[offset]
    assert space.used_bytes == sum(held.values())
    for offset in held:
        space.give(offset)
    assert space.used_bytes == 0
    whole = space.capacity_bytes // 4096 * 4096
    assert space.take(whole) == base


def test_a_space_serves_another_size_once_the_first_is_gone() -> None:
    space = SlabSpace(0, 1 << 20)
    offsets = []
    while (offset := space.take(4096)) >= 0:
        offsets.append(offset)
    assert len(offsets) == 256
    assert space.take(1 << 20) == -1
    for offset in offsets:
        space.give(offset)
    assert space.take(1 << 20) == 0


def test_slots_of_a_class_fill_most_of_the_space() -> None:
    space = SlabSpace(0, 64 << 20)
    size, count = 303104, 0
    while space.take(size) >= 0:
        count += 1
    assert count * size >= 0.85 * (64 << 20)


@given(st.lists(st.integers(0, 99), max_size=60))
def test_an_allocator_gives_each_slot_once(steps: list[int]) -> None:
    allocator = SlotAllocator()
    allocator.add(7, 4096, 5, taken=[1])
    allocator.add(9, 4096, 3)
    held: list[tuple[int, int]] = [(7, 1)]
    for step in steps:
        if step % 2:
            place = allocator.take(4096)
            assert (place is None) == (len(held) == 8)
            if place is not None:
                assert place not in held
                held.append(place)
        elif held:
            allocator.give(*held.pop(step % len(held)))
        assert allocator.used_bytes == 4096 * len(held)
    for place in held:
        allocator.give(*place)
    assert sorted(allocator.empty_extents()) == [7, 9]
    allocator.remove(7)
    assert allocator.take(8192) is None


def test_fresh_slots_come_in_order_and_a_double_give_is_caught() -> None:
    allocator = SlotAllocator()
    allocator.add(0, 4096, 4)
    assert [allocator.take(4096) for _ in range(4)] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    allocator.give(0, 2)
    with pytest.raises(AssertionError):
        allocator.give(0, 2)


@given(SIZES, st.integers(0, 8 << 20))
def test_a_segment_fits_its_file_and_wastes_less_than_a_slot(slot: int, most: int) -> None:
    geometry = SegmentGeometry.fitting(slot, most)
    if geometry is None:
        assert most < SegmentGeometry(slot, 1).file_bytes
        return
    assert geometry.file_bytes <= most
    assert SegmentGeometry(slot, geometry.slots + 1).file_bytes > most
    offset, inside = geometry.header_page(geometry.slots - 1)
    assert offset + inside + 1024 <= geometry.data_offset
