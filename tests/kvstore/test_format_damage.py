"""Damaged, foreign and newer data directories: refused by name, or served without the damage."""

from __future__ import annotations

import contextlib
import errno
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
    INVALIDATED_NAME,
    RETAINED_NAME,
    STORE_FORMAT,
    _summed,
    read_clean,
    read_meta,
)
from dualpath.kvstore.index_sums import SUMS_KEY
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.namespace_files import COPIES_NAME, NAMESPACES_NAME
from dualpath.kvstore.store_api import SealStatus
from dualpath.kvstore.store_health import Trouble
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "thesis.txt"]


def test_a_foreign_meta_is_refused_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "META").write_text('{"product": "other"}')
    with pytest.raises(Corrupt, match="not that of a dualpath store"):
        BlockStore.open(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["META"]


def test_a_store_without_meta_is_refused_with_the_remedy(data: Path) -> None:
    (data / "META").unlink()
    with pytest.raises(InvalidRequest, match=r"META.*fsck --repair"):
        BlockStore.open(data, CONFIG)


def test_a_directory_that_takes_no_files_is_refused_with_the_remedy(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def read_only(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        with pytest.raises(InvalidRequest, match=r"LOCK: Read-only file system; .*mounted"):
            BlockStore.open(data, CONFIG)
    (data / "LOCK").unlink()
    (data / "LOCK").mkdir()
    with pytest.raises(InvalidRequest, match=r"LOCK: Is a directory; "):
        BlockStore.open(data, CONFIG)


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


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("damage", ["empty", "folder", "file missing", "index missing", "CLEAN"])
def test_an_index_that_is_empty_or_gone_is_rebuilt_and_told(
    data: Path, namespace: Namespace, content: Content, damage: str, clean: bool
) -> None:
    if not clean:
        (data / "CLEAN").unlink()
        (data / "index.snapshot").unlink()
    file = data / "index" / "data.mdb"
    if damage == "empty":
        file.write_bytes(b"")
    elif damage == "index missing":
        shutil.rmtree(data / "index")
    else:
        file.unlink()
        if damage == "folder":
            file.mkdir()
        elif damage == "CLEAN":
            (data / "CLEAN").unlink(missing_ok=True)
    with BlockStore.open(data, CONFIG) as store:
        assert (store.recovered.rebuilt, store.recovered.blocks) == (True, BLOCKS)
        assert f"rebuilt from headers: {BLOCKS} blocks" in store.health().reason
    assert served(data, namespace, content) == BLOCKS
    with BlockStore.open(data, CONFIG) as store:
        assert not store.health().degraded


def test_a_new_directory_has_lost_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        with BlockStore.open(tmp_path / "data", CONFIG) as store:
            assert not store.recovered.rebuilt
            assert not store.health().degraded


@pytest.mark.parametrize("clean", [True, False])
def test_segments_that_are_gone_are_told_and_come_back(
    data: Path, namespace: Namespace, content: Content, clean: bool
) -> None:
    if not clean:
        (data / "CLEAN").unlink()
    (data / "segments").rename(data.parent / "away")
    with BlockStore.open(data, CONFIG) as store:
        assert store.recovered.blocks == 0
        assert "segments are missing" in store.health().troubles[Trouble.RECOVERY]
    shutil.rmtree(data / "segments")
    (data.parent / "away").rename(data / "segments")
    shutil.rmtree(data / "index")
    (data / "damaged" / "index.1").rename(data / "index")
    assert served(data, namespace, content) == BLOCKS


@pytest.mark.parametrize("name", ["CLEAN", "index.snapshot", RETAINED_NAME])
def test_a_folder_in_place_of_a_small_file_is_put_aside(
    data: Path, namespace: Namespace, content: Content, name: str
) -> None:
    (data / name).unlink(missing_ok=True)
    (data / name).mkdir()
    assert served(data, namespace, content) == BLOCKS
    assert not (data / name).is_dir()
    assert (data / "damaged" / f"{name}.1").is_dir()


@pytest.mark.parametrize("name", ["CLEAN", "index.snapshot", RETAINED_NAME, INVALIDATED_NAME])
def test_a_pipe_in_place_of_a_small_file_is_not_waited_for(
    data: Path, namespace: Namespace, content: Content, name: str
) -> None:
    (data / name).unlink(missing_ok=True)
    os.mkfifo(data / name)
    assert served(data, namespace, content) == BLOCKS
    assert served(data, namespace, content) == BLOCKS


def test_a_pipe_in_place_of_meta_or_of_a_namespace_is_not_waited_for(
    data: Path, namespace: Namespace, content: Content
) -> None:
    path = data / NAMESPACES_NAME / f"{namespace.id.hex()}.json"
    path.unlink()
    os.mkfifo(path)
    assert served(data, namespace, content) == BLOCKS
    (data / "META").unlink()
    os.mkfifo(data / "META")
    with pytest.raises(Corrupt, match="META"):
        BlockStore.open(data, CONFIG)


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


@pytest.mark.parametrize("text", [None, "", "{}", '{"model": 3}', "[1]"])
@pytest.mark.parametrize("folder", [NAMESPACES_NAME, COPIES_NAME])
def test_a_damaged_namespace_file_is_written_anew_from_the_other_one(
    data: Path, namespace: Namespace, content: Content, folder: str, text: str | None
) -> None:
    file = data / folder / f"{namespace.id.hex()}.json"
    good = file.read_bytes()
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    assert served(data, namespace, content) == BLOCKS
    assert file.read_bytes() == good
    assert text is None or (data / "damaged" / f"{file.name}.1").read_text() == text


def test_a_namespace_file_of_an_older_version_gets_a_copy(
    data: Path, namespace: Namespace, content: Content
) -> None:
    shutil.rmtree(data / COPIES_NAME)
    with BlockStore.open(data, CONFIG) as store:
        assert not store.health().degraded
    assert served(data, namespace, content) == BLOCKS
    shutil.rmtree(data / NAMESPACES_NAME)
    assert served(data, namespace, content) == BLOCKS


def test_blocks_of_a_namespace_that_is_lost_come_back_with_it(
    data: Path, namespace: Namespace, content: Content
) -> None:
    name = f"{namespace.id.hex()}.json"
    good = (data / NAMESPACES_NAME / name).read_bytes()
    for folder in (NAMESPACES_NAME, COPIES_NAME):
        (data / folder / name).write_text("{}")
    with BlockStore.open(data, CONFIG) as store:
        assert store.recovered.blocks == 0
        trouble = store.health().troubles[Trouble.RECOVERY]
        assert f"{NAMESPACES_NAME}/{name}" in trouble
        assert "restore it" in trouble
    assert (data / "damaged" / "index.1" / "data.mdb").exists()
    (data / NAMESPACES_NAME / name).write_bytes(good)
    shutil.rmtree(data / "index")
    assert served(data, namespace, content) == BLOCKS


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
