"""io_uring keeps the device contract; the kernel's own short, failing and endless transfers are
met with pipes, terminals and /dev/full."""

from __future__ import annotations

import errno
import mmap
import os
import pty
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from dualpath.kvstore import device_choice
from dualpath.kvstore.device import ALIGN_BYTES
from dualpath.kvstore.device_choice import open_device
from dualpath.kvstore.device_conformance import check_device, finish
from dualpath.kvstore.fd_file import FdFile
from dualpath.kvstore.io_mode import IoMode
from dualpath.kvstore.psync_device import PsyncDevice
from dualpath.kvstore.ring_device import RINGS_MAX, RingDevice
from dualpath.kvstore.ring_pool import NativeRing
from dualpath.kvstore.transfer_batch import UNDER_WAY, BatchProgress, TransferBatch
from dualpath.transfer.errors import InvalidRequest, Unavailable

needs_ring = pytest.mark.skipif(
    device_choice.ring_refusal() is not None, reason=str(device_choice.ring_refusal())
)
WAIT_S = 20.0


def pages(count: int) -> memoryview:
    return memoryview(mmap.mmap(-1, count * ALIGN_BYTES))


def ring_device(path: Path, depth: int = 8) -> RingDevice:
    device = open_device(path / "segments", io=IoMode.IO_URING.value, depth=depth)
    assert isinstance(device, RingDevice)
    return device


def batch_of(file: FdFile, memory: memoryview, items: int, each: int = 1) -> TransferBatch:
    at = np.arange(items, dtype=np.int64) * each * ALIGN_BYTES
    nbytes = np.full(items, each * ALIGN_BYTES, np.int64)
    return TransferBatch([file], np.zeros(items, np.int32), at.copy(), memory, at, nbytes)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[RingDevice]:
    device = ring_device(tmp_path)
    yield device
    device.close()


class Pipe:
    """A file whose reads move only what somebody writes, and otherwise never end."""

    def __init__(self, nbytes: int = 1 << 20) -> None:
        reader, self.writer = os.pipe()
        self.file = FdFile(reader, 0, nbytes)

    def close(self) -> None:
        self.file.close()
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def drain(progress: BatchProgress) -> list[int]:
    progress.cancel()
    deadline = time.monotonic() + WAIT_S
    while progress.pending and time.monotonic() < deadline:
        progress.wait(1.0)
    return [int(error) for error in progress.errors]


@needs_ring
@pytest.mark.parametrize("depth", [1, 3, 64])
def test_io_uring_keeps_the_contract(tmp_path: Path, depth: int) -> None:
    check_device(lambda: ring_device(tmp_path, depth), seed=depth)


@needs_ring
def test_io_uring_keeps_the_contract_without_direct_io_and_on_a_raw_device(tmp_path: Path) -> None:
    check_device(lambda: open_device(tmp_path / "a" / "segments", io="io_uring", direct=False))
    place = tmp_path / "raw"
    place.write_bytes(bytes(8 << 20))
    (tmp_path / "b").mkdir()
    made: list[object] = []

    def make() -> RingDevice:
        while made:
            made.pop().close()  # type: ignore[attr-defined]
        device = open_device(tmp_path / "b" / "segments", io="io_uring", raw=str(place), owner="s")
        made.append(device)
        assert isinstance(device, RingDevice)
        return device

    check_device(make)


@needs_ring
def test_a_short_read_goes_on_where_it_ended(device: RingDevice, pipe: Pipe) -> None:
    memory = pages(4)
    progress = device.read_batch(batch_of(pipe.file, memory, 1, each=4))
    content = bytes(range(1, 256)) * 100
    for page in range(4):
        assert not len(progress.wait(0.0))
        assert progress.errors.tolist() == [UNDER_WAY]
        os.write(pipe.writer, content[page : page + ALIGN_BYTES])
        deadline = time.monotonic() + WAIT_S
        # The pipe has one page at a time, so that each of the four reads is short.
        while not len(progress.wait(0.01)) and page == 3:
            assert time.monotonic() < deadline
    assert progress.pending == 0
    assert progress.errors.tolist() == [0]
    expected = b"".join(content[page : page + ALIGN_BYTES] for page in range(4))
    assert memory == expected


