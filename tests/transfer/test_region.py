"""Regions are what they say, and a peer's memory is checked before it is mapped."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from dualpath.transfer.errors import InvalidRequest, Unavailable
from dualpath.transfer.region import Region, RegionDescriptor
from hypothesis import given
from hypothesis import strategies as st

U64 = st.integers(0, (1 << 64) - 1)


@given(U64, st.integers(0, (1 << 32) - 1), U64, U64)
def test_a_descriptor_comes_back_from_its_bytes(
    key: int, generation: int, offset: int, nbytes: int
) -> None:
    descriptor = RegionDescriptor(key, generation, offset, nbytes)
    assert RegionDescriptor.from_bytes(descriptor.to_bytes()) == descriptor


@given(st.binary(max_size=80))
def test_other_bytes_are_no_descriptor(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        RegionDescriptor.from_bytes(data)


def test_memfd_bytes_are_seen_through_a_second_mapping_that_cannot_write() -> None:
    mine = Region.memfd("test", 8192)
    theirs = Region.received(os.dup(mine.fd), 8192, writable=False)
    mine.view[4096:4100] = b"seen"
    assert bytes(theirs.view[4096:4100]) == b"seen"
    assert theirs.read_only
    with pytest.raises(TypeError):
        theirs.view[0] = 1
    theirs.close()
    mine.close()


def test_after_forbidding_writers_a_peer_can_map_for_reading_only() -> None:
    mine = Region.memfd("test", 4096)
    mine.forbid_new_writers()
    mine.view[0] = 7
    with pytest.raises((InvalidRequest, OSError)):
        Region.received(os.dup(mine.fd), 4096, writable=True)
    assert Region.received(os.dup(mine.fd), 4096, writable=False).view[0] == 7


def test_unsealed_short_or_foreign_descriptors_are_refused_and_closed() -> None:
    unsealed = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 4096)
    assert_refused(unsealed, 4096, "F_SEAL_SHRINK")
    sealed = Region.memfd("test", 4096)
    assert_refused(os.dup(sealed.fd), 8192, "8192")
    assert_refused(os.open("/dev/null", os.O_RDONLY), 4096, "memfd")
    sealed.close()


def assert_refused(fd: int, nbytes: int, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        Region.received(fd, nbytes, writable=False)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_an_empty_region_is_refused(nbytes: int) -> None:
    for make in (Region.anonymous, lambda n: Region.memfd("test", n)):
        with pytest.raises(InvalidRequest):
            make(nbytes)


def test_serials_tell_regions_apart_and_closing_frees_the_descriptor() -> None:
    first, second = Region.memfd("test", 4096), Region.anonymous(4096)
    first.prefault()
    assert first.serial != second.serial
    fd = first.fd
    first.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    second.close()


@pytest.mark.parametrize("make", [Region.anonymous, lambda nbytes: Region.memfd("test", nbytes)])
def test_memory_that_the_machine_does_not_have_is_refused_by_size(
    make: Callable[[int], Region],
) -> None:
    with pytest.raises(Unavailable, match=str(1 << 50)) as caught:
        make(1 << 50)
    assert caught.value.reason == "no_memory"
