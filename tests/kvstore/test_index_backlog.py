"""Blocks are durable before the index knows them: what an opening finds, and what it must not."""

from __future__ import annotations

import errno
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dualpath.kvstore import index_backlog
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.block_table import GONE
from dualpath.kvstore.block_writer import BlockWriter
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.commit_job import CommitJob
from dualpath.kvstore.directory_format import read_clean
from dualpath.kvstore.durable_index import DurableIndex, IndexFailure
from dualpath.kvstore.fd_file import FdFile
from dualpath.kvstore.fsck import Fsck
from dualpath.kvstore.fsck_repair import FsckRepair
from dualpath.kvstore.fsck_report import FsckCode
from dualpath.kvstore.header_writer import HeaderWriter
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.segment import SegmentGeometry, decode_superblock
from dualpath.kvstore.ssd_tier import SsdTier
from dualpath.kvstore.store_api import InvalidationScope, MissReason, ReserveStatus, SealStatus

Content = Callable[[bytes, int], bytes]
SIZE = 300_000
WAIT_S = 20.0
CONFIG = StoreConfig(disk_bytes=8 << 20, dram_bytes=4 << 20, segment_bytes=2 << 20)


def chain(blocks: int, first_token: int = 0) -> list[bytes]:
    return chain_hashes(range(first_token, first_token + 16 * blocks), 16)


class Rig:
    """A store that tells its index nothing until it must, and copies of what a crash leaves."""

    def __init__(self, root: Path, namespace: Namespace, content: Content) -> None:
        self.root, self.namespace, self.content = root, namespace, content
        self.crashes = 0
        self.store = BlockStore.open(root / "data", CONFIG)
        self.space = self.store.open_namespace(namespace)

    def put(self, hashes: Sequence[bytes]) -> list[object]:
        data = [self.content(h, SIZE) for h in hashes]
        return list(self.store.put(self.space, hashes, parents_of(hashes), data))

    def stored(self, hashes: Sequence[bytes]) -> None:
        wanted = {SealStatus.SEALED, ReserveStatus.EXISTS}
        assert set(self.put(hashes)) <= wanted

    def told(self) -> None:
        assert self.store._committer.await_told(WAIT_S) == ""

    def settles(self) -> bool:
        """Whether the index is told without anybody asking for it."""
        committer = self.store._committer
        with committer._wake:
            return committer._wake.wait_for(lambda: committer._backlog._told >= self.added, WAIT_S)

    @property
    def added(self) -> int:
        return self.store._committer._backlog._added

    def crashed(self) -> Path:
        """What kill -9 would leave now."""
        self.crashes += 1
        return Path(shutil.copytree(self.root / "data", self.root / f"crash-{self.crashes}"))

    def intact(self, store: BlockStore, hashes: Sequence[bytes]) -> int:
        space = store.open_namespace(self.namespace)
        blocks = store.get(space, hashes)
        assert blocks == [self.content(h, SIZE) for h in hashes[: len(blocks)]]
        return len(blocks)


@pytest.fixture
def rig(
    tmp_path: Path, namespace: Namespace, content: Content, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Rig]:
    monkeypatch.setattr(index_backlog, "LAG_S", math.inf)
    made = Rig(tmp_path, namespace, content)
    yield made
    made.store.close()


def place_of(store: BlockStore, namespace: Namespace, block: bytes) -> tuple[int, int]:
    catalog, table = store._state.catalog, store._state.table
    row = catalog.row_of(catalog.entry(namespace.id), block)
    return int(table.segment[row]), int(table.slot[row])


def flip(path: Path, place: tuple[int, int]) -> None:
    """A bit in the middle of a block's data."""
    segment = path / "segments" / f"segment-{place[0]:08d}"
    with segment.open("r+b") as file:
        geometry: SegmentGeometry = decode_superblock(
            memoryview(file.read(4096)), place[0], segment.name
        )
        at = geometry.slot_offset(place[1]) + SIZE // 2
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def test_blocks_that_the_index_was_not_told_of_are_found_and_told(rig: Rig) -> None:
    rig.stored(chain(2))
    rig.told()
    rig.stored(chain(5))  # three more
    path = rig.crashed()
    with BlockStore.open(path, CONFIG) as store:
        assert (store.recovered.newer, store.recovered.dropped) == (3, 0)
        assert not store.recovered.rebuilt
        assert rig.intact(store, chain(5)) == 5
        again = Path(shutil.copytree(path, rig.root / "again"))
    with BlockStore.open(again, CONFIG) as store:
        assert store.recovered.newer == 0, "the opening has told the index"
        assert rig.intact(store, chain(5)) == 5
    with BlockStore.open(path, CONFIG) as store:
        assert store.recovered.from_snapshot
        assert rig.intact(store, chain(5)) == 5


