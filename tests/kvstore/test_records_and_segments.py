"""Records, headers and superblocks: what is written is read back, damage is noticed."""

from __future__ import annotations

import struct
import zlib

import pytest
from dualpath.kvstore.device import ALIGN_BYTES, MemoryDevice
from dualpath.kvstore.record import HEADER_BYTES, BlockRecord
from dualpath.kvstore.segment import (
    SegmentGeometry,
    is_blank,
    read_headers,
    read_superblock,
    write_headers,
    write_superblock,
)
from dualpath.transfer.errors import Corrupt, InvalidRequest
from hypothesis import given
from hypothesis import strategies as st

U64 = st.integers(0, 2**64 - 1)
HASHES = st.binary(min_size=16, max_size=32)
RECORDS = st.builds(
    BlockRecord,
    namespace_id=st.binary(min_size=16, max_size=16),
    hash=HASHES,
    parent=st.one_of(st.just(b""), HASHES),
    length=st.integers(1, 2**26),
    segment=st.integers(0, 2**31),
    slot=st.integers(0, 2**20),
    generation=U64,
    checksums=st.lists(U64, min_size=1, max_size=64).map(tuple),
    writer=st.text("abc:/-.", max_size=96),
    sealed_unix_s=st.floats(0, 1e10),
)


@given(RECORDS)
def test_a_record_comes_back_from_both_its_forms(record: BlockRecord) -> None:
    assert BlockRecord.from_bytes(record.to_bytes()) == record
    assert len(record.to_header()) == HEADER_BYTES
    assert BlockRecord.from_bytes(record.to_header()) == record


@given(RECORDS, st.integers(0, 10_000), st.integers(1, 255))
def test_any_flipped_byte_is_noticed(record: BlockRecord, at: int, flip: int) -> None:
    data = bytearray(record.to_bytes())
    data[at % len(data)] ^= flip
    with pytest.raises(Corrupt):
        BlockRecord.from_bytes(bytes(data))


@given(RECORDS, st.integers(0, 10_000))
def test_a_cut_record_is_noticed(record: BlockRecord, at: int) -> None:
    data = record.to_bytes()
    with pytest.raises(Corrupt):
        BlockRecord.from_bytes(data[: at % len(data)])


@given(st.binary(max_size=2000))
def test_noise_is_no_record(noise: bytes) -> None:
    with pytest.raises(Corrupt):
        BlockRecord.from_bytes(b"dpb1" + noise)


def test_a_writer_name_of_many_bytes_is_cut() -> None:
    record = BlockRecord(b"n" * 16, b"h" * 16, b"", 1, 0, 0, 1, (5,), "ü" * 200, 0.0)
    assert len(record.to_header()) == HEADER_BYTES
    assert BlockRecord.from_bytes(record.to_header()).writer.startswith("ü" * 48)


def _record(slot: int, mark: int) -> BlockRecord:
    return BlockRecord(b"n" * 16, bytes([mark]) * 32, b"", 10, 4, slot, mark, (mark,), "w", 1.0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 255)), max_size=30))
def test_headers_keep_their_neighbours(writes: list[tuple[int, int]]) -> None:
    geometry = SegmentGeometry(ALIGN_BYTES, 10)
    file = MemoryDevice().create("s", geometry.file_bytes)
    model: dict[int, BlockRecord] = {}
    for start in range(0, len(writes), 3):
        batch = {slot: _record(slot, mark) for slot, mark in writes[start : start + 3]}
        write_headers(file, geometry, batch)
        model |= batch
    assert {record.slot: record for record in read_headers(file, geometry)} == model


def test_a_superblock_comes_back_and_its_damage_is_noticed() -> None:
    device = MemoryDevice()
    geometry = SegmentGeometry(2 * ALIGN_BYTES, 3)
    file = device.create("segment", geometry.file_bytes)
    assert is_blank(file)
    write_superblock(file, 7, geometry)
    assert not is_blank(file)
    assert read_superblock(file, 7, "segment") == geometry
    with pytest.raises(Corrupt, match="names segment 7"):
        read_superblock(file, 8, "segment")
    good = bytes(device.files["segment"][:28])
    for at in range(28):
        device.files["segment"][at] ^= 1
        with pytest.raises(Corrupt, match="damaged"):
            read_superblock(file, 7, "segment")
        device.files["segment"][:28] = good


def test_a_newer_segment_format_is_refused_by_name() -> None:
    device = MemoryDevice()
    file = device.create("segment", 10 * ALIGN_BYTES)
    body = struct.pack("<8sIIII", b"dpsegmt\0", 9, 0, ALIGN_BYTES, 1)
    device.files["segment"][: len(body) + 4] = body + struct.pack("<I", zlib.crc32(body))
    with pytest.raises(InvalidRequest, match=r"format 9.*upgrade"):
        read_superblock(file, 0, "segment")


def test_a_truncated_segment_is_refused() -> None:
    device = MemoryDevice()
    file = device.create("segment", 4 * ALIGN_BYTES)
    write_superblock(file, 0, SegmentGeometry(ALIGN_BYTES, 100))
    with pytest.raises(Corrupt, match="truncated"):
        read_superblock(file, 0, "segment")
