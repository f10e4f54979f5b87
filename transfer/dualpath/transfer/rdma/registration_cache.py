"""Memory registered with a device, region by region: made once, kept while there is room.

Guarantees: a region is registered at most once at a time; one that is in use is never let go; one
that was closed is deregistered as soon as nothing uses it, one that was collected with the next
call. Of those that are idle, the ones used longest ago go first beyond `registrations_max`.
Thread-safe.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from dualpath.transfer.errors import Overloaded, Unavailable
from dualpath.transfer.rdma.verbs import Device, MemoryKeys
from dualpath.transfer.region import Region

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Entry:
    address: int = 0
    keys: MemoryKeys | None = None
    users: int = 0
    doomed: bool = False
    registering: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class Registered:
    """A region's memory while it is held: where it begins, and its keys."""

    serial: int
    address: int
    keys: MemoryKeys


class RegistrationCache:
    """All registrations of one transport."""

    def __init__(self, device: Device, registrations_max: int) -> None:
        self._device = device
        self._registrations_max = registrations_max
        self._lock = threading.Lock()
        self._entries: dict[int, _Entry] = {}  # by serial; the one used last is last
        self._doomed: dict[int, _Entry] = {}
        self._watched: set[int] = set()  # serials of regions that tell us when they go
        self._collected: deque[int] = deque()  # of those that nobody closed
        self._closed = False

    def hold(self, region: Region) -> Registered:
        """Register `region` if it is not; it stays so until `let_go`.

        Raises Unavailable if the device refuses, Overloaded if too many are in use.
        """
        self._sweep()
        with self._lock:
            entry = self._entries.pop(region.serial, None)
            if entry is None:
                idle = self._make_room()
                entry = _Entry()
            else:
                idle = []
            self._entries[region.serial] = entry
            entry.users += 1
            unwatched = region.serial not in self._watched
            self._watched.add(region.serial)
        _close(idle)
        if unwatched:
            region.before_close.append(self.forget)
            # The collector may run anywhere, so it only leaves a note.
            weakref.finalize(region, self._collected.append, region.serial).atexit = False
        try:
            with entry.registering:
                if self._closed:
                    raise Unavailable("the transport is closed", reason="closed")
                if entry.keys is None:
                    entry.address, entry.keys = self._register(region)
        except BaseException:
            self._drop(region.serial, entry)
            raise
        return Registered(region.serial, entry.address, entry.keys)

    def _register(self, region: Region) -> tuple[int, MemoryKeys]:
        """By its dmabuf if it has one; as host memory, where it is that too, if that is refused."""
        writable, shared = not region.read_only, region.dmabuf
        if shared is not None:
            try:
                keys = self._device.register_dmabuf(
                    shared.fd, shared.offset, region.nbytes, writable=writable
                )
            except Unavailable as error:
                if not region.on_host:
                    raise
                _log.warning("registered as host memory instead: %s", error)
            else:
                return shared.offset, keys
        address = address_of(region)
        return address, self._device.register(address, region.nbytes, writable=writable)

    def let_go(self, registered: Registered) -> None:
        """End a `hold`."""
        with self._lock:
            entry = self._entries.get(registered.serial) or self._doomed.get(registered.serial)
            if entry is None:
                return
            entry.users -= 1
            if entry.users or not entry.doomed:
                return
            del self._doomed[registered.serial]
        _close([entry])

    def forget(self, serial: int) -> None:
        """The region with this serial is going: deregister it once nothing uses it."""
        with self._lock:
            self._watched.discard(serial)
            entry = self._entries.pop(serial, None)
            if entry is None:
                return
            if entry.users:
                entry.doomed = True
                self._doomed[serial] = entry
                return
        _close([entry])

    def close(self) -> None:
        """Deregister everything; nothing uses it any more."""
        with self._lock:
            self._closed = True
            entries = [*self._entries.values(), *self._doomed.values()]
            self._entries.clear()
            self._doomed.clear()
        _close(entries)

    def __len__(self) -> int:
        self._sweep()
        with self._lock:
            return len(self._entries) + len(self._doomed)

    def _sweep(self) -> None:
        while self._collected:
            with contextlib.suppress(IndexError):  # another thread took the last
                self.forget(self._collected.popleft())

    def _make_room(self) -> list[_Entry]:
        gone: list[_Entry] = []
        while len(self._entries) + len(self._doomed) >= self._registrations_max:
            serial = next((each for each, entry in self._entries.items() if not entry.users), None)
            if serial is None:
                raise Overloaded(
                    f"{self._registrations_max} regions are in use by RDMA; raise "
                    "registrations_max",
                    retry_after_s=0.05,
                )
            gone.append(self._entries.pop(serial))
        return gone

    def _drop(self, serial: int, entry: _Entry) -> None:
        with self._lock:
            entry.users -= 1
            if not entry.users and self._entries.get(serial) is entry:
                del self._entries[serial]


def address_of(region: Region) -> int:
    """Where a region's memory begins; nothing of it is held."""
    return int(np.frombuffer(region.view, np.uint8).ctypes.data)


def _close(entries: list[_Entry]) -> None:
    for entry in entries:
        with entry.registering:
            if entry.keys is not None:
                entry.keys.close()
