"""`check_device`: what every implementation of the device port must do."""

from __future__ import annotations

import errno
import itertools
import mmap
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from dualpath.kvstore.device import ALIGN_BYTES, Device, DeviceFile
from dualpath.kvstore.transfer_batch import UNDER_WAY, BatchProgress, TransferBatch

_FILE_BYTES = 64 * ALIGN_BYTES
_ROUNDS = 200
_BATCHES = 24
_CROWD = 12
_WAIT_S = 60.0

_Item = tuple[int, int, int, int]
"""(file, offset, place in memory, bytes)."""


def check_device(make_device: Callable[[], Device], *, seed: int = 0) -> None:
    """Run the suite on devices over the same, at first empty, place. Raises AssertionError."""
    _check_names(make_device())
    _check_refusals(make_device())
    _check_content(make_device(), random.Random(seed))
    _check_batches(make_device(), random.Random(seed))
    _check_batch_refusals(make_device())
    _check_cancel(make_device())
    _check_batches_at_once(make_device())
    _check_reopen(make_device)


def _pages(count: int) -> memoryview:
    return memoryview(mmap.mmap(-1, count * ALIGN_BYTES))


def _expect(error_number: int, call: Callable[[], object]) -> None:
    found = None
    try:
        call()
    except OSError as error:
        found = error.errno
    assert found == error_number, f"errno {found} instead of {error_number}"


def _check_names(device: Device) -> None:
    assert device.description
    assert device.names() == ()
    device.create("b", _FILE_BYTES).close()
    device.create("a", _FILE_BYTES).close()
    assert device.names() == ("a", "b"), device.names()
    device.remove("a")
    device.remove("a")
    assert device.names() == ("b",)
    _expect(errno.ENOENT, lambda: device.open("a"))
    _expect(errno.EEXIST, lambda: device.create("b", _FILE_BYTES))
    device.remove("b")


def _check_refusals(device: Device) -> None:
    file = device.create("refusals", _FILE_BYTES)
    assert file.nbytes == _FILE_BYTES
    page = _pages(1)
    _expect(errno.EINVAL, lambda: file.read(512, [page]))
    _expect(errno.EINVAL, lambda: file.write(0, [page[:100]]))
    _expect(errno.EINVAL, lambda: file.read(_FILE_BYTES, [page]))
    _expect(errno.EINVAL, lambda: file.write(_FILE_BYTES - ALIGN_BYTES, [page, page]))
    file.close()
    file.close()
    device.remove("refusals")


def _check_content(device: Device, dice: random.Random) -> None:
    """Random reads and writes against a model; new files are zero."""
    file = device.create("content", _FILE_BYTES)
    model = bytearray(_FILE_BYTES)
    pages = _FILE_BYTES // ALIGN_BYTES
    for _ in range(_ROUNDS):
        first = dice.randrange(pages)
        counts = [dice.randint(1, 4) for _ in range(dice.randint(1, 3))]
        while first + sum(counts) > pages:
            counts.pop()
        buffers = [_pages(count) for count in counts]
        offset = first * ALIGN_BYTES
        end = offset + sum(counts) * ALIGN_BYTES
        if dice.random() < 0.5:
            for buffer in buffers:
                buffer[:] = dice.randbytes(buffer.nbytes)
            file.write(offset, buffers)
            model[offset:end] = b"".join(buffers)
        else:
            file.read(offset, buffers)
            assert b"".join(buffers) == model[offset:end], f"bytes [{offset}, {end}) differ"
        if dice.random() < 0.1:
            file.sync()
    file.close()
    device.remove("content")


