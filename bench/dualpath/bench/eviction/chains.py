"""A trace as chains of blocks: which nodes of one tree each request walks, and in which order
requests come.

A node is a block after all blocks before it, as a chain hash names it: nodes are numbered in the
order in which they are first asked for, so a parent's number is less than its child's. Requests of
a trace with one scope keep their times. Where each session has a clock of its own, `concurrency`
sessions run at any time: when one ends, the next begins, in an order that `seed` shuffles.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from dualpath.bench.testbed.trace_formats import TraceRequest
from dualpath.transfer.errors import InvalidRequest
from numpy.typing import NDArray

_GAP_S = 1.0
"""Between the last request of a session and the first of the next one in its place."""
_PATHS_KEPT = 4
"""Paths of a scope that a new request is compared with before the tree is asked block by block."""


@dataclass(frozen=True, slots=True)
class Chains:
    """`paths[i]` are the nodes of request i, the root first; `parent[node]` is -1 for a root.
    `input_tokens[i]` counts also tokens that fill no block."""

    block_tokens: int
    parent: NDArray[np.int32]
    depth: NDArray[np.int32]
    paths: Sequence[NDArray[np.int32]]
    input_tokens: Sequence[int]

    @property
    def nodes(self) -> int:
        """Distinct blocks."""
        return len(self.parent)

    @property
    def blocks(self) -> int:
        """Blocks that are asked for, each time counted."""
        return sum(len(path) for path in self.paths)


def in_order(
    requests: Iterable[TraceRequest], *, concurrency: int, sessions: int, seed: int
) -> list[TraceRequest]:
    """The requests by time; at most `sessions` scopes (0: all). Raises InvalidRequest if there is
    none."""
    scopes: dict[str, list[TraceRequest]] = {}
    for request in requests:
        scopes.setdefault(request.scope, []).append(request)
    if not scopes:
        raise InvalidRequest("the trace has no requests")
    for of_scope in scopes.values():
        of_scope.sort(key=lambda request: request.start_s)
    if len(scopes) == 1:
        return next(iter(scopes.values()))
    names = sorted(scopes)
    random.Random(seed).shuffle(names)
    free = [0.0] * concurrency
    order: list[tuple[float, str, int, TraceRequest]] = []
    for name in names[: sessions or len(names)]:
        start_s = heapq.heappop(free)
        first_s, last_s = scopes[name][0].start_s, scopes[name][-1].start_s
        order += [
            (start_s + request.start_s - first_s, name, at, request)
            for at, request in enumerate(scopes[name])
        ]
        heapq.heappush(free, start_s + last_s - first_s + _GAP_S)
    order.sort(key=lambda entry: entry[:3])
    return [request for _, _, _, request in order]


def chains_of(requests: Sequence[TraceRequest]) -> Iterator[int | Chains]:
    """Yield how many requests are done, now and then, and at last the chains."""
    tree: dict[tuple[str | int, int], int] = {}
    parent: list[int] = []
    depth: list[int] = []
    paths: list[NDArray[np.int32]] = []
    lately: dict[str, list[tuple[NDArray[np.int64], NDArray[np.int32]]]] = {}
    for number, request in enumerate(requests):
        ids = np.array(request.block_ids, np.int64)
        known = lately.setdefault(request.scope, [])
        shared, like = max(
            ((_shared(ids, other), path) for other, path in known),
            key=lambda pair: pair[0],
            default=(0, np.zeros(0, np.int32)),
        )
        path = np.empty(len(ids), np.int32)
        path[:shared] = like[:shared]
        above: str | int = int(path[shared - 1]) if shared else request.scope
        for at, block in enumerate(ids[shared:].tolist(), shared):
            node = tree.get((above, block))
            if node is None:
                node = tree[above, block] = len(parent)
                parent.append(above if isinstance(above, int) else -1)
                depth.append(at)
            path[at] = above = node
        known.insert(0, (ids, path))
        del known[_PATHS_KEPT:]
        paths.append(path)
        yield number
    yield Chains(
        block_tokens=requests[0].block_tokens,
        parent=np.array(parent, np.int32),
        depth=np.array(depth, np.int32),
        paths=paths,
        input_tokens=[request.input_tokens for request in requests],
    )


def _shared(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Leading blocks that are the same."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length
