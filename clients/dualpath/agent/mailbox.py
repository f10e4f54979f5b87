"""Hand-over of values from transport threads to the event loop, in batches.

Guarantees that every item put before the loop closed is handled once, in order, in the loop, and
that a burst of items wakes the loop once. Bounded by its producers: there is at most one item
for each write in flight, and these are limited by byte credit.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """`handle` is called in `loop` with the items since the last call."""

    def __init__(self, loop: asyncio.AbstractEventLoop, handle: Callable[[list[T]], None]) -> None:
        self._loop = loop
        self._handle = handle
        self._items: deque[T] = deque()
        self._woken = False

    def put(self, item: T) -> None:
        """Add an item; callable from any thread, never blocks."""
        self._items.append(item)
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Handle what is there now. Only in the loop."""
        self._woken = False  # before the items are taken: a later put wakes the loop again
        items: list[T] = []
        while self._items:
            items.append(self._items.popleft())
        if items:
            self._handle(items)
