"""Invalidation: gone for everybody at once, and for good; in use until released."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.checksum import of_block
from dualpath.kvstore.durable_index import DurableIndex
from dualpath.kvstore.fetched_batch import FetchStatus
from dualpath.kvstore.invalidator import Invalidator
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.store_api import (
    InvalidationScope,
    MissReason,
    NewBlock,
    ReserveStatus,
    SealRequest,
    SealStatus,
)
from dualpath.transfer.errors import InvalidRequest, LeaseExpired

CONFIG = StoreConfig(disk_bytes=32 << 20, dram_bytes=8 << 20, segment_bytes=4 << 20)
LAYOUT = KVLayout(layers=2, block_tokens=4, layer_bytes=30_000, dtype="bf16")
Content = Callable[[bytes, int], bytes]


class Scene:
    """A store with two namespaces, and chains that two writers have sealed."""

    def __init__(self, path: Path, content: Content) -> None:
        self.path = path
        self.content = content
        self.store = BlockStore.open(path, CONFIG)
        self.spaces = [
            self.store.open_namespace(Namespace(model=model, layout=LAYOUT)) for model in "ab"
        ]

    def write(
        self, space: int, hashes: list[bytes], parents: list[bytes], writer: str, *, durable: bool
    ) -> list[SealStatus]:
        """Seal blocks as a writer."""
        new = [NewBlock(*pair) for pair in zip(hashes, parents, strict=True)]
        reserved = self.store.reserve(self.spaces[space], new, owner=writer, ttl_s=60)
        for outcome, block in zip(reserved, hashes, strict=True):
            assert outcome.extent is not None, outcome
            data = self.content(block, LAYOUT.block_bytes)
            start = outcome.extent.start
            self.store.arena.view[start : start + len(data)] = data
        requests = [SealRequest(outcome.reservation_id) for outcome in reserved]
        return list(self.store.seal(requests, owner=writer, durable=durable, writer=writer))

    def chain(self, space: int, first: int, writer: str, *, durable: bool = True) -> list[bytes]:
        """A chain of six blocks."""
        hashes = list(chain_hashes(range(1000 * first, 1000 * first + 24), 4))
        sealed = self.write(space, hashes, list(parents_of(hashes)), writer, durable=durable)
        assert set(sealed) == {SealStatus.SEALED}
        return hashes

    def hits(self, space: int, hashes: list[bytes], store: BlockStore | None = None) -> int:
        """Blocks of the prefix that are present."""
        found = store or self.store
        return found.lookup(self.spaces[space], hashes, owner="t", lease_s=0).blocks

    def after_crash(self, *, index_lost: bool = False) -> BlockStore:
        """What a process would open that starts after this one was killed now."""
        copy = self.path.parent / f"crashed-{index_lost}"
        shutil.copytree(self.path, copy)
        if index_lost:
            shutil.rmtree(copy / "index")
        return BlockStore.open(copy, CONFIG)


@pytest.fixture
def scene(tmp_path: Path, content: Content) -> Iterator[Scene]:
    """Closed at the end."""
    made = Scene(tmp_path / "store", content)
    yield made
    made.store.close()


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("index_lost", [False, True])
def test_a_namespace_is_gone_after_the_answer_and_after_a_crash(
    scene: Scene, durable: bool, index_lost: bool
) -> None:
    gone = [scene.chain(0, index, "w", durable=durable) for index in range(4)]
    kept = scene.chain(1, 0, "w")
    done = scene.store.invalidate(InvalidationScope(scene.spaces[0]))
    assert (done.blocks, done.nbytes) == (24, 24 * LAYOUT.block_bytes)
    assert all(scene.hits(0, chain) == 0 for chain in gone)
    hit = scene.store.lookup(scene.spaces[0], gone[0], owner="t", lease_s=0)
    assert hit.miss is MissReason.INVALIDATED
    assert scene.hits(1, kept) == 6
    with scene.after_crash(index_lost=index_lost) as reopened:
        for model in "ab":
            reopened.open_namespace(Namespace(model=model, layout=LAYOUT))
        assert all(scene.hits(0, chain, reopened) == 0 for chain in gone)
        assert scene.hits(1, kept, reopened) == 6


def test_a_rebuild_that_was_cut_brings_nothing_back(scene: Scene) -> None:
    """The new index says that it reaches nothing, so all headers are newer than it."""
    gone, kept = scene.chain(0, 0, "w"), scene.chain(1, 0, "w")
    scene.store.invalidate(InvalidationScope(scene.spaces[0]))
    copy = Path(shutil.copytree(scene.path, scene.path.parent / "cut"))
    (copy / "index" / "data.mdb").unlink()
    DurableIndex(copy / "index").close()
    with BlockStore.open(copy, CONFIG) as reopened:
        assert scene.hits(0, gone, reopened) == 0
        assert scene.hits(1, kept, reopened) == 6


def test_a_block_takes_along_what_builds_on_it_and_leaves_what_precedes_it(scene: Scene) -> None:
    chain = scene.chain(0, 0, "w")
    other = [chain_hashes(range(1, 5), 4)[0]]
    scene.write(0, other, [chain[3]], "w", durable=True)  # a branch
    done = scene.store.invalidate(InvalidationScope(scene.spaces[0], chain[2]))
    assert done.blocks == 5
    assert scene.hits(0, chain) == 2
    assert scene.hits(0, [*chain[:4], *other]) == 2


def test_a_writers_blocks_leave_everywhere_with_their_descendants_by_others(scene: Scene) -> None:
    poisoned = [scene.chain(space, space, "token:bad", durable=False) for space in (0, 1)]
    good = scene.chain(0, 7, "token:good")
    below = [chain_hashes(range(50, 54), 4)[0]]
    scene.write(0, below, [poisoned[0][-1]], "token:good", durable=True)
    only_one = InvalidationScope(scene.spaces[1], writer="token:bad")
    assert scene.store.invalidate(only_one, dry_run=True).blocks == 6
    done = scene.store.invalidate(InvalidationScope(writer="token:bad"))
    assert done.blocks == 13
    assert [scene.hits(space, poisoned[space]) for space in (0, 1)] == [0, 0]
    assert scene.hits(0, below) == 0
    assert scene.hits(0, good) == 6
    assert scene.store.invalidate(InvalidationScope(writer="token:bad")).blocks == 0


def test_what_others_built_on_a_writers_block_stays_gone_without_the_index(scene: Scene) -> None:
    """Though somebody stores that block again, whose old header told whose it was."""
    poisoned = scene.chain(0, 0, "token:bad")
    below = [chain_hashes(range(50, 54), 4)[0]]
    scene.write(0, below, [poisoned[-1]], "token:good", durable=True)
    scene.store.invalidate(InvalidationScope(writer="token:bad"))
    assert scene.chain(0, 0, "token:good") == poisoned
    with scene.after_crash(index_lost=True) as reopened:
        assert scene.hits(0, [*poisoned, *below], reopened) == 6


@pytest.mark.parametrize("scoped", ["namespace", "writer"])
def test_what_is_stored_while_an_invalidation_runs_stays_without_the_index(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, scoped: str
) -> None:
    scene.chain(0, 0, "w")
    later: list[bytes] = []
    find = Invalidator._find

    def find_and_store(*arguments: Any, **options: Any) -> Any:
        found = find(*arguments, **options)
        later.extend(scene.chain(0, 1, "w"))
        return found

    monkeypatch.setattr(Invalidator, "_find", find_and_store)
    space = scene.spaces[0]
    scope = InvalidationScope(space) if scoped == "namespace" else InvalidationScope(writer="w")
    assert scene.store.invalidate(scope).blocks == 6
    assert scene.hits(0, later) == 6
    with scene.after_crash(index_lost=True) as reopened:
        assert scene.hits(0, later, reopened) == 6


def test_a_dry_run_counts_and_changes_nothing(scene: Scene) -> None:
    chain = scene.chain(0, 0, "w")
    last = scene.store.events.last
    scope = InvalidationScope(scene.spaces[0], chain[1])
    found = scene.store.invalidate(scope, dry_run=True)
    assert (found.blocks, found.nbytes) == (5, 5 * LAYOUT.block_bytes)
    assert scene.hits(0, chain) == 6
    assert scene.store.events.last == last
    assert scene.store.invalidate(scope) == found


def test_memory_in_use_stays_as_it_is_until_it_is_released(scene: Scene) -> None:
    chain = scene.chain(0, 0, "w")
    hit = scene.store.lookup(scene.spaces[0], chain, owner="reader", lease_s=60)
    held = [scene.store.fetch(hit.lease_id, block, 0) for block in range(6)]
    done = scene.store.invalidate(InvalidationScope(scene.spaces[0]))
    assert done.leased_blocks == 6
    assert scene.hits(0, chain) == 0
    # The same keys may be written again at once, and other memory is used for them.
    scene.chain(0, 0, "w", durable=False)
    filler = [scene.chain(1, index, "w") for index in range(2, 20)]
    assert filler
    nbytes = LAYOUT.chunk_extent(0)[1]
    for block, chunk in enumerate(held):
        start = chunk.slices.start
        wanted = scene.content(chain[block], LAYOUT.block_bytes)[:nbytes]
        assert bytes(chunk.region.view[start : start + nbytes]) == wanted
        chunk.release()
    scene.store.release(hit.lease_id, owner="reader")
    assert scene.store.stats().leases == 0
    assert scene.hits(0, chain) in (0, 6)


@pytest.mark.parametrize("scoped", ["namespace", "block"])
def test_what_was_reserved_before_cannot_be_sealed_any_more(scene: Scene, scoped: str) -> None:
    block = chain_hashes(range(4), 4)[0]
    (outcome,) = scene.store.reserve(scene.spaces[0], [NewBlock(block, b"")], owner="w", ttl_s=60)
    assert outcome.status is ReserveStatus.RESERVED
    scope = InvalidationScope(scene.spaces[0], block if scoped == "block" else b"")
    assert scene.store.invalidate(scope).blocks == 0
    request = SealRequest(outcome.reservation_id)
    assert scene.store.seal([request], owner="w", durable=True) == (SealStatus.EXPIRED,)
    assert scene.hits(0, [block]) == 0
    sealed = scene.write(0, [block], [b""], "w", durable=True)
    assert sealed == [SealStatus.SEALED]


def test_what_is_written_again_afterwards_is_served_and_survives(scene: Scene) -> None:
    chain = scene.chain(0, 0, "w")
    scene.store.invalidate(InvalidationScope(scene.spaces[0]))
    assert scene.chain(0, 0, "w") == chain
    with scene.after_crash(index_lost=True) as reopened:
        space = reopened.open_namespace(Namespace(model="a", layout=LAYOUT))
        hit = reopened.lookup(space, chain, owner="t", lease_s=5)
        assert hit.blocks == 6
        for block in range(6):
            data = scene.content(chain[block], LAYOUT.block_bytes)
            padded = memoryview(data + bytes(LAYOUT.slot_bytes - len(data)))
            assert tuple(hit.checksums[block].tolist()) == of_block(padded, LAYOUT)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, "never leaves"),
        ({"hash": b"h" * 32}, "namespace_id"),
        ({"hash": b"h" * 32, "writer": "w"}, "excludes"),
    ],
)
def test_a_scope_that_means_nothing_or_everything_is_refused(
    fields: dict[str, str], word: str
) -> None:
    with pytest.raises(InvalidRequest, match=word):
        InvalidationScope(**fields)  # type: ignore[arg-type]


def test_an_unknown_namespace_is_refused_by_name(scene: Scene) -> None:
    with pytest.raises(InvalidRequest) as caught:
        scene.store.invalidate(InvalidationScope(b"x" * 16))
    assert caught.value.reason == "namespace"


def test_leased_blocks_that_are_invalidated_are_gone_and_not_called_corrupt(scene: Scene) -> None:
    chain = scene.chain(0, 0, "w")
    hit = scene.store.lookup(scene.spaces[0], chain, owner="t", lease_s=60)
    scene.store.invalidate(InvalidationScope(scene.spaces[0], chain[3]))
    with scene.store.fetch_batch(hit.lease_id, range(6), [0] * 6) as batch:
        assert batch.status.tolist() == [FetchStatus.OK] * 3 + [FetchStatus.GONE] * 3
    with pytest.raises(LeaseExpired, match="look up again"):
        scene.store.fetch(hit.lease_id, 4, 0)
    assert scene.store.stats().corrupt_blocks == 0


def test_a_leased_block_that_came_back_with_other_bytes_is_not_served_as_the_old_one(
    scene: Scene,
) -> None:
    chain = scene.chain(0, 0, "w")
    hit = scene.store.lookup(scene.spaces[0], chain, owner="t", lease_s=60)
    scene.store.invalidate(InvalidationScope(scene.spaces[0], chain[5]))
    scene.content = lambda key, nbytes: bytes([key[0]]) * nbytes
    scene.write(0, chain[5:], chain[4:5], "w", durable=True)
    assert scene.hits(0, chain) == 6
    with scene.store.fetch_batch(hit.lease_id, [5], [0]) as batch:
        assert batch.status.tolist() == [FetchStatus.GONE]
