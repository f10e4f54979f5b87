"""A device that fails on purpose, by a seed: a decorator over any other device.

Injects EIO on reads, writes and syncs, ENOSPC past a budget, reads that stop half-way, and bytes
that rot silently. `crash` does what power loss may do: each 512-byte sector written since the
last sync of its file keeps its new content or falls back to the synced one.
"""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from dualpath.kvstore.device import ALIGN_BYTES, Device, DeviceFile
from dualpath.kvstore.transfer_batch import (
    SerialProgress,
    TransferBatch,
    check_batch,
    read_one,
    write_one,
)

SECTOR_BYTES = 512


@dataclass(slots=True)
class FaultPlan:
    """What goes wrong, as probabilities of a call; may be changed while running.

    `space_bytes` bounds the bytes of all files (-1: no bound). Files named in `unreadable` and
    `unwritable` fail at each try.
    """

    seed: int = 0
    read_error: float = 0.0
    short_read: float = 0.0
    rot: float = 0.0
    write_error: float = 0.0
    torn_write: float = 0.0
    sync_error: float = 0.0
    space_bytes: int = -1
    unreadable: set[str] = field(default_factory=set)
    unwritable: set[str] = field(default_factory=set)


class FaultFile:
    """A file of a `FaultDevice`."""

    def __init__(self, device: FaultDevice, name: str, inner: DeviceFile) -> None:
        self._device = device
        self._name = name
        self._inner = inner

    @property
    def nbytes(self) -> int:
        """See DeviceFile."""
        return self._inner.nbytes

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """See DeviceFile."""
        plan, hits = self._device.plan, self._device.hits
        if self._name in plan.unreadable or hits(plan.read_error):
            raise OSError(errno.EIO, f"injected: read of {self._name} at {offset}")
        if hits(plan.short_read):
            self._inner.read(offset, buffers[:1])
            raise OSError(errno.EIO, f"injected: short read of {self._name} at {offset}")
        self._inner.read(offset, buffers)
        if hits(plan.rot) and buffers and buffers[0].nbytes:
            at = self._device.pick(buffers[0].nbytes)
            buffers[0][at] ^= 0x10

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """See DeviceFile."""
        plan, hits = self._device.plan, self._device.hits
        if self._name in plan.unwritable or hits(plan.write_error):
            raise OSError(errno.EIO, f"injected: write of {self._name} at {offset}")
        nbytes = sum(buffer.nbytes for buffer in buffers)
        self._device.note_write(self._name, self._inner, offset, nbytes)
        if hits(plan.torn_write) and buffers:
            half = buffers[0].nbytes // ALIGN_BYTES // 2 * ALIGN_BYTES
            self._inner.write(offset, [buffers[0][:half]])
            raise OSError(errno.EIO, f"injected: torn write of {self._name} at {offset}")
        self._inner.write(offset, buffers)

    def sync(self) -> None:
        """See DeviceFile."""
        if self._device.hits(self._device.plan.sync_error):
            raise OSError(errno.EIO, f"injected: sync of {self._name}")
        self._inner.sync()
        self._device.note_sync(self._name)

    def close(self) -> None:
        """See DeviceFile."""
        self._inner.close()


class FaultDevice:
    """See the module docstring."""

    def __init__(self, inner: Device, plan: FaultPlan) -> None:
        self._inner = inner
        self.plan = plan
        self._random = random.Random(plan.seed)
        self._lock = threading.Lock()
        self._unsynced: dict[str, dict[int, bytes]] = {}

    @property
    def in_files(self) -> bool:
        """See Device."""
        return self._inner.in_files

    @property
    def description(self) -> str:
        """See Device."""
        return f"faulty {self._inner.description}"

    def create(self, name: str, nbytes: int) -> FaultFile:
        """See Device."""
        if self.plan.space_bytes >= 0 and self._used_bytes() + nbytes > self.plan.space_bytes:
            raise OSError(errno.ENOSPC, f"injected: no space for {name} of {nbytes} bytes")
        return FaultFile(self, name, self._inner.create(name, nbytes))

    def open(self, name: str) -> FaultFile:
        """See Device."""
        return FaultFile(self, name, self._inner.open(name))

    def remove(self, name: str) -> None:
        """See Device."""
        self._inner.remove(name)
        with self._lock:
            self._unsynced.pop(name, None)

    def names(self) -> tuple[str, ...]:
        """See Device."""
        return self._inner.names()

    def close(self) -> None:
        """See Device."""
        self._inner.close()

    def read_batch(self, batch: TransferBatch) -> SerialProgress:
        """See Device. Each item meets its own faults."""
        check_batch(batch, ALIGN_BYTES)
        return SerialProgress(batch, read_one)

    def write_batch(self, batch: TransferBatch) -> SerialProgress:
        """See Device. Each item meets its own faults."""
        check_batch(batch, ALIGN_BYTES)
        return SerialProgress(batch, write_one)

    def crash(self) -> int:
        """Lose what power loss may lose; return how many sectors fell back. Nothing may be in
        use; the device works on afterwards."""
        lost = 0
        with self._lock:
            unsynced, self._unsynced = self._unsynced, {}
            for name, sectors in unsynced.items():
                file = self._inner.open(name)
                for page in sorted({sector * SECTOR_BYTES // ALIGN_BYTES for sector in sectors}):
                    lost += self._crash_page(file, page, sectors)
                file.sync()
                file.close()
        return lost

    def _crash_page(self, file: DeviceFile, page: int, sectors: dict[int, bytes]) -> int:
        content = memoryview(bytearray(ALIGN_BYTES))
        file.read(page * ALIGN_BYTES, [content])
        lost = 0
        for inside in range(0, ALIGN_BYTES, SECTOR_BYTES):
            before = sectors.get((page * ALIGN_BYTES + inside) // SECTOR_BYTES)
            if before is not None and self._random.random() < 0.5:
                content[inside : inside + SECTOR_BYTES] = before
                lost += 1
        file.write(page * ALIGN_BYTES, [content])
        return lost

    def hits(self, probability: float) -> bool:
        """Roll the dice."""
        with self._lock:
            return probability > 0 and self._random.random() < probability

    def pick(self, below: int) -> int:
        """A random index."""
        with self._lock:
            return self._random.randrange(below)

    def note_write(self, name: str, file: DeviceFile, offset: int, nbytes: int) -> None:
        """Keep the synced content of sectors that are about to change."""
        with self._lock:
            sectors = self._unsynced.setdefault(name, {})
            for start in range(offset, offset + nbytes, ALIGN_BYTES):
                if start // SECTOR_BYTES in sectors:
                    continue
                page = memoryview(bytearray(ALIGN_BYTES))
                file.read(start, [page])
                for inside in range(0, ALIGN_BYTES, SECTOR_BYTES):
                    at = (start + inside) // SECTOR_BYTES
                    sectors[at] = bytes(page[inside : inside + SECTOR_BYTES])

    def note_sync(self, name: str) -> None:
        """Everything written so far is safe."""
        with self._lock:
            self._unsynced.pop(name, None)

    def _used_bytes(self) -> int:
        total = 0
        for name in self._inner.names():
            file = self._inner.open(name)
            total += file.nbytes
            file.close()
        return total
