"""Turns in an event loop: work that cannot be divided goes round between principals.

Owns a queue for each principal. Calls that do all of their work in the loop would else run in the
order of their arrival, a flood before everybody else. A lone caller waits for nothing. Queues are
bounded by the calls that may be outstanding. For one event loop.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque


class FairTurns:
    """See the module docstring."""

    def __init__(self) -> None:
        self._taken = False
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def turn(self, principal: str) -> None:
        """Return when it is this principal's turn; the turn ends at the caller's next wait."""
        loop = asyncio.get_running_loop()
        if not self._taken:
            self._taken = True
            loop.call_soon(self._next)
            return
        waiting: asyncio.Future[None] = loop.create_future()
        self._queues.setdefault(principal, deque()).append(waiting)
        await waiting

    def _next(self) -> None:
        while self._queues:
            name, queue = next(iter(self._queues.items()))
            waiting = queue.popleft()
            if queue:
                self._queues.move_to_end(name)
            else:
                del self._queues[name]
            if not waiting.done():  # its call may have been cancelled
                waiting.set_result(None)
                asyncio.get_running_loop().call_soon(self._next)
                return
        self._taken = False
