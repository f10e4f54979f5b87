"""A file system that stops as at a loss of power: what ext4's journal brings back is whole.

The emulation of power losses (power_loss.py) is stricter than any file system; this one is real.
ext4 on a loop device is shut down under a running store by an ioctl that flushes nothing, mounted
again, and the store in it verified. Needs root.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dualpath.bench.soak.children import Nursery
from dualpath.bench.soak.kill_rounds import noted_load
from dualpath.bench.soak.place import DeviceKind, make_place
from dualpath.bench.soak.verification import Expected, Verdict, verify
from dualpath.bench.soak.witness import Claims, read_notes
from dualpath.bench.soak.workload import LoadPlan

pytestmark = [pytest.mark.root, pytest.mark.timeout(280)]

_SHUTDOWN = 2 << 30 | 4 << 16 | ord("X") << 8 | 125
"""EXT4_IOC_SHUTDOWN."""
_NO_LOG_FLUSH = 2
_ROUNDS = 8
_WAIT_S = 100.0


def run(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


class LoopDisk:
    """ext4 on a loop device."""

    def __init__(self, folder: Path) -> None:
        image = folder / "image"
        with image.open("wb") as file:
            file.truncate(256 << 20)
        run("mkfs.ext4", "-q", "-F", str(image))
        self.path = folder / "mounted"
        self.path.mkdir()
        self._device = run("losetup", "--find", "--show", str(image))
        self.mount()

    def mount(self) -> None:
        run("mount", self._device, str(self.path))

    def cut(self) -> None:
        """The power goes: whatever was not flushed is lost."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def unmount(self) -> None:
        run("umount", str(self.path))

    def close(self) -> None:
        subprocess.run(["umount", str(self.path)], check=False, capture_output=True)
        run("losetup", "--detach", self._device)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[LoopDisk]:
    if os.geteuid():
        pytest.skip("not root")
    if not all(map(shutil.which, ("mkfs.ext4", "losetup", "mount"))):
        pytest.skip("no mkfs.ext4, losetup or mount")
    try:
        made = LoopDisk(tmp_path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no ext4 on a loop device here: {error.stderr}")
    try:
        yield made
    finally:
        made.close()


def test_a_file_system_that_stops_loses_nothing_that_was_acknowledged(
    disk: LoopDisk, tmp_path: Path
) -> None:
    nursery = Nursery(None, tmp_path / "said")
    dice = random.Random(5)
    claims, notes = Claims(), tmp_path / "notes"
    root = disk.path / "store"
    make_place(root, DeviceKind.PSYNC.family)
    disk.unmount()  # so that it is there for good
    disk.mount()
    for _ in range(_ROUNDS):
        notes.unlink(missing_ok=True)
        device = dice.choice([DeviceKind.PSYNC, DeviceKind.RING])
        plan = LoadPlan(root, dice.getrandbits(32), device, 100_000)
        child = nursery.start(noted_load, plan, notes, tmp_path / "log", 0)
        child.hear(_WAIT_S)
        time.sleep(dice.uniform(0.05, 1.0))
        disk.cut()
        assert child.kill() == -9
        disk.unmount()
        disk.mount()
        claims.follow(read_notes(notes.read_bytes()))
        expected = Expected(frozenset(claims.durable), frozenset(claims.invalidated))
        verdict: Verdict = nursery.call(
            verify, root, device, expected, dice.random() < 0.5, wait_s=_WAIT_S
        )
        assert not verdict.bad, verdict.bad
        assert not claims.broken
        claims.restart(verdict.left)
    assert claims.acknowledged > 0
