"""The most blocks that any policy could hit, knowing the future: Belady's MIN on chains.

What the figure is: the hits of MIN with bypass on the sequence of block accesses, which is exactly
the most that a cache of so many blocks of one size can hit, whatever its policy, prefix-closed or
not, if a block comes in only when it is asked for. It can be reached prefix-closed: each request
for a block is one for its parent, too, so a parent's next use is never later than its child's; with
ties going to the deeper block, MIN itself evicts leaves only. So it bounds every online policy here
from above, and no online policy can be expected to reach it.

How: of all leaves the one whose next use is farthest makes way, if that is farther than the new
block's; blocks that are never asked for again are not stored. Only leaves stand in the heap.
"""

from __future__ import annotations

import heapq

import numpy as np
from dualpath.bench.eviction.chains import Chains
from numpy.typing import NDArray

NEVER = np.iinfo(np.int32).max


def next_uses(chains: Chains) -> list[tuple[NDArray[np.int64], NDArray[np.int32]]]:
    """For each request the number of the next request that asks for each of its blocks, or NEVER:
    as (start, value) of runs along the path, which are few."""
    later = np.full(chains.nodes, NEVER, np.int32)
    found = []
    for number in range(len(chains.paths) - 1, -1, -1):
        path = chains.paths[number]
        values = later[path]
        starts = np.flatnonzero(np.diff(values, prepend=-1))
        found.append((starts, values[starts]))
        later[path] = number
    return found[::-1]


class Optimum:
    """A cache that knows the future. Implements Cache; requests come in the order of the trace."""

    def __init__(
        self,
        chains: Chains,
        uses: list[tuple[NDArray[np.int64], NDArray[np.int32]]],
        blocks: int,
    ) -> None:
        self._uses = uses
        self._free = blocks
        self._parent, self._depth = chains.parent.data, chains.depth.data
        self._here: NDArray[np.bool_] = np.zeros(chains.nodes, np.bool_)
        self._children: NDArray[np.int32] = np.zeros(chains.nodes, np.int32)
        self._next: NDArray[np.int32] = np.zeros(chains.nodes, np.int32)
        # (-next use, -depth, node) of leaves: the farthest and deepest first; stale ones stay.
        self._leaves: list[tuple[int, int, int]] = []

    def request(self, number: int, path: NDArray[np.int32]) -> int:
        """See Cache."""
        starts, values = self._uses[number]
        uses = np.repeat(values, np.diff(starts, append=len(path)))
        self._next[path] = uses
        hits = int(self._here[path].sum())
        stored = hits
        for block, use in zip(path[hits:].tolist(), uses[hits:].tolist(), strict=True):
            if use == NEVER or not self._make_room(self._parent[block], use):
                # Its descendants are not used sooner: they are not stored either.
                break
            self._free -= 1
            self._here[block] = True
            stored += 1
            if self._parent[block] >= 0:
                self._children[self._parent[block]] += 1
        if stored:
            self._offer(int(path[stored - 1]))
        return hits

    def _make_room(self, parent: int, use: int) -> bool:
        """Whether there is room for a block that is used next at `use`."""
        if self._free:
            return True
        while self._leaves:
            negative, _, leaf = self._leaves[0]
            valid = self._here[leaf] and not self._children[leaf] and -negative == self._next[leaf]
            if valid and leaf != parent:
                break
            heapq.heappop(self._leaves)
        else:
            return False
        if -self._leaves[0][0] <= use:
            return False
        leaf = heapq.heappop(self._leaves)[2]
        self._here[leaf] = False
        self._free += 1
        above = self._parent[leaf]
        if above >= 0:
            self._children[above] -= 1
            self._offer(above)
        return True

    def _offer(self, node: int) -> None:
        if not self._children[node]:
            entry = (-int(self._next[node]), -int(self._depth[node]), node)
            heapq.heappush(self._leaves, entry)
