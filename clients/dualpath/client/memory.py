"""Memory of an engine that its agent may read and write.

Owns one shared-memory region and its registration with the agent. The agent writes into it only
during loads that were asked for, and not after such a load has ended or `close` has returned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from dualpath.transfer.region import Region


class EngineMemory:
    """`view` is the memory, `handle` its unguessable name at the agent, `nbytes` its size."""

    __slots__ = ("_region", "_unregister", "handle", "nbytes")

    def __init__(self, region: Region, handle: int, unregister: Callable[[int], None]) -> None:
        self._region = region
        self._unregister: Callable[[int], None] | None = unregister
        self.handle = handle
        self.nbytes = region.nbytes

    @property
    def view(self) -> memoryview:
        """The bytes. Release what you derive from it before `close`."""
        return self._region.view

    def close_in(self, run: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        """Let `close` do its work by `run`: the memory's agent lives in another thread's loop."""
        unregister = self._unregister
        if unregister is None:
            return

        async def work(handle: int) -> None:
            unregister(handle)

        self._unregister = lambda handle: run(work(handle))

    def close(self) -> None:
        """Take the memory back: loads into it are aborted and fenced first. Idempotent.

        Pages stay mapped for as long as views derived from `view` live.
        """
        unregister, self._unregister = self._unregister, None
        if unregister is None:
            return
        unregister(self.handle)
        with contextlib.suppress(BufferError):
            self._region.close()
