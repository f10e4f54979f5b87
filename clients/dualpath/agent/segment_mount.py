"""A daemon's segment files, read by ourselves from a mount that holds its data directory.

Owns the open files, the buffers and the reads. Any directory that shows the same files as the
daemon's does: a parallel file system (3FS, Lustre, CephFS) on both nodes, or the same disk. Never
writes there and takes no lock. Guarantees that the bytes handed out are those of the file at that
place, and nothing about what they mean: the caller verifies.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dualpath.agent.segment_files import SegmentFiles
from dualpath.kvstore.data_directory import read_store_id
from dualpath.kvstore.device import Device, DeviceFile
from dualpath.kvstore.device_choice import open_device
from dualpath.kvstore.layout import ALIGN_BYTES
from dualpath.kvstore.slab_space import SlabSpace
from dualpath.kvstore.transfer_batch import BatchProgress, TransferBatch
from dualpath.transfer.errors import Unavailable
from dualpath.transfer.region import Region

BUFFERS_BYTES = 64 << 20
READ_S_MAX = 30.0
"""Longest wait for the medium; beyond it the mount counts as stuck."""
OFFSET_MAX = 1 << 62
"""No file is as long; what a daemon says may be any number."""


@dataclass(frozen=True, slots=True)
class ChunkPlace:
    """Bytes [offset, offset + nbytes) of a segment's file; `offset` is a multiple of 4 KiB."""

    segment: int
    offset: int
    nbytes: int


OnRead = Callable[[int, memoryview | None, str], None]
"""(index of the place, its bytes or None, why not): called once a place, on the reader's thread.
The bytes are the caller's only until it returns."""


class SegmentMount:
    """See the module docstring. Safe for threads. Raises Corrupt or OSError if `path` shows no
    data directory."""

    def __init__(self, path: str | Path, *, buffers_bytes: int = BUFFERS_BYTES) -> None:
        self.path = Path(path)
        self.store_id = read_store_id(self.path)
        self._device: Device = open_device(self.path / "segments", read_only=True)
        self._files = SegmentFiles(self._device)
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._region = Region.anonymous(buffers_bytes)
        self._space = SlabSpace(0, buffers_bytes)

    @property
    def description(self) -> str:
        """How the files are read."""
        return self._device.description

    def read(self, places: Sequence[ChunkPlace], deadline_s: float, on_read: OnRead) -> None:
        """Read all places, in any order; returns when `on_read` was told of each."""
        end = time.monotonic() + deadline_s
        first = 0
        while first < len(places):
            offsets = self._take_buffers(places[first:], end)
            if not offsets:
                for index in range(first, len(places)):
                    on_read(index, None, "no read buffer by the deadline")
                return
            last = first + len(offsets)
            self._read_some(places[first:last], offsets, first, end, on_read)
            first = last

    def doubt(self, place: ChunkPlace) -> None:
        """What was read there is not what should be: open its file anew for the next read."""
        self._files.doubt(place.segment)

    def close(self) -> None:
        """Let no read begin any more and close the files that are not being read."""
        self._files.close()
        self._device.close()

    def _take_buffers(self, places: Sequence[ChunkPlace], end: float) -> list[int]:
        """Buffers for as many leading places as there is room for; waits for the first."""
        taken: list[int] = []
        with self._lock:
            for place in places:
                nbytes = _aligned(place.nbytes)
                offset = self._space.take(nbytes)
                while offset < 0 and not taken:
                    left = end - time.monotonic()
                    if nbytes > self._space.capacity_bytes or left <= 0:
                        return []
                    self._room.wait(left)
                    offset = self._space.take(nbytes)
                if offset < 0:
                    break
                taken.append(offset)
        return taken

    def _read_some(
        self,
        places: Sequence[ChunkPlace],
        offsets: Sequence[int],
        first: int,
        end: float,
        on_read: OnRead,
    ) -> None:
        """Read into the buffers and give them back, but for those the medium never let go."""
        left = set(range(len(places)))
        reason = f"the medium did not answer within {READ_S_MAX} s"
        stuck = False
        try:
            with self._files.borrowed({place.segment for place in places}) as files:
                progress = self._device.read_batch(self._batch(places, offsets, files))
                stuck = True
                for index, error in _ended(progress, end):
                    left.discard(index)
                    if error:
                        self.doubt(places[index])
                    start = offsets[index]
                    view = self._region.view[start : start + places[index].nbytes]
                    on_read(first + index, None if error else view, error)
                stuck = bool(left)
        except (OSError, Unavailable) as error:
            reason = str(error)
            for segment in {place.segment for place in places}:
                self._files.doubt(segment)
        finally:
            # Whatever happened: a buffer that is not given back is lost for good.
            with self._lock:
                for index, offset in enumerate(offsets):
                    if not (stuck and index in left):
                        self._space.give(offset)
                self._room.notify_all()
        for index in sorted(left):
            on_read(first + index, None, reason)

    def _batch(
        self,
        places: Sequence[ChunkPlace],
        offsets: Sequence[int],
        files: Mapping[int, DeviceFile],
    ) -> TransferBatch:
        number = {segment: index for index, segment in enumerate(files)}
        if any(not 0 <= place.offset <= OFFSET_MAX for place in places):
            raise OSError(errno.EINVAL, "a place is beyond what any file has")
        return TransferBatch(
            tuple(files.values()),
            np.array([number[place.segment] for place in places], np.int32),
            np.array([place.offset for place in places], np.int64),
            self._region.view,
            np.array(offsets, np.int64),
            np.array([_aligned(place.nbytes) for place in places], np.int64),
        )


def _ended(progress: BatchProgress, end: float) -> Iterator[tuple[int, str]]:
    """(item, "" or why it failed) as items end; after `end` the rest is cancelled."""
    patience = 0.0
    while progress.pending:
        now = time.monotonic()
        if not patience and now >= end:
            progress.cancel()
            patience = now + READ_S_MAX
        if patience and now >= patience:
            return
        for index in progress.wait((patience or end) - now).tolist():
            error = int(progress.errors[index])
            yield index, os.strerror(error) if error else ""


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
