"""A tier of so many blocks under one of the store's policies, as the store drives it.

Keeps the rules that the store keeps around the policy: presence is prefix-closed, so a block with a
present child is parked and only a leaf leaves; a new block is linked below its parent before room
is made for it; a parent whose last child has gone is ready, and spent if it was not used later. The
tier `DRAM` holds copies of blocks that lie on an SSD anyway: there any block may leave. Blocks have
one size; nothing is leased.
"""

from __future__ import annotations

import enum
from typing import Protocol

import numpy as np
from dualpath.kvstore.eviction import CHAIN_CHILDREN_MAX, NONE, EvictionPolicy
from numpy.typing import NDArray

_GROUP = 0


class TierKind(enum.Enum):
    """What may leave."""

    SSD = "ssd"
    """Leaves only: what is not here is nowhere."""
    DRAM = "dram"
    """Any copy."""


class Cache(Protocol):
    """What is replayed against."""

    def request(self, number: int, path: NDArray[np.int32]) -> int:
        """Look the path of a request up and store what is missing; return the hits."""


class PrefixCache:
    """See the module docstring. `parent` is that of each block of the trace."""

    def __init__(
        self, policy: EvictionPolicy, blocks: int, parent: NDArray[np.int32], kind: TierKind
    ) -> None:
        self._policy = policy
        self._free = blocks
        self._closed = kind is TierKind.SSD
        self._parent = parent.data
        self._here: NDArray[np.bool_] = np.zeros(len(parent), np.bool_)
        self._children: NDArray[np.int32] = np.zeros(len(parent), np.int32)
        self._used: NDArray[np.int64] = np.zeros(len(parent), np.int64)
        self._here_view, self._children_view = self._here.data, self._children.data
        self._used_view = self._used.data
        self._clock = 0
        self.evicted = 0

    def request(self, number: int, path: NDArray[np.int32]) -> int:
        """See Cache. Hits are counted as the store does: from the root on; in DRAM each copy."""
        here = self._here[path]
        found = path[here]
        if self._closed:
            assert here[: len(found)].all()
        if len(found):
            self._clock += 1
            self._used[found] = self._clock
            self._policy.hit(found)
        for block in path[~here].tolist():
            if not self._store(block):
                break
        return len(found)

    def _store(self, block: int) -> bool:
        above = self._parent[block]
        if above >= 0:
            self._children_view[above] += 1
            if self._closed:
                self._policy.park(above)
        if not self._free and not self._evict():
            self._unlink(block)
            return False
        self._free -= 1
        self._here_view[block] = True
        self._clock += 1
        self._used_view[block] = self._clock
        chain = above >= 0 and self._children_view[above] <= CHAIN_CHILDREN_MAX
        self._policy.insert(block, _GROUP, block + 1, extends=above if chain else NONE)
        return True

    def _evict(self) -> bool:
        block = self._policy.victim(_GROUP, _any)
        if block == NONE:
            return False
        self._policy.remove(block, block + 1)
        self._here_view[block] = False
        self._free += 1
        self.evicted += 1
        self._unlink(block)
        return True

    def _unlink(self, block: int) -> None:
        above = self._parent[block]
        if above >= 0:
            self._children_view[above] -= 1
            if self._closed and not self._children_view[above]:
                spent = self._used_view[above] <= self._used_view[block]
                self._policy.ready(above, spent=spent)


def _any(row: int) -> bool:
    return True
