"""The end of a streaming call whose caller does not read.

Its handler waits in gRPC for room to send, for as long as the connection lasts, and counts as a
call. Owns the time that it may take once there is nothing left to do but to send the last word.
"""

from __future__ import annotations

import asyncio

UNREAD_S_MAX = 5.0
"""How long the caller may take to read the end."""


class UnreadCall:
    """See the module docstring. Make it in the generator that is the handler's answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None

    def ends(self) -> None:
        """From now on only the end has to be sent: cancel the call if that takes too long."""
        if self._timer is None and self._task is not None:
            self._timer = self._loop.call_later(UNREAD_S_MAX, self._task.cancel)

    def ended(self) -> None:
        """The handler is over."""
        self._task = None
        if self._timer is not None:
            self._timer.cancel()
