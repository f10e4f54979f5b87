"""What is missing of a data directory, or has a folder in its place, is repaired by fsck from what
the rest of it tells."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.data_directory import read_store_id
from dualpath.kvstore.fsck import Fsck
from dualpath.kvstore.fsck_repair import FsckRepair
from dualpath.kvstore.fsck_report import FsckCode, FsckReport
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.namespace_files import COPIES_NAME
from dualpath.kvstore.store_api import SealStatus

Content = Callable[[bytes, int], bytes]
CONFIG = StoreConfig(disk_bytes=1 << 20, dram_bytes=1 << 20, segment_bytes=128 << 10)
SPACE = Namespace(
    model="missing", layout=KVLayout(layers=2, block_tokens=4, layer_bytes=3000, dtype="bf16")
)
SIZE = SPACE.layout.block_bytes
HASHES = chain_hashes(range(4 * 9), 4)


@pytest.fixture
def data(tmp_path: Path, content: Content) -> Path:
    """A cleanly closed store of one chain."""
    path = tmp_path / "data"
    with BlockStore.open(path, CONFIG) as store:
        blocks = [content(h, SIZE) for h in HASHES]
        statuses = store.put(store.open_namespace(SPACE), HASHES, parents_of(HASHES), blocks)
        assert set(statuses) == {SealStatus.SEALED}
    return path


def check(path: Path) -> FsckReport:
    with Fsck(path) as fsck:
        return fsck.check()


def repair(path: Path) -> FsckReport:
    with Fsck(path) as fsck:
        fsck.check()
        return FsckRepair(fsck).run()


def served(path: Path, content: Content) -> int:
    """Blocks that a store serves, all right."""
    with BlockStore.open(path, CONFIG) as store:
        found = store.get(store.open_namespace(SPACE), HASHES)
    assert found == [content(h, SIZE) for h in HASHES[: len(found)]]
    return len(found)


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("folder", ["namespaces", COPIES_NAME])
def test_a_namespace_file_is_written_anew_from_the_other_one(
    data: Path, content: Content, folder: str, gone: bool
) -> None:
    file = data / folder / f"{SPACE.id.hex()}.json"
    good = file.read_bytes()
    if gone:
        file.unlink()
    else:
        file.write_bytes(good.replace(b"missing", b"missinh"))
    if not gone or folder == "namespaces":
        assert check(data).counts == {FsckCode.NAMESPACE_DAMAGED: 1}
    assert repair(data).problems == 0
    assert served(data, content) == len(HASHES)
    assert file.read_bytes() == good


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("damage", ["flip", "missing", "folder", "empty"])
def test_a_damaged_meta_is_made_anew(
    data: Path, content: Content, damage: str, clean: bool
) -> None:
    store_id = read_store_id(data)
    meta = data / "META"
    if not clean:
        (data / "CLEAN").unlink()
        (data / "index.snapshot").unlink()
    if damage == "flip":
        meta.write_bytes(meta.read_bytes().swapcase())
    else:
        meta.unlink()
        if damage == "folder":
            meta.mkdir()
        elif damage == "empty":
            meta.touch()
    assert check(data).counts[FsckCode.META_DAMAGED] == 1
    left = repair(data)
    assert left.problems == 0
    assert ("its former id" if clean else "a new id") in left.repairs[0]
    assert (read_store_id(data) == store_id) == clean
    assert served(data, content) == len(HASHES)


@pytest.mark.parametrize("also", ["META", "namespaces", "LOCK", "CLEAN", "namespaces.copy"])
def test_whatever_is_missing_beside_the_index_is_repaired(
    data: Path, content: Content, also: str
) -> None:
    shutil.rmtree(data / "index")
    shutil.rmtree(data / also) if (data / also).is_dir() else (data / also).unlink()
    assert check(data).counts[FsckCode.INDEX_LOST] == 1
    left = repair(data)
    assert left.problems == 0, left.findings
    assert served(data, content) == len(HASHES)


def test_a_directory_of_which_only_the_namespaces_are_left_is_repaired(
    data: Path, content: Content
) -> None:
    for name in ("index", "segments"):
        shutil.rmtree(data / name)
    assert check(data).counts[FsckCode.INDEX_LOST] == 1
    assert repair(data).problems == 0
    assert served(data, content) == 0


@pytest.mark.parametrize("name", ["CLEAN", "index.snapshot", "RETAINED", "index/data.mdb"])
def test_a_folder_in_place_of_a_file_is_put_aside(data: Path, content: Content, name: str) -> None:
    (data / name).unlink(missing_ok=True)
    (data / name).mkdir()
    assert check(data).problems
    assert repair(data).problems == 0
    assert served(data, content) == len(HASHES)
