"""Every format up to the present one opens, serves all of its blocks, and is brought up to date."""

from __future__ import annotations

import importlib.util
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
from dualpath.kvstore.block_store import BlockStore
from dualpath.kvstore.directory_format import STORE_FORMAT

FORMATS = Path(__file__).parent / "formats"
ARCHIVES = sorted(path.name for path in FORMATS.glob("format-*.tar.xz"))


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """The script that made the archives: it knows what they hold."""
    spec = importlib.util.spec_from_file_location("make_format", FORMATS / "make_format.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def unpack(archive: str, path: Path) -> None:
    with tarfile.open(FORMATS / archive) as files:
        files.extractall(path, filter="data")


def check(store: BlockStore, maker: ModuleType) -> None:
    for namespace, hashes in maker.chains():
        space = store.open_namespace(namespace)
        found = store.get(space, hashes)
        assert found == [maker.content(h, namespace.layout.block_bytes) for h in hashes]


def test_both_kinds_of_the_present_format_and_of_the_one_before_are_kept() -> None:
    for version in {STORE_FORMAT, max(1, STORE_FORMAT - 1)}:
        for kind in ("clean", "killed"):
            assert f"format-{version}-{kind}.tar.xz" in ARCHIVES, "run make_format.py"


@pytest.mark.parametrize("archive", ARCHIVES)
def test_a_committed_directory_opens_and_serves_every_block(
    archive: str, tmp_path: Path, maker: ModuleType
) -> None:
    unpack(archive, tmp_path)
    with BlockStore.open(tmp_path, maker.CONFIG) as store:
        check(store, maker)
        assert store.recovered.dropped == 0
        assert not store.recovered.rebuilt
    assert json.loads((tmp_path / "META").read_text())["format"] == STORE_FORMAT
    with BlockStore.open(tmp_path, maker.CONFIG) as store:
        check(store, maker)
        maker.fill(store)


@pytest.mark.parametrize("archive", ARCHIVES)
def test_a_committed_directory_without_its_index_is_rebuilt_whole(
    archive: str, tmp_path: Path, maker: ModuleType
) -> None:
    unpack(archive, tmp_path)
    (tmp_path / "index" / "data.mdb").unlink()
    with BlockStore.open(tmp_path, maker.CONFIG) as store:
        check(store, maker)
        assert store.recovered.rebuilt