def test_a_newer_block_that_is_torn_is_not_taken_nor_what_hangs_below(rig: Rig) -> None:
    rig.stored(chain(1))
    rig.told()
    rig.stored(chain(4))
    path = rig.crashed()
    flip(path, place_of(rig.store, rig.namespace, chain(4)[2]))
    with BlockStore.open(path, CONFIG) as store:
        assert (store.recovered.newer, store.recovered.dropped) == (1, 0)
        assert rig.intact(store, chain(4)) == 2
        space = store.open_namespace(rig.namespace)
        data = [rig.content(h, SIZE) for h in chain(4)]
        assert (
            list(store.put(space, chain(4), parents_of(chain(4)), data))[2:]
            == [SealStatus.SEALED] * 2
        )
        assert rig.intact(store, chain(4)) == 4


@pytest.mark.parametrize("whole", [False, True])
def test_what_was_invalidated_before_the_index_knew_it_does_not_come_back(
    rig: Rig, whole: bool
) -> None:
    rig.stored(chain(3))
    rig.stored(chain(2, 5000))
    scope = InvalidationScope(rig.space) if whole else InvalidationScope(rig.space, chain(3)[1])
    assert rig.store.invalidate(scope).blocks == (5 if whole else 2)
    path = rig.crashed()
    (path / "index" / "data.mdb").unlink()
    for directory in (rig.crashed(), path):
        with BlockStore.open(directory, CONFIG) as store:
            assert rig.intact(store, chain(3)) == (0 if whole else 1)
            assert rig.intact(store, chain(2, 5000)) == (0 if whole else 2)


def test_all_blocks_of_a_writer_are_found_though_the_index_was_not_told(rig: Rig) -> None:
    rig.stored(chain(3))
    writer = "embedded"
    assert rig.store.invalidate(InvalidationScope(writer=writer), dry_run=True).blocks == 3
    assert rig.store.invalidate(InvalidationScope(writer=writer)).blocks == 3
    with BlockStore.open(rig.crashed(), CONFIG) as store:
        assert rig.intact(store, chain(3)) == 0


def test_generations_go_on_behind_what_the_index_reaches(rig: Rig) -> None:
    """Were one given out again, the next crash would take its block for told."""
    rig.stored(chain(1))
    rig.stored(chain(4, 7000))
    scope = InvalidationScope(rig.space, chain(4, 7000)[0])
    assert rig.store.invalidate(scope).blocks == 4, "the highest generations are gone"
    path = rig.crashed()
    with BlockStore.open(path, CONFIG) as store:
        space = store.open_namespace(rig.namespace)
        block = chain(1, 9000)
        store.put(space, block, parents_of(block), [rig.content(block[0], SIZE)])
        killed = Path(shutil.copytree(path, rig.root / "killed"))
    with BlockStore.open(killed, CONFIG) as store:
        assert rig.intact(store, chain(1, 9000)) == 1
        assert store.recovered.newer == 1


def test_the_index_is_told_at_once_of_more_than_the_bound(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_backlog, "LAG_JOBS", 3)
    rig.stored(chain(2))
    assert not rig.store._committer.settled
    rig.stored(chain(4))
    assert rig.settles()
    monkeypatch.setattr(index_backlog, "LAG_BYTES", SIZE)
    rig.stored(chain(5))
    assert rig.settles()
    with BlockStore.open(rig.crashed(), CONFIG) as store:
        assert store.recovered.newer == 0
        assert rig.intact(store, chain(5)) == 5


def test_a_close_that_cannot_tell_the_index_is_not_clean_and_costs_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_what: object) -> None:
        raise IndexFailure(errno.EIO, "the medium is sick")

    rig.stored(chain(3))
    monkeypatch.setattr(rig.store._index, "apply", refuse)
    rig.store.close()
    assert read_clean(rig.root / "data") is None
    with BlockStore.open(rig.root / "data", CONFIG) as store:
        assert store.recovered.newer == 3
        assert rig.intact(store, chain(3)) == 3


def test_blocks_in_slots_of_others_are_found_after_any_crash(rig: Rig) -> None:
    """At capacity each new block takes the slot of one that left."""
    for turn in range(12):
        rig.stored(chain(4, 10_000 * turn))
        with BlockStore.open(rig.crashed(), CONFIG) as store:
            assert rig.intact(store, chain(4, 10_000 * turn)) == 4
            for earlier in range(turn):
                rig.intact(store, chain(4, 10_000 * earlier))
            assert store.recovered.dropped == 0
        shutil.rmtree(rig.root / f"crash-{rig.crashes}")
    assert sum(rig.store.stats().evicted_blocks.values()) > 0


