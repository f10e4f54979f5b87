"""Every device keeps the device contract; the psync device continues what the kernel cuts."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from dualpath.kvstore.device import ALIGN_BYTES, MemoryDevice
from dualpath.kvstore.device_conformance import check_device
from dualpath.kvstore.fault_device import FaultDevice, FaultPlan
from dualpath.kvstore.psync_device import PsyncDevice
from dualpath.kvstore.raw_device import RawDevice


def test_the_direct_device_keeps_the_contract(tmp_path: Path) -> None:
    check_device(lambda: PsyncDevice(tmp_path))


def test_the_buffered_device_keeps_the_contract(tmp_path: Path) -> None:
    check_device(lambda: PsyncDevice(tmp_path, direct=False))
    assert "off in the configuration" in PsyncDevice(tmp_path, direct=False).description


def test_the_raw_device_keeps_the_contract_on_a_file(tmp_path: Path) -> None:
    place = tmp_path / "raw"
    place.write_bytes(bytes(8 << 20))
    devices: list[RawDevice] = []

    def make() -> RawDevice:
        for device in devices:
            device.close()
        devices.append(RawDevice(place, owner="store-1"))
        return devices[-1]

    check_device(make)


def test_the_memory_device_keeps_the_contract() -> None:
    device = MemoryDevice()
    check_device(lambda: device)


def test_a_faulty_device_without_faults_keeps_the_contract() -> None:
    inner = MemoryDevice()
    check_device(lambda: FaultDevice(inner, FaultPlan(seed=1)))


def test_a_refusal_of_direct_io_falls_back_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    assert "refuses O_DIRECT: open: Invalid argument" in PsyncDevice(tmp_path).description
    check_device(lambda: PsyncDevice(tmp_path))


def test_a_refusal_at_the_first_transfer_falls_back_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", refuse)
        device = PsyncDevice(tmp_path)
    assert "transfer: Invalid argument" in device.description


@pytest.mark.parametrize("most", [ALIGN_BYTES, ALIGN_BYTES + 100, 3 * ALIGN_BYTES])
def test_short_transfers_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """The kernel may move less than asked, even to an odd byte."""
    read, write = os.preadv, os.pwritev

    def cut(buffers: Sequence[memoryview]) -> list[memoryview]:
        kept, left = [], most
        for buffer in buffers:
            kept.append(memoryview(buffer)[:left])
            left -= kept[-1].nbytes
            if left == 0:
                break
        return kept

    device = PsyncDevice(tmp_path, direct=False)
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: read(fd, cut(b), at))
    monkeypatch.setattr(os, "pwritev", lambda fd, b, at: write(fd, cut(b), at))
    check_device(lambda: device)


def test_a_transfer_that_never_moves_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = PsyncDevice(tmp_path).create("f", ALIGN_BYTES)
    page = memoryview(mmap.mmap(-1, ALIGN_BYTES))
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, at: 100)
    with pytest.raises(OSError, match="no progress"):
        file.write(0, [page])
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: 0)
    with pytest.raises(OSError, match="end of file"):
        file.read(0, [page])


def test_a_crash_keeps_what_was_synced_and_may_lose_the_rest() -> None:
    device = FaultDevice(MemoryDevice(), FaultPlan(seed=3))
    file = device.create("f", 16 * ALIGN_BYTES)
    old = memoryview(mmap.mmap(-1, 8 * ALIGN_BYTES))
    old[:] = b"o" * old.nbytes
    file.write(0, [old])
    file.sync()
    new = memoryview(mmap.mmap(-1, 4 * ALIGN_BYTES))
    new[:] = b"n" * new.nbytes
    file.write(4 * ALIGN_BYTES, [new])
    assert device.crash() > 0
    file.read(0, [old])
    found = bytes(old)
    assert found[: 4 * ALIGN_BYTES] == b"o" * 4 * ALIGN_BYTES
    rest = found[4 * ALIGN_BYTES :]
    assert set(rest) == {ord("o"), ord("n")}
    assert all(len(set(rest[i : i + 512])) == 1 for i in range(0, len(rest), 512))


def test_a_full_disk_is_named_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    device = PsyncDevice(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        device.create("f", ALIGN_BYTES)
    assert device.names() == ()
