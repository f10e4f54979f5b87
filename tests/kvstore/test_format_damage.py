"""Damaged, foreign and newer data directories: refused by name, or served without the damage."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.directory_format import (
    ASIDE_MAX,
    STORE_FORMAT,
    _summed,
    read_clean,
    read_meta,
)
from dualpath.kvstore.index_sums import SUMS_KEY
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.store_api import SealStatus
from dualpath.transfer.errors import Corrupt, DualPathError, InvalidRequest

Content = Callable[[bytes, int], bytes]
SIZE = 300_000
BLOCKS = 8
CONFIG = StoreConfig(disk_bytes=16 << 20, dram_bytes=4 << 20, segment_bytes=2 << 20)
HASHES = chain_hashes(range(16 * BLOCKS), 16)


@pytest.fixture
def data(tmp_path: Path, namespace: Namespace, content: Content) -> Path:
    """A cleanly closed store of one chain."""
    path = tmp_path / "data"
    with BlockStore.open(path, CONFIG) as store:
        space = store.open_namespace(namespace)
        blocks = [content(h, SIZE) for h in HASHES]
        statuses = store.put(space, HASHES, parents_of(HASHES), blocks)
        assert set(statuses) == {SealStatus.SEALED}
    return path


def served(path: Path, namespace: Namespace, content: Content) -> int:
    """Blocks that a reopened store serves, all right; it must also take them again."""
    with BlockStore.open(path, CONFIG) as store:
        space = store.open_namespace(namespace)
        found = store.get(space, HASHES)
        assert found == [content(h, SIZE) for h in HASHES[: len(found)]]
        blocks = [content(h, SIZE) for h in HASHES]
        store.put(space, HASHES, parents_of(HASHES), blocks)
        assert store.get(space, HASHES) == blocks
    return len(found)


def change_records(
    path: Path, change: Callable[[bytes, bytes], bytes | None], *, keep_sums: bool = False
) -> None:
    """Change records; unless `keep_sums`, as in an index of format 1, which has no sums."""
    with (
        lmdb.open(str(path / "index"), map_size=64 << 20, lock=False) as env,
        env.begin(write=True) as txn,
    ):
        if not keep_sums:
            txn.delete(SUMS_KEY)
        for key, value in list(txn.cursor()):
            if key == SUMS_KEY:
                continue
            new = change(key, value)
            if new is None:
                txn.delete(key)
            else:
                txn.put(key, new)


def test_an_untouched_store_serves_everything(
    data: Path, namespace: Namespace, content: Content
) -> None:
    assert served(data, namespace, content) == BLOCKS


def test_a_newer_format_is_refused_by_name(data: Path) -> None:
    good = (data / "META").read_text()
    meta = json.loads(good)
    (data / "META").write_bytes(_summed(meta | {"format": 7}))
    with pytest.raises(
        InvalidRequest, match=rf"format 7.*reads up to {STORE_FORMAT}.*upgrade"
    ) as refused:
        BlockStore.open(data, CONFIG)
    assert refused.value.reason == "newer_format"
    (data / "META").write_text(good)
    BlockStore.open(data, CONFIG).close()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"product": "other"}', '{"product": "dualpath-store"}', "\xff\x00"]
)
def test_a_damaged_meta_is_refused_with_the_remedy(data: Path, text: str) -> None:
    (data / "META").write_text(text)
    with pytest.raises(Corrupt, match=r"META.*(restore|choose)"):
        BlockStore.open(data, CONFIG)


def test_a_foreign_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidRequest, match=r"thesis\.txt.*empty directory"):
        BlockStore.open(tmp_path, CONFIG)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InvalidRequest, match="choose another"):
        BlockStore.open(file, CONFIG)


def test_a_record_with_a_flipped_byte_ends_the_prefix_there(
    data: Path, namespace: Namespace, content: Content
) -> None:
    def flip(key: bytes, value: bytes) -> bytes:
        if not key.endswith(HASHES[5]):
            return value
        return value[:40] + bytes([value[40] ^ 4]) + value[41:]

    change_records(data, flip)
    assert served(data, namespace, content) == 5


def test_orphans_are_dropped_and_leave_no_trace(
    data: Path, namespace: Namespace, content: Content
) -> None:
    change_records(data, lambda key, value: None if key.endswith(HASHES[3]) else value)
    with BlockStore.open(data, CONFIG) as store:
        assert (store.recovered.blocks, store.recovered.dropped) == (3, BLOCKS - 4)
    with BlockStore.open(data, CONFIG) as store:
        assert (store.recovered.blocks, store.recovered.dropped) == (3, 0)
    assert served(data, namespace, content) == 3


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_of_the_index_file_never_serves_a_wrong_block(
    data: Path, namespace: Namespace, content: Content, seed: int
) -> None:
    dice = random.Random(seed)
    file = data / "index" / "data.mdb"
    raw = bytearray(file.read_bytes())
    if seed % 4 == 0:
        raw = raw[: dice.randrange(len(raw))]
    else:
        for _ in range(dice.choice([1, 20, 400])):
            raw[dice.randrange(len(raw))] ^= dice.randrange(1, 256)
    file.write_bytes(raw)
    served(data, namespace, content)


@pytest.mark.parametrize("damage", ["flipped", "lost", "doubled"])
def test_records_that_do_not_add_up_bring_the_headers_in(
    data: Path, namespace: Namespace, content: Content, damage: str
) -> None:
    before = b""

    def change(key: bytes, value: bytes) -> bytes | None:
        nonlocal before
        before, last = value, before
        if not key.endswith(HASHES[3]):
            return value
        return {"flipped": value[:60] + b"?" + value[61:], "lost": None, "doubled": last}[damage]

    change_records(data, change, keep_sums=True)
    with BlockStore.open(data, CONFIG) as store:
        assert store.recovered.rebuilt
        assert store.recovered.blocks == BLOCKS
    assert served(data, namespace, content) == BLOCKS


def test_a_flipped_byte_in_an_index_that_was_closed_cleanly_is_noticed(
    data: Path, namespace: Namespace, content: Content
) -> None:
    file = data / "index" / "data.mdb"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1  # in the last page, behind everything
    times = file.stat()
    file.write_bytes(raw)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with BlockStore.open(data, CONFIG) as store:
        assert not store.recovered.from_snapshot
    assert served(data, namespace, content) == BLOCKS


@pytest.mark.parametrize("name", ["META", "CLEAN"])
def test_any_flipped_byte_of_the_small_files_is_noticed(data: Path, name: str) -> None:
    good = (data / name).read_bytes()
    read = {"META": read_meta, "CLEAN": read_clean}[name]
    read(data)
    for at in range(len(good)):
        for bit in (0x01, 0x20, 0x80):
            (data / name).write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
            with pytest.raises(Corrupt):
                read(data)
    (data / name).write_bytes(good)
    read(data)


def test_what_recoveries_put_aside_is_bounded(data: Path) -> None:
    for _ in range(ASIDE_MAX + 3):
        (data / "index" / "data.mdb").write_bytes(b"noise" * 10_000)
        BlockStore.open(data, CONFIG).close()
    kept = sorted(path.name for path in (data / "damaged").iterdir())
    assert kept == [f"index.{number}" for number in range(4, 4 + ASIDE_MAX)]


def test_a_lost_index_is_rebuilt_from_the_headers(
    data: Path, namespace: Namespace, content: Content
) -> None:
    shutil.rmtree(data / "index")
    with BlockStore.open(data, CONFIG) as store:
        assert store.recovered.rebuilt
        assert store.recovered.blocks == BLOCKS
    assert served(data, namespace, content) == BLOCKS


def test_an_index_of_noise_is_set_aside_and_rebuilt(
    data: Path, namespace: Namespace, content: Content
) -> None:
    for _ in range(2):
        (data / "index" / "data.mdb").write_bytes(random.Random(1).randbytes(1 << 16))
        with BlockStore.open(data, CONFIG) as store:
            assert store.recovered.rebuilt
        assert (data / "damaged" / "index.1").is_dir()
        assert served(data, namespace, content) == BLOCKS


def test_a_rebuild_takes_no_block_whose_bytes_do_not_verify(
    data: Path, namespace: Namespace, content: Content
) -> None:
    shutil.rmtree(data / "index")
    wanted = content(HASHES[4], SIZE)
    for segment in (data / "segments").iterdir():
        raw = bytearray(segment.read_bytes())
        at = raw.find(wanted)
        if at >= 0:
            raw[at + 10] ^= 1
            segment.write_bytes(raw)
    assert served(data, namespace, content) == 4


def test_a_damaged_superblock_costs_that_segment_only(
    data: Path, namespace: Namespace, content: Content
) -> None:
    segments = sorted((data / "segments").iterdir())
    assert len(segments) > 1
    with segments[-1].open("r+b") as file:
        file.write(b"damage")
    assert 0 < served(data, namespace, content) < BLOCKS


def test_a_truncated_segment_costs_that_segment_only(
    data: Path, namespace: Namespace, content: Content
) -> None:
    segments = sorted((data / "segments").iterdir())
    with segments[-1].open("r+b") as file:
        file.truncate(10_000)
    assert 0 < served(data, namespace, content) < BLOCKS


def test_a_segment_without_superblock_is_removed(data: Path) -> None:
    orphan = data / "segments" / "segment-00000099"
    orphan.write_bytes(bytes(1 << 16))
    (data / "segments" / "notes").write_text("not a segment")
    BlockStore.open(data, CONFIG).close()
    assert not orphan.exists()
    assert (data / "segments" / "notes").exists()


def test_a_newer_segment_is_refused_by_name_and_locks_nothing(data: Path) -> None:
    segment = data / "segments" / "segment-00000000"
    body = struct.pack("<8sIIII", b"dpsegmt\0", 3, 0, 4096, 1)
    good = segment.read_bytes()
    segment.write_bytes(body + struct.pack("<I", zlib.crc32(body)) + good[28:])
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=r"format 3.*upgrade"):
            BlockStore.open(data, CONFIG)
    segment.write_bytes(good)
    BlockStore.open(data, CONFIG).close()


@pytest.mark.parametrize("text", ["", "{}", '{"model": 3}', "[1]"])
def test_a_damaged_namespace_file_costs_its_blocks_only(
    data: Path, namespace: Namespace, content: Content, text: str
) -> None:
    (data / "namespaces" / f"{namespace.id.hex()}.json").write_text(text)
    assert served(data, namespace, content) == 0


@pytest.mark.parametrize("seed", range(10))
def test_random_damage_anywhere_is_refused_or_survived(
    data: Path, namespace: Namespace, content: Content, seed: int
) -> None:
    dice = random.Random(seed)
    files = [p for p in sorted(data.rglob("*")) if p.is_file() and p.stat().st_size]
    for _ in range(3):
        file = dice.choice(files)
        raw = bytearray(file.read_bytes())
        for _ in range(dice.choice([1, 50])):
            raw[dice.randrange(len(raw))] = dice.randrange(256)
        file.write_bytes(raw)
    with contextlib.suppress(DualPathError):
        served(data, namespace, content)


def test_a_smaller_budget_serves_what_is_there(
    data: Path, namespace: Namespace, content: Content
) -> None:
    small = StoreConfig(disk_bytes=1 << 20, dram_bytes=4 << 20, segment_bytes=1 << 20)
    with BlockStore.open(data, small) as store:
        assert len(store.get(namespace.id, HASHES)) == BLOCKS
