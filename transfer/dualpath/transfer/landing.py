"""A batch of accepted writes on its way into a region, and the lock under which its bytes go in.

Owns what is known of each part: whether it is open, has landed or was fenced. One object and one
lock stand for the whole batch, so that a part costs a byte, not an object; each part is fenced
and lands for itself all the same. The rules are those of window.py.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.slices import Slices

if TYPE_CHECKING:
    from dualpath.transfer.window import OpenWindow

OVER, OPEN, LANDED, FENCED = range(4)
"""States of a part. OPEN and FENCED ones are under way: whoever fences their tag waits for the
lock. A part is OVER that was refused, or that was fenced and has left the window's table."""


class LandingLock:
    """Held while bytes go in; `fencing` asks its holder to let go, and comes before a new one.

    The holder looks at `interrupt[0]` all the while, and never blocks for more than a moment.
    """

    __slots__ = ("_lock", "_turn", "interrupt")

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self.interrupt = bytearray(1)

    def __enter__(self) -> None:
        with self._turn:
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @contextmanager
    def fencing(self) -> Iterator[None]:
        """Hold it as soon as its holder has noticed."""
        with self._turn:
            self.interrupt[0] = 1
            with self._lock:
                self.interrupt[0] = 0
                yield

    def close(self, landing: Landing, parts: Iterable[int]) -> None:
        """Let nothing more into these parts of `landing`. A transport whose bytes go in without
        this lock (by a network card) overrides it, to wait for them as well."""
        with self.fencing():
            landing.fence(parts)


class Landing:
    """Accepted writes, one for each part of `table` under the tags from `first_tag` on.

    The transport writes only while it holds `lock` and only into parts whose state is OPEN, in
    steps that block for a moment at most; so whoever takes the lock and closes a part knows that
    no byte of it follows. LANDED says that all bytes came before that. `refused` has the reasons
    of the parts that were not accepted. `states` is changed under `lock`, `left` (parts under
    way) by the window's table, in which the landing stays until none is.
    """

    __slots__ = ("first_tag", "left", "lock", "peer", "refused", "states", "table", "window")

    def __init__(
        self,
        window: OpenWindow,
        peer: str,
        first_tag: int,
        table: SliceTable,
        lock: LandingLock,
        refused: Mapping[int, str],
    ) -> None:
        self.window = window
        self.peer = peer
        self.first_tag = first_tag
        self.table = table
        self.lock = lock
        self.refused = refused
        self.states = bytearray((OPEN,)) * len(table)
        for part in refused:
            self.states[part] = OVER
        self.left = len(table) - len(refused)

    @property
    def view(self) -> memoryview:
        """The region that the bytes go into."""
        return self.window.region.view

    @property
    def hashed(self) -> bool:
        """Whether the window's owner wants digests."""
        return self.window.on_hashed is not None

    @property
    def open(self) -> bool:
        """Whether bytes may go into any part."""
        return OPEN in self.states

    @property
    def slices(self) -> Slices:
        """Where the bytes of a single write go."""
        return self.table.part(0)

    def is_open(self, part: int) -> bool:
        """Whether its bytes may go in; means something only while `lock` is held."""
        return self.states[part] == OPEN

    def under_way(self, tags: Collection[int]) -> list[int]:
        """The parts with one of these tags that somebody who fences has to wait for."""
        first = self.first_tag
        return [
            part
            for part, state in enumerate(self.states)
            if state in (OPEN, FENCED) and first + part in tags
        ]

    def fence(self, parts: Iterable[int]) -> None:
        """Close these parts; under `lock`."""
        for part in parts:
            if self.states[part] == OPEN:
                self.states[part] = FENCED

    def close(self) -> None:
        """Let nothing more in."""
        self.lock.close(self, range(len(self.states)))
