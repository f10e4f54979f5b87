"""A flush that failed says nothing of what was written before it, and neither does a later one."""

from __future__ import annotations

import errno
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from dualpath.kvstore import index_backlog
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.data_pump import DataPump, DataWrite
from dualpath.kvstore.device import Device
from dualpath.kvstore.durable_index import DurableIndex
from dualpath.kvstore.fd_file import FdFile
from dualpath.kvstore.fsck import Fsck
from dualpath.kvstore.fsck_repair import FsckRepair
from dualpath.kvstore.header_scan import FLUSHES_MAX
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.psync_device import PsyncDevice
from dualpath.kvstore.raw_device import RawDevice
from dualpath.kvstore.ssd_tier import SsdTier
from dualpath.kvstore.store_api import InvalidationScope, SealStatus

Content = Callable[[bytes, int], bytes]
SIZE = 300_000
WAIT_S = 20.0
CONFIG = StoreConfig(disk_bytes=8 << 20, dram_bytes=4 << 20, segment_bytes=2 << 20, io="psync")
BEFORE = list(chain_hashes(range(8000, 8016), 16))
FIRST = list(chain_hashes(range(32), 16))
SECOND = list(chain_hashes(range(4000, 4032), 16))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BlockStore]:
    """It tells its index nothing until it must."""
    monkeypatch.setattr(index_backlog, "LAG_S", math.inf)
    with BlockStore.open(tmp_path / "data", CONFIG) as opened:
        yield opened


class Putting:
    """Stores chains and knows what they hold."""

    def __init__(self, store: BlockStore, namespace: Namespace, content: Content) -> None:
        self.store, self.content = store, content
        self.space = store.open_namespace(namespace)

    def put(self, hashes: Sequence[bytes]) -> set[object]:
        data = [self.content(h, SIZE) for h in hashes]
        return set(self.store.put(self.space, hashes, parents_of(hashes), data))

    def segments(self, hashes: Sequence[bytes]) -> set[int]:
        state = self.store._state
        entry = state.catalog.entry(self.space)
        return {int(state.table.segment[state.catalog.row_of(entry, h)]) for h in hashes}

    def intact(self, store: BlockStore, hashes: Sequence[bytes]) -> int:
        blocks = store.get(self.space, hashes)
        assert blocks == [self.content(h, SIZE) for h in hashes[: len(blocks)]]
        return len(blocks)


@pytest.fixture
def putting(store: BlockStore, namespace: Namespace, content: Content) -> Putting:
    return Putting(store, namespace, content)


def failing(times: int, done: list[object]) -> Callable[[FdFile], None]:
    """A flush of a file that fails so many times; all are noted."""
    sync = FdFile.sync

    def flush(file: FdFile) -> None:
        done.append(file)
        if len(done) <= times:
            raise OSError(errno.EIO, "a bad moment")
        sync(file)

    return flush


def test_what_was_being_written_behind_a_failed_flush_is_written_elsewhere(
    putting: Putting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next flush succeeds, and would tell of bytes that nobody has."""
    committer = putting.store._committer
    finish, found = DataPump.finish, list[set[object]]()
    behind = threading.Thread(target=lambda: found.append(putting.put(SECOND)))

    def finish_late(pump: DataPump, write: DataWrite) -> Any:
        if not found and not behind.ident:
            behind.start()
            with committer._wake:
                assert committer._wake.wait_for(lambda: committer._jobs, WAIT_S)
        return finish(pump, write)

    assert putting.put(BEFORE) == {SealStatus.SEALED}
    monkeypatch.setattr(DataPump, "finish", finish_late)
    monkeypatch.setattr(FdFile, "sync", failing(1, []))
    assert putting.put(FIRST) == {SealStatus.SEALED}
    behind.join(WAIT_S)
    assert found == [{SealStatus.SEALED}]
    (sick,) = putting.segments(BEFORE)
    assert putting.store._state.ssd.failed_flushes(sick) == 1
    assert sick not in putting.segments(FIRST) | putting.segments(SECOND)


def test_segments_of_a_raw_device_are_flushed_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw"
    with raw.open("wb") as file:
        file.truncate(16 << 20)
    devices: list[tuple[Device, int]] = [
        (RawDevice(raw, owner="a" * 32), 1),
        (PsyncDevice(tmp_path / "files"), 0),
    ]
    for device, others in devices:
        ssd = SsdTier(device, 8 << 20, 2 << 20)
        places = [ssd.take(1 << 20) for _ in range(3)]
        one, other = sorted({place[0] for place in places if place is not None})[:2]
        for segment in (one, other):
            ssd.ensure(segment)
        with monkeypatch.context() as patch:
            patch.setattr(FdFile, "sync", failing(1, []))
            with pytest.raises(OSError, match="a bad moment"):
                ssd.sync(one)
            ssd.sync(other)
        assert (ssd.failed_flushes(one), ssd.failed_flushes(other)) == (1, others)
        ssd.close()
        device.close()


def opened(path: Path) -> BlockStore:
    return BlockStore.open(path, CONFIG)


def repaired(path: Path) -> BlockStore:
    """By its headers: it has no index."""
    shutil.rmtree(path / "index")
    with Fsck(path) as fsck:
        fsck.check()
        FsckRepair(fsck).run()
    return opened(path)


@pytest.mark.parametrize("failures", [1, FLUSHES_MAX])
@pytest.mark.parametrize(("opening", "at_once"), [(opened, 1), (repaired, 0)])
def test_what_is_found_by_headers_is_written_again_until_a_flush_succeeds(
    putting: Putting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    opening: Callable[[Path], BlockStore],
    at_once: int,
    failures: int,
) -> None:
    """What was acknowledged must not go because of one bad moment. The few blocks that an index was
    not told of are written `at_once`, a whole store only once a flush has failed."""
    assert putting.put(FIRST) == {SealStatus.SEALED}
    killed = shutil.copytree(tmp_path / "data", tmp_path / "killed")
    wrote: list[int] = []
    write = FdFile.write

    def noting_write(file: FdFile, offset: int, buffers: Sequence[memoryview]) -> None:
        wrote.append(sum(buffer.nbytes for buffer in buffers))
        write(file, offset, buffers)

    with monkeypatch.context() as patch:
        patch.setattr(FdFile, "write", noting_write)
        patch.setattr(FdFile, "sync", failing(failures, []))
        with opening(killed) as store:
            left = len(FIRST) if failures < FLUSHES_MAX else 0
            assert store.recovered.blocks == left
            assert putting.intact(store, FIRST) == left
    slots = [nbytes for nbytes in wrote if nbytes > SIZE]
    assert len(slots) == len(FIRST) * (min(failures, FLUSHES_MAX - 1) + at_once)


def test_what_failed_with_the_index_and_is_invalidated_does_not_come_back(
    putting: Putting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its header is whole, and of a generation that the index has never reached."""

    def refusing(*_what: object) -> None:
        raise OSError(errno.EIO, "a bad moment")

    with monkeypatch.context() as patch:
        patch.setattr(DurableIndex, "apply", refusing)
        putting.store._committer._backlog.refused = True
        assert putting.put(FIRST) == {SealStatus.FAILED}
    putting.store.invalidate(InvalidationScope(putting.space))
    killed = shutil.copytree(tmp_path / "data", tmp_path / "killed")
    with BlockStore.open(killed, CONFIG) as opened:
        assert opened.recovered.blocks == 0
