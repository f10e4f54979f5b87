"""Copies of many blocks: both twins copy and hash alike, and refuse what leaves a buffer."""

from __future__ import annotations

import random

import numpy as np
import pytest
import xxhash
from dualpath.kvstore import block_copy
from dualpath.transfer.errors import InvalidRequest
from hypothesis import example, given, settings
from hypothesis import strategies as st

twins = pytest.mark.parametrize("native", [True, False], ids=["native", "python"])


@pytest.fixture(autouse=True)
def _twin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "native" not in request.fixturenames:
        return
    if request.getfixturevalue("native"):
        if block_copy.native is None:
            pytest.skip("the native extension is not built")
    else:
        monkeypatch.setattr(block_copy, "native", None)


def copied(nbytes: int, chunk_bytes: int, seed: int, *, blocks: int = 2) -> None:
    """Copy blocks at odd offsets and compare bytes, what lies around them, and hashes."""
    rng = random.Random(seed)
    pad = rng.randrange(70)
    source = rng.randbytes(blocks * nbytes + pad)
    target = bytearray(b"\xa5" * (blocks * (nbytes + 64) + pad))
    source_at = np.array([pad + i * nbytes for i in range(blocks)])
    target_at = np.array([pad + i * (nbytes + 64) for i in reversed(range(blocks))])
    sums = block_copy.copy_blocks_hashed(
        memoryview(target), target_at, memoryview(source), source_at, nbytes, chunk_bytes
    )
    expected = bytearray(b"\xa5" * len(target))
    for block, (to, start) in enumerate(zip(target_at.tolist(), source_at.tolist(), strict=True)):
        part = source[start : start + nbytes]
        expected[to : to + nbytes] = part
        assert [int(s) for s in sums[block]] == [
            xxhash.xxh3_64_intdigest(part[i : i + chunk_bytes])
            for i in range(0, nbytes, chunk_bytes)
        ]
    assert target == expected
    plain = bytearray(b"\xa5" * len(target))
    block_copy.copy_blocks(memoryview(plain), target_at, memoryview(source), source_at, nbytes)
    assert plain == expected


@twins
def test_every_short_length_is_copied_and_hashed(native: bool) -> None:
    for nbytes in (*range(1, 700), 1023, 1024, 1025, 1088, 1089, 2048, 2049):
        copied(nbytes, nbytes, nbytes)


@given(nbytes=st.integers(1, 9000), chunk_bytes=st.integers(1, 9000), seed=st.integers(0, 99))
@example(nbytes=4097, chunk_bytes=4096, seed=0)
@settings(max_examples=60, deadline=None)
def test_chunks_are_hashed_each_for_itself(nbytes: int, chunk_bytes: int, seed: int) -> None:
    copied(nbytes, chunk_bytes, seed)


@twins
def test_large_blocks_are_streamed_and_hashed(native: bool) -> None:
    for nbytes in ((1 << 20), (1 << 20) + 13, 300_001):
        copied(nbytes, 256 << 10, nbytes, blocks=3)


@twins
@pytest.mark.parametrize(
    ("target_at", "source_at"),
    [([-1], [0]), ([0], [-8]), ([0], [93]), ([193], [0]), ([1 << 62], [0]), ([0], [(1 << 63) - 1])],
)
def test_an_offset_that_leaves_its_buffer_is_refused_before_anything_is_copied(
    native: bool, target_at: list[int], source_at: list[int]
) -> None:
    target = bytearray(200)
    with pytest.raises(InvalidRequest, match="leave"):
        block_copy.copy_blocks(
            memoryview(target),
            np.array([0, *target_at]),
            memoryview(b"\x01" * 100),
            np.array([0, *source_at]),
            8,
        )
    assert target == bytes(200)


@twins
def test_offsets_that_do_not_match_and_lengths_of_nothing_are_refused(native: bool) -> None:
    target, source = memoryview(bytearray(100)), memoryview(bytes(100))
    two, one = np.array([0, 8]), np.array([0])
    with pytest.raises(InvalidRequest, match="as many"):
        block_copy.copy_blocks(target, two, source, one, 8)
    with pytest.raises(InvalidRequest, match="positive"):
        block_copy.copy_blocks(target, one, source, one, 0)


def test_a_read_only_target_is_refused() -> None:
    with pytest.raises((BufferError, InvalidRequest)):
        block_copy.copy_blocks(
            memoryview(bytes(8)), np.array([0]), memoryview(bytes(8)), np.array([0]), 8
        )


def test_no_blocks_are_no_work() -> None:
    none = np.zeros(0, np.int64)
    target, source = memoryview(bytearray(8)), memoryview(bytes(8))
    sums = block_copy.copy_blocks_hashed(target, none, source, none, 8, 8)
    assert sums.shape == (0, 1)


@twins
def test_blocks_from_buffers_of_their_own_are_copied_and_hashed(native: bool) -> None:
    rng = random.Random(3)
    for nbytes, chunk_bytes in ((70_000, 70_000), (300_001, 100_000), (900, 4096), (4200, 4096)):
        sources = [rng.randbytes(nbytes) for _ in range(5)]
        target = memoryview(bytearray(6 * nbytes))
        at = np.array([4, 0, 1, 5, 3]) * nbytes
        views: list[bytearray | memoryview] = [bytearray(sources[0])]
        views += [memoryview(source) for source in sources[1:]]
        sums = block_copy.gather_blocks_hashed(target, at, views, nbytes, chunk_bytes)
        for source, start, chunks in zip(sources, at.tolist(), sums.tolist(), strict=True):
            assert target[start : start + nbytes] == source
            assert chunks == [
                xxhash.xxh3_64_intdigest(source[i : i + chunk_bytes])
                for i in range(0, nbytes, chunk_bytes)
            ]
        assert not any(target[2 * nbytes : 3 * nbytes])


@twins
def test_sources_of_another_size_or_number_are_refused(native: bool) -> None:
    target, block = memoryview(bytearray(4096)), bytes(1024)
    for at, sources in (
        ([0, 1024], [block]),
        ([0], [block, block]),
        ([0, 1024], [block, block[1:]]),
        ([3073], [block]),
        ([-1], [block]),
    ):
        with pytest.raises(InvalidRequest, match="cannot be copied"):
            block_copy.gather_blocks_hashed(target, np.array(at), sources, 1024, 1024)
    assert not any(target)
    assert block_copy.gather_blocks_hashed(target, np.array([], int), [], 1024, 1024).shape == (
        0,
        1,
    )