def test_fsck_tells_of_newer_blocks_and_a_repair_keeps_them(rig: Rig) -> None:
    rig.stored(chain(2))
    rig.told()
    rig.stored(chain(4))
    path = rig.crashed()
    with Fsck(path) as fsck:
        report = fsck.check()
        assert report.problems == 0
        assert report.counts[FsckCode.NEWER_BLOCK] == 2
    flip(path, place_of(rig.store, rig.namespace, chain(2)[0]))
    lost = rig.crashed()
    (lost / "index" / "data.mdb").unlink()
    for directory, served in ((path, 0), (lost, 4)):
        with Fsck(directory) as fsck:
            assert fsck.check().problems > 0
            assert FsckRepair(fsck).run().problems == 0
        with BlockStore.open(directory, CONFIG) as store:
            assert rig.intact(store, chain(4)) == served


def test_what_is_invalidated_after_its_header_was_written_does_not_come_back(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers are written before it is decided whether their blocks are still wanted."""
    rig.stored(chain(1))
    reached, released = threading.Event(), threading.Event()
    admit = BlockWriter.admit

    def slow_admit(writer: BlockWriter, jobs: Sequence[CommitJob]) -> None:
        assert all(job.encoded for job in jobs), "the headers are written"
        reached.set()
        assert released.wait(WAIT_S)
        admit(writer, jobs)

    monkeypatch.setattr(BlockWriter, "admit", slow_admit)
    later = chain(3, 8000)
    putting = threading.Thread(target=rig.put, args=(later,))
    putting.start()
    assert reached.wait(WAIT_S)
    scope = InvalidationScope(rig.space, later[0])
    invalidating = threading.Thread(target=rig.store.invalidate, args=(scope,))
    invalidating.start()
    table, pending = rig.store._state.table, rig.store._state.catalog.entry(rig.space).pending
    row = pending[later[0]]
    assert until(lambda: int(table.parent[row]) == GONE)
    released.set()
    for thread in (putting, invalidating):
        thread.join(WAIT_S)
    path = rig.crashed()
    (path / "index" / "data.mdb").unlink()
    with BlockStore.open(path, CONFIG) as store:
        assert store.recovered.blocks == 1
        assert rig.intact(store, chain(1)) == 1


def until(is_so: Callable[[], bool]) -> bool:
    """Whether it becomes so in time."""
    deadline = time.monotonic() + WAIT_S
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.001)
    return is_so()


def fail_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next flush of a segment fails."""
    sync, left = SsdTier.sync, [OSError(errno.EIO, "a bad moment")]

    def failing(ssd: SsdTier, segment: int) -> None:
        if left:
            raise left.pop()
        sync(ssd, segment)

    monkeypatch.setattr(SsdTier, "sync", failing)


@pytest.mark.parametrize("segments", [1, 4])
@pytest.mark.parametrize("index_lost", [False, True])
def test_what_failed_once_and_is_invalidated_does_not_come_back(
    tmp_path: Path,
    namespace: Namespace,
    content: Content,
    monkeypatch: pytest.MonkeyPatch,
    segments: int,
    index_lost: bool,
) -> None:
    """With another segment the blocks find another place; else they are given up."""
    monkeypatch.setattr(index_backlog, "LAG_S", math.inf)
    config = replace(CONFIG, disk_bytes=segments * CONFIG.segment_bytes)
    with BlockStore.open(tmp_path / "data", config) as store:
        space = store.open_namespace(namespace)
        data = [content(h, SIZE) for h in chain(4)]
        fail_once(monkeypatch)
        statuses = set(store.put(space, chain(4), parents_of(chain(4)), data))
        assert statuses == {SealStatus.SEALED if segments > 1 else SealStatus.FAILED}
        store.invalidate(InvalidationScope(space))
        path = Path(shutil.copytree(tmp_path / "data", tmp_path / "copy"))
    if index_lost:
        (path / "index" / "data.mdb").unlink()
    with BlockStore.open(path, config) as store:
        assert store.recovered.blocks == 0


def test_an_opening_flushes_what_it_found_before_the_index_tells_of_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed process wrote may be in a cache only."""
    rig.stored(chain(3))
    path, sick = rig.crashed(), rig.crashed()
    done: list[str] = []
    sync, apply = FdFile.sync, DurableIndex.apply

    def noting_sync(file: FdFile) -> None:
        done.append("flush")
        sync(file)

    def noting_apply(index: DurableIndex, deletes: Any, puts: Any, reached: Any = None) -> None:
        done.extend(["told"] * bool(puts))
        apply(index, deletes, puts, reached)

    with monkeypatch.context() as patch:
        patch.setattr(FdFile, "sync", noting_sync)
        patch.setattr(DurableIndex, "apply", noting_apply)
        with BlockStore.open(path, CONFIG) as store:
            assert store.recovered.newer == 3
    assert "flush" in done[: done.index("told")]

    def failing(_file: FdFile) -> None:
        raise OSError(errno.EIO, "the cache could not be written")

    with monkeypatch.context() as patch:
        patch.setattr(FdFile, "sync", failing)
        with BlockStore.open(sick, CONFIG) as store:
            assert (store.recovered.newer, store.recovered.blocks) == (0, 0)


@pytest.mark.parametrize("where", ["headers", "data", "segment", "index", "settle"])
def test_a_surprise_fails_a_put_and_the_store_goes_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    kind, name = {
        "headers": (HeaderWriter, "write"),
        "data": (SsdTier, "locate"),
        "segment": (SsdTier, "ensure"),
        "index": (DurableIndex, "apply"),
        "settle": (BlockWriter, "settle"),
    }[where]
    rig.stored(chain(1))
    whole, left = getattr(kind, name), [MemoryError("out of the blue")]

    def surprising(*what: Any) -> Any:
        if left:
            raise left.pop()
        return whole(*what)

    with monkeypatch.context() as patch:
        patch.setattr(kind, name, surprising)
        patch.setattr(index_backlog, "LAG_JOBS", 1)
        rig.put(chain(2, 4000))
        rig.told()
        assert not left, "it happened"
    rig.stored(chain(3, 8000))
    with BlockStore.open(rig.crashed(), CONFIG) as store:
        assert rig.intact(store, chain(1)) == 1
        assert rig.intact(store, chain(3, 8000)) == 3
        assert rig.intact(store, chain(2, 4000)) == rig.intact(rig.store, chain(2, 4000))
    rig.store.close()
    assert read_clean(rig.root / "data") is not None


def test_an_older_index_reaches_beyond_all_headers_once_it_is_brought_up_to_date(
    rig: Rig,
) -> None:
    """Those of blocks that left long ago have the highest generations."""
    rig.stored(chain(1))
    rig.stored(chain(4, 7000))
    rig.told()
    path = rig.crashed()
    index = DurableIndex(path / "index")
    assert index._sums is not None
    index._sums.generation = None
    left = chain(4, 7000)
    index.apply([(rig.space + each, -1) for each in left], [])
    index.close()
    with BlockStore.open(path, CONFIG) as store:
        assert rig.intact(store, left) == 0
        space, block = store.open_namespace(rig.namespace), chain(1, 9000)
        store.put(space, block, parents_of(block), [rig.content(block[0], SIZE)])
        killed = Path(shutil.copytree(path, rig.root / "killed"))
    with BlockStore.open(killed, CONFIG) as store:
        assert rig.intact(store, left) == 0, "nobody stored them again"
        assert rig.intact(store, block) == 1


def test_a_moved_block_is_acknowledged_once_the_index_knows_where_it_is(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first place has a whole header, too, of the same generation, that was never flushed."""
    rig.stored(chain(1))
    fail_once(monkeypatch)
    rig.stored(chain(4, 4000))
    path = rig.crashed()
    with BlockStore.open(path, CONFIG) as store:
        assert store.recovered.newer == 0
        for block in chain(4, 4000):
            assert place_of(store, rig.namespace, block) == place_of(
                rig.store, rig.namespace, block
            )
        assert rig.intact(store, chain(4, 4000)) == 4


def test_an_older_record_of_a_newer_orphan_does_not_come_back(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block under two parents: the index tells of the first, a header of the second."""
    rig.stored(chain(1))
    block, parent = chain(1)[0], chain(1, 5000)[0]
    rig.told()
    state = rig.store._state
    with state.lock:
        state.residency.drop(
            state.catalog.row_of(state.catalog.entry(rig.space), block), MissReason.EVICTED
        )
    rig.stored([parent])
    data = [rig.content(block, SIZE)]
    assert list(rig.store.put(rig.space, [block], [parent], data)) == [SealStatus.SEALED]
    path = rig.crashed()
    flip(path, place_of(rig.store, rig.namespace, parent))
    with BlockStore.open(path, CONFIG) as store:
        assert store.recovered.blocks == 0
        assert not list(store._index.records())
