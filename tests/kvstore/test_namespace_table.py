"""The table of namespaces: bounded, and never exhausted by namespaces that hold nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.store_api import MissReason, NewBlock, ReserveStatus, SealStatus
from dualpath.transfer.errors import InvalidRequest, Overloaded

Content = Callable[[bytes, int], bytes]
CONFIG = StoreConfig(
    disk_bytes=16 << 20, dram_bytes=4 << 20, segment_bytes=4 << 20, namespaces_max=8
)
HASHES = chain_hashes(range(32), 16)


def salted(namespace: Namespace, salt: int) -> Namespace:
    return replace(namespace, salt=str(salt))


def put(store: BlockStore, namespace: Namespace, content: Content) -> None:
    space = store.open_namespace(namespace)
    data = [content(h, 300_000) for h in HASHES]
    assert set(store.put(space, HASHES, parents_of(HASHES), data)) == {SealStatus.SEALED}


def test_namespaces_that_hold_nothing_make_way(
    tmp_path: Path, namespace: Namespace, content: Content
) -> None:
    with BlockStore.open(tmp_path, CONFIG) as store:
        put(store, namespace, content)
        kept = salted(namespace, -1)
        store.open_namespace(kept)
        for salt in range(100):
            store.open_namespace(salted(namespace, salt))
            store.lookup(kept.id, HASHES, owner="o", lease_s=0)  # in use, though empty
        assert store.stats().namespaces <= 8
        assert store.lookup(namespace.id, HASHES, owner="o", lease_s=0).blocks == 2
        assert store.lookup(kept.id, HASHES, owner="o", lease_s=0).miss is MissReason.NAMESPACE
        with pytest.raises(InvalidRequest, match="never opened") as unknown:
            store.lookup(salted(namespace, 0).id, HASHES, owner="o", lease_s=0)
        assert unknown.value.reason == "namespace"
        store.open_namespace(salted(namespace, 0))
        assert store.lookup(salted(namespace, 0).id, HASHES, owner="o", lease_s=0).blocks == 0


def test_namespaces_with_blocks_or_reservations_are_never_forgotten(
    tmp_path: Path, namespace: Namespace, content: Content
) -> None:
    with BlockStore.open(tmp_path, CONFIG) as store:
        for salt in range(7):
            put(store, salted(namespace, salt), content)
        space = store.open_namespace(salted(namespace, 7))
        reserved = store.reserve(space, [NewBlock(b"r" * 32, b"")], owner="o", ttl_s=60)
        assert reserved[0].status is ReserveStatus.RESERVED
        with pytest.raises(Overloaded, match="raise namespaces_max") as full:
            store.open_namespace(salted(namespace, 8))
        assert full.value.retry_after_s > 0
        store.abandon([reserved[0].reservation_id], owner="o")
        store.open_namespace(salted(namespace, 8))
        for salt in range(7):
            found = store.get(salted(namespace, salt).id, HASHES)
            assert found == [content(h, 300_000) for h in HASHES]


def test_more_namespaces_on_disk_than_the_limit_open(
    tmp_path: Path, namespace: Namespace, content: Content
) -> None:
    with BlockStore.open(tmp_path, CONFIG) as store:
        for salt in range(6):
            put(store, salted(namespace, salt), content)
    few = replace(CONFIG, namespaces_max=2)
    with BlockStore.open(tmp_path, few) as store:
        assert store.stats().namespaces == 6, "all of them hold blocks"
        with pytest.raises(Overloaded):
            store.open_namespace(namespace)
        for salt in range(6):
            row = store._state.catalog.row_of(
                store._state.catalog.entry(salted(namespace, salt).id), HASHES[0]
            )
            if salt:
                with store._state.lock:
                    store._state.residency.drop(row, MissReason.EVICTED)
    with BlockStore.open(tmp_path, few) as store:
        assert store.stats().namespaces == 2, "the empty ones went"
        assert store.stats().blocks == 2
        assert len(list((tmp_path / "namespaces").iterdir())) == 2
        put(store, salted(namespace, 1), content)
    with BlockStore.open(tmp_path, few) as store:
        assert store.stats().blocks == 4