@needs_ring
def test_an_end_of_file_inside_an_item_is_eio_and_the_others_stand(
    device: RingDevice, tmp_path: Path
) -> None:
    file = device.create("f", 8 * ALIGN_BYTES)
    os.truncate(tmp_path / "segments" / "f", 5 * ALIGN_BYTES)
    progress = device.read_batch(batch_of(file, pages(8), 4, each=2))
    assert finish(progress, 4) == [0, 0, errno.EIO, errno.EIO]
    file.close()


@needs_ring
def test_an_error_of_the_medium_is_that_of_its_item(device: RingDevice) -> None:
    leader, follower = pty.openpty()
    os.close(follower)
    broken = FdFile(leader, 0, 1 << 20)
    progress = device.read_batch(batch_of(broken, pages(1), 1))
    assert finish(progress, 1) == [errno.EIO]
    broken.close()
    full = FdFile(os.open("/dev/full", os.O_RDWR), 0, 1 << 20)
    progress = device.write_batch(batch_of(full, pages(2), 2))
    assert finish(progress, 2) == [errno.ENOSPC] * 2
    full.close()


@needs_ring
def test_a_signal_interrupts_the_wait_and_nothing_else(device: RingDevice, pipe: Pipe) -> None:
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) == 3:
            os.write(pipe.writer, bytes([7]) * ALIGN_BYTES)

    before = signal.signal(signal.SIGALRM, note)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        memory = pages(1)
        progress = device.read_batch(batch_of(pipe.file, memory, 1))
        assert finish(progress, 1) == [0]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(seen) >= 3
    assert memory == bytes([7]) * ALIGN_BYTES


@needs_ring
def test_an_exception_of_a_signal_handler_loses_no_item(device: RingDevice, pipe: Pipe) -> None:
    class Stop(Exception):
        pass

    def stop(number: int, frame: FrameType | None) -> None:
        os.write(pipe.writer, bytes(ALIGN_BYTES))
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    try:
        progress = device.read_batch(batch_of(pipe.file, pages(1), 1))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(Stop):
            progress.wait(WAIT_S)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert finish(progress, 1) == [0]


@needs_ring
def test_a_read_that_never_ends_keeps_its_memory_until_it_is_cancelled(
    device: RingDevice, pipe: Pipe
) -> None:
    view = mmap.mmap(-1, 2 * ALIGN_BYTES)
    memory = memoryview(view)
    progress = device.read_batch(batch_of(pipe.file, memory, 2))
    began = time.monotonic()
    assert not len(progress.wait(0.05))
    assert time.monotonic() - began >= 0.05
    assert progress.pending == 2
    with pytest.raises(BufferError):
        memory.release()
    assert drain(progress) == [errno.ECANCELED] * 2
    memory.release()
    view.close()


@needs_ring
def test_a_cancelled_batch_leaves_a_ring_that_works(device: RingDevice, pipe: Pipe) -> None:
    for _ in range(3):
        assert drain(device.read_batch(batch_of(pipe.file, pages(20), 20))) == (
            [errno.ECANCELED] * 20
        )
    memory = pages(1)
    progress = device.read_batch(batch_of(pipe.file, memory, 1))
    os.write(pipe.writer, bytes([9]) * ALIGN_BYTES)
    assert finish(progress, 1) == [0]
    assert memory == bytes([9]) * ALIGN_BYTES


@needs_ring
def test_many_cancels_are_as_one(tmp_path: Path, pipe: Pipe) -> None:
    device = ring_device(tmp_path, depth=1)
    progress = device.read_batch(batch_of(pipe.file, pages(2), 2))
    for _ in range(50):
        progress.cancel()
    assert finish(progress, 2) == [errno.ECANCELED] * 2
    memory = pages(1)
    progress = device.read_batch(batch_of(pipe.file, memory, 1))
    os.write(pipe.writer, bytes([3]) * ALIGN_BYTES)
    assert finish(progress, 1) == [0]
    device.close()


