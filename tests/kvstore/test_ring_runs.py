"""Reads that follow each other on the medium and in memory move as one, and each ends by itself."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from dualpath.kvstore import device_choice
from dualpath.kvstore.device import ALIGN_BYTES
from dualpath.kvstore.device_choice import open_device
from dualpath.kvstore.device_conformance import finish
from dualpath.kvstore.fd_file import FdFile
from dualpath.kvstore.io_mode import IoMode
from dualpath.kvstore.ring_device import RingDevice
from dualpath.kvstore.transfer_batch import UNDER_WAY, TransferBatch

pytestmark = pytest.mark.skipif(
    device_choice.ring_refusal() is not None, reason=str(device_choice.ring_refusal())
)
WAIT_S = 20.0


def protect(address: int, protection: int) -> None:
    """Change what may be done with a page."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address), ALIGN_BYTES, protection) == 0


def batch_of(file: FdFile, memory: memoryview, items: int) -> TransferBatch:
    """Pages one after another."""
    at = np.arange(items, dtype=np.int64) * ALIGN_BYTES
    nbytes = np.full(items, ALIGN_BYTES, np.int64)
    return TransferBatch([file], np.zeros(items, np.int32), at.copy(), memory, at, nbytes)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[RingDevice]:
    device = open_device(tmp_path / "segments", io=IoMode.IO_URING.value, depth=8)
    assert isinstance(device, RingDevice)
    yield device
    device.close()


class Pipe:
    """A file whose reads move only what somebody writes."""

    def __init__(self) -> None:
        reader, self.writer = os.pipe()
        self.file = FdFile(reader, 0, 1 << 20)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.file.close()
    os.close(pipe.writer)


def test_reads_that_move_as_one_end_as_their_bytes_come(device: RingDevice, pipe: Pipe) -> None:
    memory = memoryview(mmap.mmap(-1, 4 * ALIGN_BYTES))
    progress = device.read_batch(batch_of(pipe.file, memory, 4))
    for page in range(4):
        os.write(pipe.writer, bytes([page + 1]) * ALIGN_BYTES)
        assert progress.wait(WAIT_S).tolist() == [page]
        assert progress.errors.tolist() == [0] * (page + 1) + [UNDER_WAY] * (3 - page)
    assert memory == b"".join(bytes([page + 1]) * ALIGN_BYTES for page in range(4))


@pytest.mark.parametrize("bad", [{0}, {3}, {7}, {1, 2, 5}])
def test_of_reads_that_move_as_one_only_the_failing_fail(
    device: RingDevice, tmp_path: Path, bad: set[int]
) -> None:
    content = os.urandom(8 * ALIGN_BYTES)
    file = device.create("f", 8 * ALIGN_BYTES)
    (tmp_path / "segments" / "f").write_bytes(content)
    view = mmap.mmap(-1, 8 * ALIGN_BYTES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    for page in bad:  # memory that the kernel cannot write to
        protect(address + page * ALIGN_BYTES, mmap.PROT_READ)
    errors = finish(device.read_batch(batch_of(file, memoryview(view), 8)), 8)
    assert errors == [errno.EFAULT if page in bad else 0 for page in range(8)]
    for page in set(range(8)) - bad:
        part = slice(page * ALIGN_BYTES, (page + 1) * ALIGN_BYTES)
        assert view[part] == content[part]
    file.close()


def test_reads_find_their_places_whatever_their_order_and_size(
    device: RingDevice, tmp_path: Path
) -> None:
    content = os.urandom(700 * ALIGN_BYTES)
    file = device.create("f", 700 * ALIGN_BYTES)
    (tmp_path / "segments" / "f").write_bytes(content)
    random = np.random.default_rng(7)
    for _ in range(20):
        # Neighbours on the medium, some of which are neighbours in memory too.
        cuts = np.sort(random.choice(np.arange(1, 700), 60, replace=False)) * ALIGN_BYTES
        offset = np.concatenate(([0], cuts)).astype(np.int64)
        nbytes = np.diff(np.append(offset, 700 * ALIGN_BYTES))
        runs = np.array_split(np.arange(61), 9)
        at = np.zeros(61, np.int64)
        behind = 0
        for number in random.permutation(9):
            for item in runs[number]:
                at[item] = behind
                behind += int(nbytes[item])
        memory = memoryview(mmap.mmap(-1, 700 * ALIGN_BYTES))
        files = np.zeros(61, np.int32)
        batch = TransferBatch([file], files, offset, memory, at, nbytes)
        assert finish(device.read_batch(batch), 61) == [0] * 61
        for item in range(61):
            start, size = int(offset[item]), int(nbytes[item])
            assert batch.view(item) == content[start : start + size]
    file.close()


@pytest.mark.parametrize("sizes", [[1] * 5000, [3, 3000, 2, 2400, 1], [5000], [80] * 64 + [1]])
def test_a_paced_batch_comes_whole_whatever_its_size(tmp_path: Path, sizes: list[int]) -> None:
    device = open_device(tmp_path / "segments", io=IoMode.IO_URING.value, depth=64)
    nbytes = np.array(sizes, np.int64) * ALIGN_BYTES
    content = os.urandom(int(nbytes.sum()))
    file = device.create("f", len(content))
    (tmp_path / "segments" / "f").write_bytes(content)
    offset = nbytes.cumsum() - nbytes
    at = offset + ALIGN_BYTES * np.arange(len(sizes))  # so that none has a neighbour in memory
    memory = memoryview(mmap.mmap(-1, len(content) + len(sizes) * ALIGN_BYTES))
    files = np.zeros(len(sizes), np.int32)
    batch = TransferBatch([file], files, offset, memory, at, nbytes, paced=True)
    assert finish(device.read_batch(batch), len(sizes)) == [0] * len(sizes)
    for item in range(len(sizes)):
        assert batch.view(item) == content[offset[item] : offset[item] + nbytes[item]]
    file.close()
    device.close()


def test_a_cancel_ends_what_is_read_one_by_one(device: RingDevice, pipe: Pipe) -> None:
    view = mmap.mmap(-1, 4 * ALIGN_BYTES)
    protect(ctypes.addressof(ctypes.c_char.from_buffer(view)), mmap.PROT_READ)
    progress = device.read_batch(batch_of(pipe.file, memoryview(view), 4))
    os.write(pipe.writer, bytes(ALIGN_BYTES))
    while progress.pending > 2:  # the pipe keeps its page when the first finds no place for it
        assert len(progress.wait(WAIT_S))
    progress.cancel()
    deadline = time.monotonic() + WAIT_S
    while progress.pending and time.monotonic() < deadline:
        progress.wait(1.0)
    assert progress.errors.tolist() == [errno.EFAULT, 0] + [errno.ECANCELED] * 2
