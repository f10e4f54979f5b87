"""One load as its engine sees it: waits for layers, the result, abort.

Owns the reading of the load's updates and nothing else; the agent owns the load. Every wait ends
with the load, and a load ends at its deadline at the latest.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from dualpath.agent.load_spec import LoadUpdate
from dualpath.agent.outcome import LoadResult, LoadStarted
from dualpath.transfer.errors import Unavailable


class Load:
    """A running or finished load. All methods may be awaited by several tasks."""

    def __init__(
        self,
        load_id: str,
        updates: AsyncIterator[LoadUpdate],
        abort: Callable[[str], Awaitable[None]],
        on_end: Callable[[Load], None] | None = None,
    ) -> None:
        """`on_end` is called in the loop as soon as it is `done`, once."""
        self.load_id = load_id
        self._on_end = on_end
        self._abort = abort
        self._changed = asyncio.Condition()
        self._started: LoadStarted | None = None
        self._last = LoadUpdate()
        self._result: LoadResult | None = None
        self._error: BaseException | None = None
        self._reader = asyncio.create_task(self._read(updates), name=f"load {load_id}")

    async def _read(self, updates: AsyncIterator[LoadUpdate]) -> None:
        error: BaseException | None = None
        try:
            async for update in updates:
                async with self._changed:
                    self._started = self._started or update.started
                    self._result = update.result
                    self._last = update
                    self._changed.notify_all()
                if self._result is not None:
                    self._tell_end()
        except BaseException as raised:  # noqa: BLE001 - handed to whoever waits
            error = raised
        if self._result is None:
            self._error = error or Unavailable("the agent ended the load without a result")
        self._tell_end()
        async with self._changed:
            self._changed.notify_all()
        if isinstance(error, asyncio.CancelledError):
            raise error

    def _tell_end(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(self)

    async def _until(self, predicate: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(
                lambda: predicate() or self._result is not None or self._error is not None
            )
        if self._error is not None and not predicate():
            raise self._error

    async def started(self) -> LoadStarted:
        """What the lookup found. Raises InvalidRequest if the load was refused."""
        await self._until(lambda: self._started is not None)
        if self._started is None:
            raise Unavailable("the agent ended the load before it started")
        return self._started

    async def wait_layer(self, layer: int) -> int:
        """Wait until layers [0, layer] are verified; return for how many leading blocks.

        The number may fall later, if a block of another layer turns out corrupt or late: the
        result has the last word.
        """
        await self._until(lambda: self._last.layers_ready > layer)
        return self._result.blocks if self._result is not None else self._last.blocks_valid

    async def result(self) -> LoadResult:
        """Wait for the end. Nothing is written into the memory afterwards, unless this raises
        because the agent did not answer: see `abort`."""
        await self._until(lambda: self._result is not None)
        if self._result is None:
            raise Unavailable("the agent ended the load without a result")
        return self._result

    @property
    def outcome(self) -> LoadResult | BaseException | None:
        """The result, or what `result` raises; None until it is `done`."""
        return self._result if self._result is not None else self._error

    @property
    def done(self) -> bool:
        """Whether the result is there."""
        return self._result is not None or self._error is not None

    async def abort(self) -> None:
        """Give the load up; when it returns, nothing more is written into the memory.

        After a `result` that raised this is how to get the memory back: an agent that stands still
        may go on later. Raises Unavailable or DeadlineExceeded while it does not answer.
        """
        if self._result is None:
            await self._abort(self.load_id)