def _check_reopen(make_device: Callable[[], Device]) -> None:
    device = make_device()
    file = device.create("kept", _FILE_BYTES)
    page = _pages(1)
    page[:] = bytes(range(256)) * (ALIGN_BYTES // 256)
    file.write(ALIGN_BYTES, [page])
    file.sync()
    file.close()
    again = make_device()
    assert again.names() == ("kept",)
    other = again.open("kept")
    assert other.nbytes == _FILE_BYTES
    found = _pages(2)
    other.read(0, [found])
    assert bytes(found[:ALIGN_BYTES]) == bytes(ALIGN_BYTES)
    assert found[ALIGN_BYTES:] == page
    other.close()
    again.remove("kept")


def _batch(
    files: Sequence[DeviceFile], memory: memoryview, items: Sequence[_Item]
) -> TransferBatch:
    columns = np.array(items, np.int64).reshape(-1, 4).T
    return TransferBatch(
        files, columns[0].astype(np.int32), columns[1], memory, columns[2], columns[3]
    )


def finish(progress: BatchProgress, items: int) -> list[int]:
    """Wait for all items of a batch; return their errors. Each must be told exactly once."""
    told: list[int] = []
    deadline = time.monotonic() + _WAIT_S
    while progress.pending:
        assert progress.pending == items - len(told)
        assert time.monotonic() < deadline, f"{progress.pending} of {items} items never ended"
        for item in progress.wait(1.0).tolist():
            assert progress.errors[item] != UNDER_WAY
            told.append(item)
    assert sorted(told) == list(range(items)), "an item was told twice, or never"
    assert not len(progress.wait(0.0)), "an item was told after the last"
    return [int(error) for error in progress.errors]


def _check_batches(device: Device, dice: random.Random) -> None:
    """Random batches over two files against models; items in any order, more than any depth."""
    files = [device.create(name, _FILE_BYTES) for name in ("batch-a", "batch-b")]
    models = [bytearray(_FILE_BYTES), bytearray(_FILE_BYTES)]
    memory = _pages(2 * _FILE_BYTES // ALIGN_BYTES)
    for turn in range(_BATCHES):
        items: list[_Item] = []
        for number in range(2):
            start = number * _FILE_BYTES
            items += [
                (number, page * ALIGN_BYTES, start + page * ALIGN_BYTES, count * ALIGN_BYTES)
                for page, count in _pieces(dice)
            ]
        dice.shuffle(items)
        writing = turn % 2 == 0
        if writing:
            memory[:] = dice.randbytes(memory.nbytes)
        else:
            memory[:] = bytes(memory.nbytes)
        batch = _batch(files, memory, items)
        progress = device.write_batch(batch) if writing else device.read_batch(batch)
        assert finish(progress, len(items)) == [0] * len(items)
        for number, offset, at, nbytes in items:
            if writing:
                models[number][offset : offset + nbytes] = memory[at : at + nbytes]
            else:
                expected = models[number][offset : offset + nbytes]
                assert memory[at : at + nbytes] == expected, f"bytes at {offset} differ"
    assert finish(device.read_batch(_batch(files, memory, [])), 0) == []
    for file, model in zip(files, models, strict=True):
        found = _pages(_FILE_BYTES // ALIGN_BYTES)
        file.read(0, [found])
        assert found == model, "a single read differs from what a batch wrote"
        file.close()
    device.remove("batch-a")
    device.remove("batch-b")


def _pieces(dice: random.Random) -> list[tuple[int, int]]:
    """(first page, pages) of some pieces of a file that do not overlap."""
    cuts = sorted(dice.sample(range(1, _FILE_BYTES // ALIGN_BYTES), dice.randint(1, 48)))
    edges = [0, *cuts, _FILE_BYTES // ALIGN_BYTES]
    pieces = [(a, b - a) for a, b in itertools.pairwise(edges)]
    return dice.sample(pieces, dice.randint(1, len(pieces)))


def _check_batch_refusals(device: Device) -> None:
    file = device.create("refusals", _FILE_BYTES)
    memory = _pages(2)
    page = ALIGN_BYTES
    wrong: list[_Item] = [
        (0, 512, 0, page),
        (0, 0, 512, page),
        (0, 0, 0, 100),
        (0, 0, 0, 0),
        (0, _FILE_BYTES, 0, page),
        (0, -page, 0, page),
        (0, 0, 2 * page, page),
        (0, 0, -page, page),
        (0, 0, 0, -page),
        (0, 0, 0, 1 << 62),
        (1, 0, 0, page),
        (-1, 0, 0, page),
    ]
    for item in wrong:
        batch = _batch([file], memory, [(0, 0, 0, page), item])
        _expect(errno.EINVAL, partial(device.read_batch, batch))
        _expect(errno.EINVAL, partial(device.write_batch, batch))
    file.close()
    device.remove("refusals")


def _check_cancel(device: Device) -> None:
    """Every item of a cancelled batch ends, moved or not, and the device goes on."""
    file = device.create("cancel", _FILE_BYTES)
    pages = _FILE_BYTES // ALIGN_BYTES
    memory = _pages(pages)
    items = [(0, page * ALIGN_BYTES, page * ALIGN_BYTES, ALIGN_BYTES) for page in range(pages)]
    for _ in range(4):
        progress = device.read_batch(_batch([file], memory, items))
        progress.cancel()
        progress.cancel()
        assert set(finish(progress, pages)) <= {0, errno.ECANCELED}
    assert finish(device.read_batch(_batch([file], memory, items)), pages) == [0] * pages
    file.close()
    device.remove("cancel")


def _check_batches_at_once(device: Device) -> None:
    """More batches than a device may have rings or threads, driven by threads; then a file is
    closed under a batch that has begun."""
    file = device.create("crowd", _FILE_BYTES)
    pages = _FILE_BYTES // ALIGN_BYTES
    content = _pages(pages)
    content[:] = random.Random(7).randbytes(content.nbytes)
    file.write(0, [content])
    items = [(0, page * ALIGN_BYTES, page * ALIGN_BYTES, ALIGN_BYTES) for page in range(pages)]

    def read(_: int) -> bool:
        memory = _pages(pages)
        errors = finish(device.read_batch(_batch([file], memory, items)), pages)
        return errors == [0] * pages and memory == content

    with ThreadPoolExecutor(_CROWD) as pool:
        assert all(pool.map(read, range(4 * _CROWD)))
    memory = _pages(pages)
    progress = device.read_batch(_batch([file], memory, items))
    file.close()
    for item, error in enumerate(finish(progress, pages)):
        at = item * ALIGN_BYTES
        assert error or memory[at : at + ALIGN_BYTES] == content[at : at + ALIGN_BYTES]
    device.remove("crowd")
