"""The snapshot of a clean close: used when it can be trusted, and never otherwise."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.index_snapshot import SNAPSHOT_NAME, check_snapshot
from dualpath.kvstore.key_index import DictKeyIndex
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.store_api import SealStatus
from dualpath.kvstore.table_image import columns_of
from dualpath.transfer.errors import Corrupt

Content = Callable[[bytes, int], bytes]
CONFIG = StoreConfig(disk_bytes=32 << 20, dram_bytes=8 << 20, segment_bytes=2 << 20)
SMALL = Namespace(
    model="small@1", layout=KVLayout(layers=1, block_tokens=16, layer_bytes=5000, dtype="bf16")
)


def chain(blocks: int, first_token: int = 0, algorithm: str = "sha256") -> list[bytes]:
    tokens = range(first_token, first_token + 16 * blocks)
    return chain_hashes(tokens, 16, algorithm=algorithm)


def put(store: BlockStore, namespace: Namespace, hashes: list[bytes], content: Content) -> None:
    space = store.open_namespace(namespace)
    data = [content(h, namespace.layout.block_bytes) for h in hashes]
    assert set(store.put(space, hashes, parents_of(hashes), data)) == {SealStatus.SEALED}


def check_served(
    store: BlockStore, namespace: Namespace, hashes: list[bytes], content: Content
) -> None:
    expected = [content(h, namespace.layout.block_bytes) for h in hashes]
    assert store.get(namespace.id, hashes) == expected


@pytest.fixture
def data(tmp_path: Path, namespace: Namespace, content: Content) -> Path:
    """A cleanly closed store: two namespaces, hashes of two sizes, a fork, and gaps in between."""
    path = tmp_path / "data"
    with BlockStore.open(path, CONFIG) as store:
        put(store, namespace, chain(10), content)
        put(store, namespace, chain(6, 7000, "xxh3_128"), content)
        put(store, SMALL, chain(300), content)
        fork = [*chain(3), b"f" * 32]
        space = namespace.id
        store.put(space, fork[3:], [fork[2]], [content(fork[3], 300_000)])
        # One that was dropped: its row and slot are free.
        hit = store.lookup(space, [*chain(10)], owner="o", lease_s=10)
        with store._state.lock:
            row = store._state.catalog.row_of(store._state.catalog.entry(space), chain(10)[9])
            store._state.residency.drop(row, hit.miss)
        store.release(hit.lease_id, owner="o")
    return path


def test_a_clean_store_opens_from_its_snapshot(
    data: Path, namespace: Namespace, content: Content
) -> None:
    for _ in range(3):
        with BlockStore.open(data, CONFIG) as store:
            assert store.recovered.from_snapshot
            assert not (data / SNAPSHOT_NAME).exists(), "it is old from now on"
            assert store.recovered.blocks == store.stats().blocks == 316
            check_served(store, namespace, chain(9), content)
            check_served(store, namespace, chain(6, 7000, "xxh3_128"), content)
            check_served(store, namespace, [*chain(3), b"f" * 32], content)
            check_served(store, SMALL, chain(300), content)
        assert check_snapshot(data / SNAPSHOT_NAME) == 316


def test_a_store_without_the_native_index_does_the_same(
    data: Path, namespace: Namespace, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("block_table", "record_columns"):
        monkeypatch.setattr(f"dualpath.kvstore.{module}.new_key_index", DictKeyIndex)
    for from_snapshot in (True, False):
        with BlockStore.open(data, CONFIG) as store:
            assert isinstance(store._state.table.index, DictKeyIndex)
            assert store.recovered.from_snapshot is from_snapshot
            assert store.recovered.blocks == 316
            check_served(store, namespace, chain(9), content)
            check_served(store, SMALL, chain(300), content)
        (data / SNAPSHOT_NAME).unlink()


def test_what_a_snapshot_tells_is_what_the_index_tells(data: Path) -> None:
    images = []
    for keep in (True, False):
        if not keep:
            (data / SNAPSHOT_NAME).unlink()
        with BlockStore.open(data, CONFIG) as store:
            assert store.recovered.from_snapshot is keep
            images.append(columns_of(store._state.table, store._state.catalog))
            used = store._state.ssd.used_bytes
    (ids, first), (other_ids, second) = images
    assert sorted(ids) == sorted(other_ids)
    order = np.array([other_ids.index(i) for i in ids])
    assert (order[first.namespaces] == second.namespaces).all()
    for name in (
        "hashes",
        "hash_bytes",
        "parents",
        "segments",
        "slots",
        "generations",
        "checksums",
    ):
        assert (getattr(first, name) == getattr(second, name)).all(), name
    assert used == 16 * 303_104 + 300 * 8192


def test_the_order_of_uses_survives(tmp_path: Path, namespace: Namespace, content: Content) -> None:
    config = replace(CONFIG, disk_bytes=6 << 20, segment_bytes=1 << 20, dram_bytes=2 << 20)
    old, new = chain(1), chain(1, 99_000)
    with BlockStore.open(tmp_path, config) as store:
        put(store, namespace, old, content)
        put(store, namespace, new, content)
        for _ in range(3):
            store.lookup(namespace.id, old, owner="o", lease_s=0)
    with BlockStore.open(tmp_path, config) as store:
        table, catalog = store._state.table, store._state.catalog
        rows = [catalog.row_of(catalog.entry(namespace.id), h[0]) for h in (new, old)]
        assert table.used[rows[0]] < table.used[rows[1]]


def test_a_flipped_bit_anywhere_is_never_trusted(
    data: Path, namespace: Namespace, content: Content
) -> None:
    path, dice = data / SNAPSHOT_NAME, random.Random(1)
    whole = path.read_bytes()
    spots = [*range(0, 24), *dice.sample(range(24, len(whole)), 40)]
    harmless = 0
    for number, spot in enumerate(spots):
        bad = bytearray(whole)
        bad[spot] ^= 1 << dice.randrange(8)
        path.write_bytes(bad)
        try:
            check_snapshot(path)
        except Corrupt:
            pass
        else:
            harmless += 1  # between two columns
        if number % 8:
            continue
        copy = data.with_name(f"copy{number}")
        shutil.copytree(data, copy, copy_function=shutil.copy2)
        with BlockStore.open(copy, CONFIG) as store:
            assert store.stats().blocks == 316
            check_served(store, namespace, chain(9), content)
            check_served(store, SMALL, chain(300), content)
    assert harmless <= 4


def test_a_cut_or_foreign_snapshot_is_not_used(
    data: Path, tmp_path: Path, namespace: Namespace, content: Content
) -> None:
    path = data / SNAPSHOT_NAME
    whole = path.read_bytes()
    with BlockStore.open(tmp_path / "other", CONFIG) as store:
        put(store, namespace, chain(2), content)
    foreign = (tmp_path / "other" / SNAPSHOT_NAME).read_bytes()
    for text in (b"", whole[:10], whole[: len(whole) // 2], whole[:-8], b"x" * 100, foreign):
        path.write_bytes(text)
        with pytest.raises(Corrupt):
            check_snapshot(path, 0)
        with BlockStore.open(data, CONFIG) as store:
            assert not store.recovered.from_snapshot
            assert store.stats().blocks == 316


def test_a_snapshot_of_an_earlier_close_is_not_used(
    data: Path, tmp_path: Path, namespace: Namespace, content: Content
) -> None:
    earlier = (data / SNAPSHOT_NAME).read_bytes()
    with BlockStore.open(data, CONFIG) as store:
        put(store, namespace, chain(2, 50_000), content)
    (data / SNAPSHOT_NAME).write_bytes(earlier)
    with BlockStore.open(data, CONFIG) as store:
        assert not store.recovered.from_snapshot
        check_served(store, namespace, chain(2, 50_000), content)
        assert store.stats().blocks == 318


def test_after_a_kill_the_index_is_read(
    data: Path, tmp_path: Path, namespace: Namespace, content: Content
) -> None:
    killed = tmp_path / "killed"
    with BlockStore.open(data, CONFIG) as store:
        put(store, namespace, chain(2, 50_000), content)
        shutil.copytree(data, killed)
    with BlockStore.open(killed, CONFIG) as store:
        assert not store.recovered.from_snapshot
        assert store.stats().blocks == 318
        check_served(store, SMALL, chain(300), content)


def test_a_lost_segment_takes_its_blocks_and_their_descendants(
    data: Path, namespace: Namespace, content: Content
) -> None:
    segment = sorted((data / "segments").iterdir())[0]
    segment.unlink()
    with BlockStore.open(data, CONFIG) as store:
        assert not store.recovered.from_snapshot, "the segments are others"
        left = store.stats().blocks
        assert 0 < left < 316
        assert store.recovered.dropped == 316 - left
        assert len(store.get(namespace.id, chain(10))) == 0
        put(store, namespace, chain(4), content)
        check_served(store, namespace, chain(4), content)
    with BlockStore.open(data, CONFIG) as store:
        assert store.recovered.from_snapshot
        assert (store.recovered.blocks, store.recovered.dropped) == (left + 4, 0)


def test_a_damaged_segment_keeps_its_share_of_the_budget(
    data: Path, namespace: Namespace, content: Content
) -> None:
    segment = sorted((data / "segments").iterdir())[0]
    with segment.open("r+b") as file:
        file.write(b"\xff" * 100)
    with BlockStore.open(data, CONFIG) as store:
        for first in range(0, 2_000_000, 100_000):
            hashes = chain(10, first)
            blocks = [content(h, 300_000) for h in hashes]
            store.put(store.open_namespace(namespace), hashes, parents_of(hashes), blocks)
    on_disk = sum(path.stat().st_size for path in (data / "segments").iterdir())
    assert segment.exists()
    assert on_disk <= CONFIG.disk_bytes