@needs_ring
def test_a_batch_waits_for_a_ring_when_all_stand_still(tmp_path: Path) -> None:
    device = ring_device(tmp_path)
    pipes = [Pipe() for _ in range(RINGS_MAX)]
    stuck = [device.read_batch(batch_of(pipe.file, pages(1), 1)) for pipe in pipes]
    file = device.create("f", 4 * ALIGN_BYTES)
    late = device.read_batch(batch_of(file, pages(4), 4))
    given_up = device.read_batch(batch_of(file, pages(4), 4))
    assert not len(late.wait(0.05))
    given_up.cancel()
    assert finish(given_up, 4) == [errno.ECANCELED] * 4
    os.write(pipes[3].writer, bytes(ALIGN_BYTES))
    assert finish(stuck[3], 1) == [0]
    assert finish(late, 4) == [0] * 4
    for progress in stuck:
        drain(progress)
    for pipe in pipes:
        pipe.close()
    file.close()
    device.close()


@needs_ring
def test_a_batch_that_waited_for_a_ring_goes_on_in_the_same_wait(tmp_path: Path) -> None:
    device = ring_device(tmp_path)
    pipes = [Pipe() for _ in range(RINGS_MAX)]
    stuck = [device.read_batch(batch_of(pipe.file, pages(1), 1)) for pipe in pipes]
    file = device.create("f", 4 * ALIGN_BYTES)
    late = device.read_batch(batch_of(file, pages(4), 4))

    def end_one() -> None:
        os.write(pipes[0].writer, bytes(ALIGN_BYTES))
        finish(stuck[0], 1)

    ending = threading.Timer(0.05, end_one)
    ending.start()
    assert len(late.wait(WAIT_S))
    ending.join()
    while late.pending:
        assert len(late.wait(WAIT_S))
    assert late.errors.tolist() == [0] * 4
    for progress in stuck:
        drain(progress)
    for pipe in pipes:
        pipe.close()
    file.close()
    device.close()


@needs_ring
def test_other_threads_run_while_a_ring_waits(device: RingDevice, pipe: Pipe) -> None:
    progress = device.read_batch(batch_of(pipe.file, pages(1), 1))

    def write() -> None:
        os.write(pipe.writer, bytes(ALIGN_BYTES))

    writer = threading.Timer(0.05, write)
    writer.start()
    assert progress.wait(WAIT_S).tolist() == [0]
    writer.join()


@needs_ring
def test_pinned_memory_is_used_and_let_go(device: RingDevice) -> None:
    view = mmap.mmap(-1, 64 * ALIGN_BYTES)
    device.register(memoryview(view))
    assert "not registered" not in device.description
    file = device.create("f", 64 * ALIGN_BYTES)
    memory = memoryview(view)
    memory[:] = os.urandom(memory.nbytes)
    content = bytes(memory)
    assert finish(device.write_batch(batch_of(file, memory, 64)), 64) == [0] * 64
    memory[:] = bytes(memory.nbytes)
    assert finish(device.read_batch(batch_of(file, memory, 64)), 64) == [0] * 64
    assert memory == content
    elsewhere = pages(64)
    assert finish(device.read_batch(batch_of(file, elsewhere, 64)), 64) == [0] * 64
    assert elsewhere == content
    file.close()
    device.close()
    memory.release()
    view.close()


class Unpinned:
    """A ring of a process that may lock no memory."""

    def __init__(self, ring: NativeRing) -> None:
        self._ring = ring

    def register(self, memory: memoryview) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    def __getattr__(self, name: str) -> object:
        return getattr(self._ring, name)


@needs_ring
def test_memory_that_cannot_be_pinned_is_used_unpinned_and_told(tmp_path: Path) -> None:
    make = device_choice.make_ring
    assert make is not None
    device = RingDevice(PsyncDevice(tmp_path), lambda depth: Unpinned(make(depth)))  # type: ignore[arg-type,return-value]
    memory = pages(4)
    device.register(memory)
    assert "memory is not registered: Cannot allocate memory" in device.description
    file = device.create("f", 4 * ALIGN_BYTES)
    assert finish(device.read_batch(batch_of(file, memory, 4)), 4) == [0] * 4
    file.close()
    device.close()


