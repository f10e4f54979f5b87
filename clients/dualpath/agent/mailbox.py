"""Hand-over of values from transport threads to the event loop, in batches.

Guarantees that every item put before the loop closed is handled once, in order, in the loop, and
that a burst of items wakes the loop once; a steady stream of them wakes it as often as the
mailbox's pause allows. Bounded by its producers: there is at most one item for each write in
flight, and these are limited by byte credit.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """`handle` is called in `loop` with the items since the last call, at least `pause_s` after
    that unless one was urgent."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        handle: Callable[[list[T]], None],
        pause_s: float = 0.0,
    ) -> None:
        self._loop = loop
        self._handle = handle
        self._pause_s = pause_s
        self._items: deque[T] = deque()
        self._awake = False
        """Whether the loop will look by itself."""

    def put(self, item: T, *, urgent: bool = False) -> None:
        """Add an item; callable from any thread, never blocks."""
        self._items.append(item)
        if urgent or not self._awake:
            call = self.drain if self._awake else self._wake
            self._awake = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(call)

    def drain(self) -> bool:
        """Handle what is there now; False if that was nothing. Only in the loop."""
        items: list[T] = []
        while self._items:
            items.append(self._items.popleft())
        if items:
            self._handle(items)
        return bool(items)

    def _wake(self) -> None:
        """Handle items until none comes for the time of a pause."""
        if not self._pause_s:
            self._awake = False  # before the items are taken: a later put wakes the loop again
            self.drain()
        elif self.drain():
            self._loop.call_later(self._pause_s, self._wake)
        else:
            self._awake = False
            if self._items:  # put before that was seen
                self._awake = True
                self._wake()
