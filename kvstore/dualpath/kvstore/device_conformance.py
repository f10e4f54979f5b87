"""`check_device`: what every implementation of the device port must do."""

from __future__ import annotations

import errno
import mmap
import random
from collections.abc import Callable

from dualpath.kvstore.device import ALIGN_BYTES, Device

_FILE_BYTES = 64 * ALIGN_BYTES
_ROUNDS = 200


def check_device(make_device: Callable[[], Device], *, seed: int = 0) -> None:
    """Run the suite on devices over the same, at first empty, place. Raises AssertionError."""
    _check_names(make_device())
    _check_refusals(make_device())
    _check_content(make_device(), random.Random(seed))
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
