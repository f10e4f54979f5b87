"""Segment files that are open for reading: as many as needed, few of them idle.

Owns the descriptors. A file is closed only while nobody reads it, so that no read ever meets a
descriptor that stands for another file by now. One that was read in vain is opened anew: on a
shared mount it may have been short when it was opened, or another file has its name by now.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dualpath.kvstore.device import Device, DeviceFile
from dualpath.kvstore.ssd_tier import segment_name
from dualpath.transfer.errors import Unavailable

IDLE_MAX = 256
"""Most files that are kept open with nobody reading them."""


@dataclass(slots=True)
class _Open:
    file: DeviceFile
    readers: int = 0
    doubted: bool = False


class SegmentFiles:
    """See the module docstring. Safe for threads."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def borrowed(self, segments: Collection[int]) -> Iterator[dict[int, DeviceFile]]:
        """The files of these segments, open until the end of the block. Raises OSError, and
        Unavailable after `close`."""
        taken: list[int] = []
        try:
            with self._lock:
                if self._closed:
                    raise Unavailable("the mount is closed", reason="closed")
                for segment in segments:
                    self._opened(segment).readers += 1
                    taken.append(segment)
                files = {segment: self._open[segment].file for segment in taken}
            yield files
        finally:
            with self._lock:
                for segment in taken:
                    self._open[segment].readers -= 1
                self._close_idle(0 if self._closed else IDLE_MAX)

    def doubt(self, segment: int) -> None:
        """A read of this segment was in vain: open its file anew once nobody reads it."""
        with self._lock:
            found = self._open.get(segment)
            if found is not None:
                found.doubted = True
                self._close_idle(IDLE_MAX)

    def close(self) -> None:
        """Lend no more; files that are being read are closed by their last reader."""
        with self._lock:
            self._closed = True
            self._close_idle(0)

    def _opened(self, segment: int) -> _Open:
        found = self._open.get(segment)
        if found is None:
            found = self._open[segment] = _Open(self._device.open(segment_name(segment)))
        self._open.move_to_end(segment)
        return found

    def _close_idle(self, most: int) -> None:
        idle = [segment for segment, one in self._open.items() if not one.readers]
        spare = max(0, len(idle) - most)
        for number, segment in enumerate(idle):
            if number < spare or self._open[segment].doubted:
                self._open.pop(segment).file.close()
