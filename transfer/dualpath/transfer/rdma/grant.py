"""Leave that was given to write into memory, and the fence that waits for it to end.

A network card writes without anybody's lock. So a landing is fenced in two steps: it is closed,
after which no further leave includes it; then each leave that does is waited for. A leave ends
when the writer says that it has written, when it releases it, when its memory window was
withdrawn, or with the queue pair: whichever comes first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

from dualpath.transfer.rdma.channel import Channel
from dualpath.transfer.rdma.registration_cache import Registered
from dualpath.transfer.rdma.verbs import Window
from dualpath.transfer.window import Landing, LandingLock


class Leave:
    """Leave for the next `nbytes` bytes of a write. `window` is bound under `rkey`, if there are
    memory windows; `memory` is what it is bound to."""

    __slots__ = ("channel", "ended", "landings", "memory", "rkey", "window", "withdrawing")

    def __init__(
        self,
        channel: Channel,
        landings: Collection[Landing],
        memory: Registered,
        window: Window | None,
        rkey: int,
    ) -> None:
        self.channel = channel
        self.landings = frozenset(landings)
        self.memory = memory
        self.window = window
        self.rkey = rkey
        self.ended = threading.Event()
        self.withdrawing = False


class LeaveLock(LandingLock):
    """The lock of a batch's landings. `leaves` are those under way; change it holding the lock."""

    __slots__ = ("_fence", "leaves")

    def __init__(self, fence: Callable[[Leave], None]) -> None:
        super().__init__()
        self.leaves: list[Leave] = []
        self._fence = fence

    def close(self, landing: Landing) -> bool:
        """See LandingLock.close; waits, for a bounded time, until no byte follows."""
        with self.fencing():
            was_open, landing.open = landing.open, False
            leaves = [each for each in self.leaves if landing in each.landings]
        for leave in leaves:
            self._fence(leave)
        return was_open
