"""Memory of engines that this agent may write into.

Owns the registered regions, by unguessable handle, and their end: loads and saves that use a
region are told first, and it is unmapped only when nothing reads or writes it any more. Does not
know how a region came here (Unix socket, or the same process).
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from dualpath.transfer.errors import InvalidRequest, Overloaded
from dualpath.transfer.region import Region

REGIONS_MAX = 4096

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class EngineRegion:
    """One registered region. `pins` counts the writes to daemons that still read from it."""

    handle: int
    region: Region
    behind_compute_link: bool
    owned: bool
    """Ours to unmap."""
    pins: int = 0
    gone: bool = False
    on_gone: dict[object, Callable[[], object]] = field(default_factory=dict)
    """What must happen before the memory goes: abort and fence, synchronously."""


class Regions:
    """All registered regions. Belongs to the loop."""

    def __init__(self) -> None:
        self._regions: dict[int, EngineRegion] = {}

    def add(self, region: Region, *, behind_compute_link: bool, owned: bool) -> EngineRegion:
        """Register memory. Raises Overloaded over the limit."""
        if len(self._regions) >= REGIONS_MAX:
            raise Overloaded(f"{REGIONS_MAX} regions are registered already", retry_after_s=1.0)
        handle = secrets.randbits(63) | 1
        while handle in self._regions:
            handle = secrets.randbits(63) | 1
        entry = EngineRegion(handle, region, behind_compute_link, owned)
        self._regions[handle] = entry
        return entry

    def get(self, handle: int) -> EngineRegion:
        """A registered region. Raises InvalidRequest."""
        entry = self._regions.get(handle)
        if entry is None:
            raise InvalidRequest(
                f"unknown region handle {handle:#x}: register the memory on the region socket, "
                "and keep that connection open",
                reason="unknown_region",
            )
        return entry

    def drop(self, handle: int) -> None:
        """Forget a region: its loads end and are fenced before this returns. Idempotent."""
        entry = self._regions.pop(handle, None)
        if entry is None:
            return
        entry.gone = True
        for callback in tuple(entry.on_gone.values()):
            try:
                callback()
            except Exception:  # the others must still be fenced
                log.exception("region %#x: what used it could not be ended", handle)
        entry.on_gone.clear()
        self._unmap(entry)

    def unpin(self, entry: EngineRegion) -> None:
        """A write to a daemon no longer reads from it."""
        entry.pins -= 1
        if entry.gone:
            self._unmap(entry)

    def close(self) -> None:
        """Drop all."""
        for handle in tuple(self._regions):
            self.drop(handle)

    def _unmap(self, entry: EngineRegion) -> None:
        if entry.owned and entry.pins == 0:
            # A view may still be held for an instant by a transport; then the mapping goes
            # with the last reference.
            with contextlib.suppress(BufferError):
                entry.region.close()