@needs_ring
def test_the_native_ring_refuses_what_would_leave_its_memory() -> None:
    assert device_choice.make_ring is not None
    with pytest.raises(ValueError, match="depth"):
        device_choice.make_ring(0)
    ring = device_choice.make_ring(4)
    memory = pages(2)
    one = np.array([ALIGN_BYTES], np.int64)
    zero = np.zeros(1, np.int64)
    fd = np.zeros(1, np.int32)
    errors = np.zeros(1, np.int32)
    for at, nbytes in ((1, 2 * ALIGN_BYTES), (-1, 1), (0, 0), (0, -1), (2**62, 2**62), (0, 2**40)):
        with pytest.raises(ValueError, match="in memory at"):
            ring.start(
                False, fd, zero, memory, np.array([at]), np.array([nbytes]), errors, 0, False
            )
    with pytest.raises(ValueError, match="as many errors"):
        ring.start(False, fd, zero, memory, zero, one, np.zeros(2, np.int32), 0, False)
    with pytest.raises(ValueError, match="as many errors"):
        ring.start(False, fd, np.zeros(2, np.int64), memory, zero, one, errors, 0, False)
    with pytest.raises((BufferError, ValueError)):
        ring.start(False, fd, zero, memory.toreadonly(), zero, one, errors, 0, False)
    assert ring.pending == 0
    ring.start(
        False, np.array([-1 & 0x7FFFFFFF], np.int32), zero, memory, zero, one, errors, 0, False
    )
    with pytest.raises(ValueError, match="has not ended"):
        ring.start(False, fd, zero, memory, zero, one, errors, 0, False)
    with pytest.raises(ValueError, match="timeout_s"):
        ring.wait(np.zeros(1, np.int32), 1, float("nan"))
    with pytest.raises(ValueError, match="int32"):
        ring.wait(np.zeros(0, np.int32), 1, 0.0)
    assert ring.wait(np.zeros(1, np.int32), 1, WAIT_S) == 1
    assert errors.tolist() == [errno.EBADF]
    ring.close()
    ring.close()
    with pytest.raises(ValueError, match="closed"):
        ring.start(False, fd, zero, memory, zero, one, errors, 0, False)


@needs_ring
def test_a_ring_with_transfers_in_flight_is_not_closed(pipe: Pipe) -> None:
    assert device_choice.make_ring is not None
    ring = device_choice.make_ring(2)
    fds = np.array([pipe.file.hold()], np.int32)
    errors = np.zeros(1, np.int32)
    zero, page = np.zeros(1, np.int64), np.array([ALIGN_BYTES], np.int64)
    ring.start(False, fds, zero, pages(1), zero, page, errors, 0, False)
    with pytest.raises(ValueError, match="in flight"):
        ring.close()
    ring.cancel()
    assert ring.wait(np.zeros(1, np.int32), 1, WAIT_S) == 1
    ring.close()
    pipe.file.let_go()


@pytest.mark.parametrize(
    ("code", "word"),
    [(errno.ENOSYS, "too old"), (errno.EPERM, "seccomp"), (errno.ENOMEM, "ulimit")],
)
def test_without_io_uring_the_store_reads_by_threads_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, word: str
) -> None:
    def refuse(depth: int) -> NativeRing:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(device_choice, "make_ring", refuse)
    monkeypatch.setattr(device_choice, "_DISABLED", tmp_path / "none")
    device = open_device(tmp_path / "segments")
    assert isinstance(device, PsyncDevice)
    assert "psync" in device.description
    assert word in device.description
    check_device(lambda: open_device(tmp_path / "segments"))
    with pytest.raises(Unavailable, match="or set io to auto") as caught:
        open_device(tmp_path / "segments", io=IoMode.IO_URING.value)
    assert caught.value.reason == "no_io_uring"


def test_without_the_native_module_the_store_reads_by_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_choice, "make_ring", None)
    assert "native module" in open_device(tmp_path / "segments").description
    quiet = open_device(tmp_path / "segments", io=IoMode.PSYNC.value).description
    assert "native" not in quiet


def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="io must be one of auto, io_uring, psync"):
        open_device(tmp_path, io="aio")
    with pytest.raises(InvalidRequest, match="io_depth must lie in"):
        open_device(tmp_path, depth=0)
