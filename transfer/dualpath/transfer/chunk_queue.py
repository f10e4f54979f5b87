"""The chunks of one load: which wait, which are in flight by which path, which are over.

Owns the state of every chunk of a load and the order in which waiting ones go: by index, so
that chunks which came back go before fresh ones. A chunk that failed on a path goes by another
one, as long as another is there. Each chunk is always in exactly one `ChunkState`. Decides no
path by itself: the dispatcher does. Costs O(1) or O(log returned) a chunk, never a scan of all.
"""

from __future__ import annotations

import enum
import heapq
from collections import Counter
from collections.abc import Collection, Sequence


class ChunkState(enum.IntEnum):
    """Where a chunk stands."""

    WAITING = 0
    INFLIGHT = 1
    DONE = 2
    DROPPED = 3


_WAITING = bytes((ChunkState.WAITING,))


class ChunkQueue:
    """Chunks 0..n-1 of a load; `nbytes[i]` bytes each."""

    __slots__ = (
        "_by_failed_path",
        "_failed_on",
        "_fresh",
        "_inflight",
        "_returned",
        "_states",
        "counts",
        "nbytes",
        "taken_bytes",
        "waiting_bytes",
    )

    def __init__(self, nbytes: Sequence[int]) -> None:
        self.nbytes = nbytes
        self._states = bytearray(len(nbytes))
        self._fresh = 0
        self._returned: list[int] = []
        # Waiting chunks that have failed, by the path that they failed on last.
        self._by_failed_path: dict[str, list[int]] = {}
        self._failed_on: dict[int, list[str]] = {}
        self._inflight: dict[int, str] = {}
        self.waiting_bytes = sum(nbytes)
        self.taken_bytes: Counter[str] = Counter()
        """By path: in flight or verified."""
        self.counts = [len(nbytes), 0, 0, 0]

    @property
    def over(self) -> bool:
        """Whether no chunk waits or is in flight."""
        return not self.counts[ChunkState.WAITING] and not self.counts[ChunkState.INFLIGHT]

    @property
    def inflight(self) -> dict[int, str]:
        """Path of each chunk in flight; not to be changed."""
        return self._inflight

    def state(self, chunk: int) -> ChunkState:
        """State of a chunk."""
        return ChunkState(self._states[chunk])

    def failures(self, chunk: int) -> Sequence[str]:
        """Paths that the chunk failed on, one for each failure."""
        return self._failed_on.get(chunk, ())

    @property
    def has_retries(self) -> bool:
        """Whether a chunk that has failed may be waiting."""
        return bool(self._by_failed_path)

    def next_plain(self) -> int:
        """First waiting chunk that never failed, -1 if none; forgets what waits no more."""
        chunk = self._first_of(self._returned)
        if chunk >= 0:
            return chunk  # it was granted once, so every fresh one has a higher index
        states = self._states
        while self._fresh < len(states) and states[self._fresh] != ChunkState.WAITING:
            self._fresh += 1
        return self._fresh if self._fresh < len(states) else -1

    def next_retry(self, path: str, others: bool) -> int:
        """First waiting chunk that has failed and that `path` should take, -1 if none.

        `others`: whether another path could take what has failed on this one.
        """
        best = -1
        for failed_path in tuple(self._by_failed_path):
            chunk = self._first_of(self._by_failed_path[failed_path])
            if chunk < 0:
                del self._by_failed_path[failed_path]
            elif (failed_path != path or not others) and (best < 0 or chunk < best):
                best = chunk
        return best

    def grant(self, chunk: int, path: str) -> None:
        """A waiting chunk, as told by `next_plain` or `next_retry`, goes in flight on `path`."""
        self._move(chunk, ChunkState.WAITING, ChunkState.INFLIGHT)
        # From now on it waits in one heap, or not at all: leave no second trace of it.
        if chunk == self._fresh:
            self._fresh += 1
        for heap in (self._returned, *self._by_failed_path.values()):
            if heap and heap[0] == chunk:
                heapq.heappop(heap)
        self.waiting_bytes -= self.nbytes[chunk]
        self.taken_bytes[path] += self.nbytes[chunk]
        self._inflight[chunk] = path

    def plain_run(self, first: int, most: int) -> int:
        """How many chunks from `first` (as told by `next_plain`) on, at most `most`, wait, never
        failed and have as many bytes as it."""
        if first != self._fresh or most <= 1:
            return 1
        states = self._states[first : first + most]
        count = len(states) - len(states.lstrip(_WAITING))
        sizes = self.nbytes[first : first + count]
        if sizes[-1] == sizes[0] and max(sizes) == min(sizes):
            return count
        return next(index for index, size in enumerate(sizes) if size != sizes[0])

    def grant_run(self, first: int, count: int, path: str) -> None:
        """`grant` for a run as told by `plain_run`."""
        if count == 1:
            self.grant(first, path)
            return
        end = first + count
        assert first == self._fresh
        assert not any(self._states[first:end])
        self._states[first:end] = bytes((ChunkState.INFLIGHT,)) * count
        self._fresh = end
        self.counts[ChunkState.WAITING] -= count
        self.counts[ChunkState.INFLIGHT] += count
        self.waiting_bytes -= count * self.nbytes[first]
        self.taken_bytes[path] += count * self.nbytes[first]
        self._inflight.update(dict.fromkeys(range(first, end), path))

    def done(self, chunks: Sequence[int]) -> None:
        """Chunks in flight have been verified."""
        states, inflight = self._states, self._inflight
        before, after = int(ChunkState.INFLIGHT), int(ChunkState.DONE)
        for chunk in chunks:
            assert states[chunk] == before, (chunk, self.state(chunk))
            states[chunk] = after
            del inflight[chunk]
        self.counts[ChunkState.INFLIGHT] -= len(chunks)
        self.counts[ChunkState.DONE] += len(chunks)
        if self._failed_on:
            for chunk in chunks:
                self._failed_on.pop(chunk, None)

    def give_back(self, chunk: int) -> None:
        """A chunk in flight waits again, through no fault of its own."""
        self._move(chunk, ChunkState.INFLIGHT, ChunkState.WAITING)
        self.taken_bytes[self._inflight.pop(chunk)] -= self.nbytes[chunk]
        self.waiting_bytes += self.nbytes[chunk]
        failed = self._failed_on.get(chunk)
        if failed:
            heapq.heappush(self._by_failed_path.setdefault(failed[-1], []), chunk)
        else:
            heapq.heappush(self._returned, chunk)

    def fail(self, chunk: int, attempts_max: int) -> bool:
        """A chunk in flight has failed on its path; False: it is dropped, attempts are used up."""
        failed = self._failed_on.setdefault(chunk, [])
        failed.append(self._inflight[chunk])
        if len(failed) >= attempts_max:
            self.drop(chunk)
            return False
        self.give_back(chunk)
        return True

    def drop(self, chunk: int) -> str:
        """Never load it; returns the path that it is in flight on, "" if on none."""
        state = self._states[chunk]
        if state in (ChunkState.DONE, ChunkState.DROPPED):
            return ""
        self._move(chunk, ChunkState(state), ChunkState.DROPPED)
        self._failed_on.pop(chunk, None)
        if state == ChunkState.WAITING:
            self.waiting_bytes -= self.nbytes[chunk]
            return ""
        path = self._inflight.pop(chunk)
        self.taken_bytes[path] -= self.nbytes[chunk]
        return path

    def inflight_by_path(self, chunks: Collection[int] | None = None) -> dict[str, tuple[int, ...]]:
        """Chunks in flight by path, all or those of `chunks`."""
        found: dict[str, list[int]] = {}
        for chunk in self._inflight if chunks is None else chunks:
            path = self._inflight.get(chunk)
            if path is not None:
                found.setdefault(path, []).append(chunk)
        return {path: tuple(sorted(indices)) for path, indices in found.items()}

    def _move(self, chunk: int, before: ChunkState, after: ChunkState) -> None:
        assert self._states[chunk] == before, (chunk, self.state(chunk), before)
        self._states[chunk] = after
        self.counts[before] -= 1
        self.counts[after] += 1

    def _first_of(self, heap: list[int]) -> int:
        while heap and self._states[heap[0]] != ChunkState.WAITING:
            heapq.heappop(heap)
        return heap[0] if heap else -1
