"""All loads of a dispatcher in the order in which they came, and the paths in whose queues each is.

Owns the loads by name and by order, where each is placed, and the waiting bytes that the path table
counts for that. Decides nothing: who places a load says on which paths.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Collection, Iterator

from dualpath.transfer.chunk_queue import ChunkQueue
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.path_table import PathTable
from dualpath.transfer.placement import LoadView, PlacementPolicy
from dualpath.transfer.queued_load import QueuedLoad


class LoadQueue:
    """See the module docstring. `paths` have the queues in which loads wait."""

    __slots__ = ("_by_seq", "_loads", "_paths", "_seq", "_turns")

    def __init__(self, paths: PathTable) -> None:
        self._paths = paths
        self._loads: dict[str, QueuedLoad] = {}
        self._by_seq: dict[int, QueuedLoad] = {}
        self._turns: Counter[str] = Counter()
        self._seq = 0

    def __len__(self) -> int:
        return len(self._loads)

    def __iter__(self) -> Iterator[QueuedLoad]:
        return iter(self._loads.values())

    def __contains__(self, load_id: str) -> bool:
        return load_id in self._loads

    def get(self, load_id: str) -> QueuedLoad | None:
        """The load, if it is there."""
        return self._loads.get(load_id)

    def known(self, load_id: str) -> QueuedLoad:
        """The load. Raises InvalidRequest."""
        load = self._loads.get(load_id)
        if load is None:
            raise InvalidRequest(f"unknown load {load_id!r}")
        return load

    def at(self, seq: int) -> QueuedLoad:
        """The load with this order number."""
        return self._by_seq[seq]

    def add(
        self,
        load_id: str,
        chunks: ChunkQueue,
        policy: PlacementPolicy,
        decode_peer: str,
        hint: frozenset[str],
    ) -> QueuedLoad:
        """The last one in the queue, not yet placed."""
        view = LoadView(load_id, chunks.waiting_bytes, decode_peer, self._turns[policy.name])
        self._turns[policy.name] += 1
        load = QueuedLoad(self._seq, view, chunks, policy, hint)
        self._seq += 1
        self._loads[load_id] = self._by_seq[load.seq] = load
        return load

    def remove(self, load: QueuedLoad) -> None:
        """Forget it."""
        self._unqueue(load, load.queued)
        self._account(load, (), 0)
        del self._loads[load.view.load_id], self._by_seq[load.seq]

    def bind(self, load: QueuedLoad, paths: tuple[str, ...]) -> None:
        """Place a load on paths."""
        if paths != load.paths:
            self._account(load, paths, load.chunks.waiting_bytes)
        self.settle(load)

    def settle(self, load: QueuedLoad) -> None:
        """After any change of a load: account its waiting bytes, queue it where it can go."""
        queue = load.chunks
        if queue.waiting_bytes != load.accounted_bytes:
            self._account(load, load.paths, queue.waiting_bytes)
        if not queue.waiting_bytes:
            wanted: frozenset[str] = frozenset()
        elif queue.has_retries:
            wanted = frozenset(path.name for path in self._paths.hinted(load.hint))
        else:
            wanted = frozenset(load.paths)
        if wanted == load.queued:
            return
        self._unqueue(load, load.queued - wanted)
        for name in wanted - load.queued:
            bisect.insort(self._paths[name].queue, load.seq)
        load.queued = wanted

    def _unqueue(self, load: QueuedLoad, names: Collection[str]) -> None:
        for name in names:
            queue = self._paths[name].queue
            del queue[bisect.bisect_left(queue, load.seq)]

    def _account(self, load: QueuedLoad, paths: tuple[str, ...], nbytes: int) -> None:
        self._paths.bind(load.paths, -load.accounted_bytes)
        self._paths.bind(paths, nbytes)
        load.paths, load.accounted_bytes = paths, nbytes
