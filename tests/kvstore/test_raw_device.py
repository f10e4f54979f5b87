"""A store on a raw device: the table survives tearing, extents are not shared, and neither
somebody else's device nor a forgotten setting does damage."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dualpath.kvstore import raw_table
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.device import ALIGN_BYTES
from dualpath.kvstore.device_conformance import check_device
from dualpath.kvstore.fsck import Fsck
from dualpath.kvstore.fsck_repair import FsckRepair
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.raw_device import RawDevice, owner_of
from dualpath.kvstore.raw_table import (
    COPY_BYTES,
    DATA_OFFSET,
    EXTENT_ALIGN_BYTES,
    Extent,
    RawTable,
    free_offset,
)
from dualpath.kvstore.segment import page_buffer
from dualpath.kvstore.store_api import SealStatus
from dualpath.transfer.errors import Corrupt, InvalidRequest, Unavailable
from hypothesis import given
from hypothesis import strategies as st

Content = Callable[[bytes, int], bytes]
PLACE_BYTES = 24 << 20
MIB = 1 << 20

names = st.text("abcdefghijklmnopqrstuvwxyz-0123456789", min_size=1, max_size=48)
extents = st.builds(Extent, st.integers(0, 2**62), st.integers(0, 2**62))
tables = st.builds(
    RawTable,
    owner=st.text("0123456789abcdef", max_size=32),
    device_bytes=st.integers(0, 2**62),
    generation=st.integers(0, 2**62),
    files=st.dictionaries(names, extents, max_size=80),
)


@given(tables)
def test_a_table_comes_back_as_it_was_written(table: RawTable) -> None:
    data = table.to_bytes()
    assert len(data) % ALIGN_BYTES == 0
    assert RawTable.from_bytes(data) == table
    assert RawTable.from_bytes(data.ljust(COPY_BYTES, b"\0")) == table


@given(tables, st.data())
def test_a_flipped_bit_in_use_is_noticed(table: RawTable, data: st.DataObject) -> None:
    written = bytearray(table.to_bytes())
    used = [*range(68), *range(ALIGN_BYTES, ALIGN_BYTES + 64 * len(table.files))]
    at = data.draw(st.sampled_from(used))
    written[at] ^= 1 << data.draw(st.integers(0, 7))
    assert RawTable.from_bytes(bytes(written)) is None


@given(st.lists(st.integers(1, 5 * MIB), max_size=12), st.integers(1, 40 * MIB))
def test_free_places_are_aligned_inside_and_apart(sizes: list[int], device_bytes: int) -> None:
    used: list[Extent] = []
    for nbytes in sizes:
        offset = free_offset(used, nbytes, device_bytes)
        if offset < 0:
            continue
        assert offset >= DATA_OFFSET
        assert offset % EXTENT_ALIGN_BYTES == 0
        assert offset + nbytes <= device_bytes
        for other in used:
            assert offset + nbytes <= other.offset or other.offset + other.nbytes <= offset
        used.append(Extent(offset, nbytes))
        if len(used) == 3:
            used.pop(0)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "raw"
    with place.open("wb") as file:
        file.truncate(PLACE_BYTES)
    return place


def test_files_are_found_again_and_hold_their_bytes(place: Path) -> None:
    device = RawDevice(place, owner="one")
    page = page_buffer()
    for number in range(5):
        file = device.create(f"f{number}", 2 * MIB)
        page[:] = bytes([number + 1]) * ALIGN_BYTES
        file.write(MIB, [page])
        file.sync()
        file.close()
    device.remove("f2")
    device.close()
    device = RawDevice(place, owner="one")
    assert device.names() == ("f0", "f1", "f3", "f4")
    for number in (0, 1, 3, 4):
        with_bytes = device.open(f"f{number}")
        with_bytes.read(MIB, [page])
        assert page == bytes([number + 1]) * ALIGN_BYTES
        with_bytes.close()
    again = device.create("f2", 2 * MIB)
    again.read(MIB, [page])
    assert not any(page), "what lay there before shows through"
    again.close()
    device.close()


def test_a_torn_table_leaves_the_one_before(place: Path) -> None:
    device = RawDevice(place, owner="one")
    device.create("old", MIB).close()
    before = place.read_bytes()[: 2 * COPY_BYTES]
    device.create("new", MIB).close()
    newest = device._table.generation
    device.close()
    first, second = newest % 2 * COPY_BYTES, (newest + 1) % 2 * COPY_BYTES
    with place.open("r+b") as file:
        file.seek(first + ALIGN_BYTES)
        file.write(bytes(ALIGN_BYTES))
        file.seek(second)
        file.write(before[second : second + COPY_BYTES])
    device = RawDevice(place, owner="one")
    assert device.names() == ("old",)
    device.create("newer", MIB).close()
    device.close()
    assert RawDevice(place, owner="one").names() == ("newer", "old")


@pytest.mark.parametrize("failed", [0, 1])
def test_a_change_of_the_table_begins_with_the_copy_whose_flush_failed(
    place: Path, monkeypatch: pytest.MonkeyPatch, failed: int
) -> None:
    """The other one is whole, and must be until that one is."""
    device = RawDevice(place, owner="one")
    device.create("before", MIB).close()
    fdatasync, move = os.fdatasync, RawDevice._move
    flushes, places = list[int](), list[int]()

    def failing(fd: int) -> None:
        flushes.append(fd)
        if len(flushes) == 2 + failed:  # the first is of the extent
            raise OSError(errno.EIO, "a bad moment")
        fdatasync(fd)

    def noting(moved: RawDevice, offset: int, buffer: memoryview, *, reading: bool) -> None:
        places.append(offset)
        move(moved, offset, buffer, reading=reading)

    with monkeypatch.context() as patch:
        patch.setattr(RawDevice, "_move", noting)
        patch.setattr(os, "fdatasync", failing)
        with pytest.raises(OSError, match="a bad moment"):
            device.create("more", MIB)
        in_doubt = places[-1]
        places.clear()
        device.create("other", MIB).close()
    assert next(offset for offset in places if offset < 2 * COPY_BYTES) == in_doubt
    device.close()
    assert {"before", "other"} <= set(RawDevice(place, owner="one").names())


@pytest.mark.parametrize("copy", [0, 1])
def test_one_rotten_copy_of_the_table_loses_nothing(place: Path, copy: int) -> None:
    device = RawDevice(place, owner="one")
    device.create("a", MIB).close()
    device.create("b", MIB).close()
    device.close()
    with place.open("r+b") as file:
        file.seek(copy * COPY_BYTES + 20)
        file.write(b"?")
    assert owner_of(place) == ("one", 1)
    device = RawDevice(place, owner="one")
    assert device.names() == ("a", "b")
    device.create("c", MIB).close()
    device.close()
    assert owner_of(place) == ("one", 0), "the next change writes both"


def test_an_extent_is_not_given_to_another_file_while_one_is_open(place: Path) -> None:
    device = RawDevice(place, owner="one")
    file = device.create("a", 12 * MIB)
    page = page_buffer()
    page[:] = b"a" * ALIGN_BYTES
    file.write(0, [page])
    fd = file.hold()
    device.remove("a")
    file.close()
    with pytest.raises(OSError, match=r"no .* bytes in one piece") as caught:
        device.create("b", 12 * MIB)
    assert caught.value.errno == errno.ENOSPC
    page[:] = bytes(ALIGN_BYTES)
    os.preadv(fd, [page], file.base)
    assert page == b"a" * ALIGN_BYTES
    file.let_go()
    device.create("b", 12 * MIB).close()
    device.close()


def test_a_device_of_somebody_else_is_left_alone(place: Path) -> None:
    RawDevice(place, owner="one").close()
    before = place.read_bytes()
    with pytest.raises(InvalidRequest, match="belongs to store one, not to two"):
        RawDevice(place, owner="two")
    assert place.read_bytes() == before
    with place.open("r+b") as file:
        file.write(b"\x00" * 1024 + b"some file system")
        file.seek(COPY_BYTES)
        file.write(bytes(ALIGN_BYTES))
    before = place.read_bytes()
    with pytest.raises(InvalidRequest, match="neither blank nor a device of a store"):
        RawDevice(place, owner="one")
    assert place.read_bytes() == before


def test_a_device_in_use_is_refused_and_free_again_after_close(place: Path) -> None:
    device = RawDevice(place, owner="one")
    with pytest.raises(Unavailable, match="in use") as caught:
        RawDevice(place, owner="one")
    assert caught.value.reason == "locked"
    device.close()
    RawDevice(place, owner="one").close()


def test_a_small_a_shrunk_and_a_newer_device_are_named(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = RawDevice(place, owner="one")
    table = device._table
    device.close()
    os.truncate(place, PLACE_BYTES - 4 * MIB)
    with pytest.raises(Corrupt, match="it was truncated"):
        RawDevice(place, owner="one")
    os.truncate(place, MIB)
    with pytest.raises(InvalidRequest, match="at least"):
        RawDevice(place, owner="one")
    os.truncate(place, PLACE_BYTES)
    with monkeypatch.context() as later:
        later.setattr(raw_table, "RAW_FORMAT", raw_table.RAW_FORMAT + 1)
        data = dataclasses.replace(table, generation=9).to_bytes()
    with place.open("r+b") as file:
        file.write(data)
    with pytest.raises(InvalidRequest, match="upgrade dualpath") as caught:
        RawDevice(place, owner="one")
    assert caught.value.reason == "newer_format"


def test_a_full_device_and_bad_names_are_errors_of_the_device(place: Path) -> None:
    device = RawDevice(place, owner="one")
    with pytest.raises(OSError, match="in one piece"):
        device.create("big", PLACE_BYTES)
    with pytest.raises(OSError, match=r"1\.\.48 bytes"):
        device.create("n" * 49, ALIGN_BYTES)
    assert device.names() == ()
    device.close()


HASHES = chain_hashes(range(16 * 8), 16)


def config(place: Path) -> StoreConfig:
    return StoreConfig(
        disk_bytes=16 << 20,
        dram_bytes=8 << 20,
        segment_bytes=4 << 20,
        read_buffers_bytes=4 << 20,
        raw_device=str(place),
    )


def fill(path: Path, settings: StoreConfig, namespace: Namespace, content: Content) -> list[bytes]:
    data = [content(key, namespace.layout.block_bytes) for key in HASHES]
    with BlockStore.open(path, settings) as store:
        space = store.open_namespace(namespace)
        assert set(store.put(space, HASHES, parents_of(HASHES), data)) == {SealStatus.SEALED}
        device = store.stats().device
        assert "psync on" in device
    return data


def test_a_store_on_a_raw_device_serves_again_what_it_stored(
    tmp_path: Path, place: Path, namespace: Namespace, content: Content
) -> None:
    data = fill(tmp_path / "data", config(place), namespace, content)
    with BlockStore.open(tmp_path / "data", config(place)) as store:
        assert store.get(store.open_namespace(namespace), HASHES) == data
    assert not any((tmp_path / "data" / "segments").glob("*"))


def test_a_start_that_forgets_the_raw_device_is_refused_and_costs_nothing(
    tmp_path: Path, place: Path, namespace: Namespace, content: Content
) -> None:
    data = fill(tmp_path / "data", config(place), namespace, content)
    with pytest.raises(InvalidRequest, match="set raw_device"):
        BlockStore.open(tmp_path / "data", dataclasses.replace(config(place), raw_device=""))
    moved = place.rename(tmp_path / "moved")
    with BlockStore.open(tmp_path / "data", config(moved)) as store:
        assert store.get(store.open_namespace(namespace), HASHES) == data


def test_a_store_of_files_does_not_move_to_a_raw_device_by_a_setting(
    tmp_path: Path, place: Path, namespace: Namespace, content: Content
) -> None:
    on_files = dataclasses.replace(config(place), raw_device="")
    with BlockStore.open(tmp_path / "data", on_files) as store:
        space = store.open_namespace(namespace)
        store.put(space, HASHES[:1], [b""], [content(b"x", namespace.layout.block_bytes)])
    with pytest.raises(InvalidRequest, match="unset it, or use another data directory"):
        BlockStore.open(tmp_path / "data", config(place))


def test_fsck_checks_and_repairs_a_raw_device(
    tmp_path: Path, place: Path, namespace: Namespace, content: Content
) -> None:
    data = fill(tmp_path / "data", config(place), namespace, content)
    with Fsck(tmp_path / "data") as fsck:
        assert fsck.check().problems == 0
    whole = place.read_bytes()
    at = whole.index(data[3][:4096])
    with place.open("r+b") as file:
        file.seek(at + 100)
        file.write(bytes([whole[at + 100] ^ 255]))
    with Fsck(tmp_path / "data") as fsck:
        assert fsck.check().problems == 1
        assert FsckRepair(fsck).run().problems == 0
    with BlockStore.open(tmp_path / "data", config(place)) as store:
        assert store.get(store.open_namespace(namespace), HASHES) == data[:3]


@pytest.fixture
def loop(place: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("loop devices need root")
    made = subprocess.run(
        ["losetup", "--find", "--show", str(place)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    yield Path(made.stdout.strip())
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


@pytest.mark.root
def test_a_block_device_keeps_the_contract_and_a_store(
    tmp_path: Path, loop: Path, namespace: Namespace, content: Content
) -> None:
    data = fill(tmp_path / "data", config(loop), namespace, content)
    with BlockStore.open(tmp_path / "data", config(loop)) as store:
        assert "psync on block device" in store.stats().device
        assert store.get(store.open_namespace(namespace), HASHES) == data
    with loop.open("r+b") as file:
        file.write(bytes(DATA_OFFSET))
    made: list[RawDevice] = []

    def make() -> RawDevice:
        while made:
            made.pop().close()
        made.append(RawDevice(loop, owner="one"))
        return made[-1]

    check_device(make)
    make().close()
