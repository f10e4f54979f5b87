"""Leave that was given to write into memory, and the fence that waits for it to end.

A network card writes without anybody's lock. So a landing is fenced in two steps: it is closed,
after which no further leave includes it; then each leave that does is waited for. A leave ends
when the writer says that it has written, when it releases it, when its memory window was
withdrawn, or with the queue pair: whichever comes first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable

from dualpath.transfer.landing import Landing, LandingLock
from dualpath.transfer.rdma.channel import Channel
from dualpath.transfer.rdma.registration_cache import Registered
from dualpath.transfer.rdma.verbs import Window


class Leave:
    """Leave to write bytes of these parts of a write. `window` is bound under `rkey`, if there are
    memory windows; `memory` is what it is bound to."""

    __slots__ = ("channel", "ended", "memory", "parts", "rkey", "then", "window", "withdrawing")

    def __init__(
        self,
        channel: Channel,
        parts: Collection[int],
        memory: Registered,
        window: Window | None,
        rkey: int,
    ) -> None:
        self.channel = channel
        self.parts = frozenset(parts)
        self.memory = memory
        self.window = window
        self.rkey = rkey
        self.ended = threading.Event()
        self.withdrawing = False
        self.then: Callable[[], None] = lambda: None
        """Called when its window's key is void."""


class LeaveLock(LandingLock):
    """The lock of a batch's landing. `leaves` are those under way; change it holding the lock."""

    __slots__ = ("_fence", "leaves")

    def __init__(self, fence: Callable[[Leave], None]) -> None:
        super().__init__()
        self.leaves: list[Leave] = []
        self._fence = fence

    def close(self, landing: Landing, parts: Iterable[int]) -> None:
        """See LandingLock.close; waits, for a bounded time, until no byte follows."""
        closing = frozenset(parts)
        with self.fencing():
            landing.fence(closing)
            leaves = [each for each in self.leaves if not closing.isdisjoint(each.parts)]
        for leave in leaves:
            self._fence(leave)
