"""Memory of an engine that its agent may read and write.

Owns one shared-memory region and its registration with the agent. The agent writes into it only
during loads that were asked for, and not after such a load has ended, or `aclose` or `close` has
returned.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from dualpath.transfer.errors import Unavailable
from dualpath.transfer.region import Region


class EngineMemory:
    """`view` is the memory, `handle` its unguessable name at the agent, `nbytes` its size.

    `unregister(handle)` fences it; with `waits` that waits for another process, and `aclose` calls
    it on a thread.
    """

    __slots__ = ("_region", "_run", "_unregister", "_waits", "handle", "nbytes")

    def __init__(
        self,
        region: Region,
        handle: int,
        unregister: Callable[[int], None],
        *,
        waits: bool = False,
    ) -> None:
        self._region = region
        self._unregister: Callable[[int], None] | None = unregister
        self._waits = waits
        self._run: Callable[[Coroutine[Any, Any, None]], None] | None = None
        self.handle = handle
        self.nbytes = region.nbytes

    @property
    def view(self) -> memoryview:
        """The bytes. Release what you derive from it before you close."""
        return self._region.view

    def close_in(self, run: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        """Let `close` do its work by `run`: the memory's client lives in another thread's loop."""
        self._run = run

    async def aclose(self) -> None:
        """Take the memory back: loads into it are aborted and fenced first. Idempotent.

        Does not block the event loop. Pages stay mapped for as long as views derived from `view`
        live.
        """
        unregister, self._unregister = self._unregister, None
        if unregister is None:
            return
        if self._waits:
            await asyncio.get_running_loop().run_in_executor(None, unregister, self.handle)
        else:
            unregister(self.handle)
        self._unmap()

    def close(self) -> None:
        """`aclose` for programs without an event loop; one that has a loop would block it for as
        long as an agent in another process takes to answer."""
        if self._run is not None:
            with contextlib.suppress(Unavailable):  # the client has closed, and fenced all
                self._run(self.aclose())
        unregister, self._unregister = self._unregister, None
        if unregister is None:
            return
        if self._run is None:
            unregister(self.handle)
        self._unmap()

    def _unmap(self) -> None:
        with contextlib.suppress(BufferError):
            self._region.close()
