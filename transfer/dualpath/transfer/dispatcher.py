"""Which chunk goes by which path, and when: all loads of one agent.

Owns the queue of loads (first come, first served), which paths each may use, and what happens
when a chunk or a path fails. A pure state machine: no I/O, no threads, no clock; `now` (seconds,
monotonic) is passed in and the same calls give the same answers. One thread at a time may call.

Guarantees
- Every chunk is always exactly one of waiting, in flight on one path, verified, dropped; it is
  verified at most once.
- A path with free credit takes the next chunk of the first load that may use it. It passes over
  a load's chunk only if the other paths of that load, which are up, would end it earlier.
- No path has more in flight than its credit window (two chunks, if that is more).
- While a path that a load may use stays up and makes progress, each of its chunks is granted.
- A chunk that failed goes by another path than before if there is one that is up, else once more
  by the same; chunks of a lost path go back without a mark against them.
- A path that was lost gets no chunk until it has proven itself, if the load may use another that
  works: a *copy* of one is fetched by it (`trials`), and nobody waits for that.
- A load of a fixed policy stays with its path until that is lost.
- Of a load whose sides have shares, each side takes its own, to the nearest chunk, while both are
  up and no chunk fails.

Does not: fence or move bytes (whoever calls `path_lost`, `drop` or `remove_load` revokes what
they return first), keep deadlines, or know blocks.
Costs: `grants` takes O(granted chunks + loads passed over), never a scan of all chunks.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from dualpath.transfer.chunk_choice import chunk_for
from dualpath.transfer.chunk_queue import ChunkQueue, ChunkState
from dualpath.transfer.dispatch_config import DispatchConfig
from dualpath.transfer.errors import InvalidRequest, Overloaded
from dualpath.transfer.grant import (
    CANCELLED_REASON,
    OVERLOADED_REASON,
    OVERTAKEN_REASON,
    STALLED_REASON,
    UNBLAMED_REASONS,
    Grant,
)
from dualpath.transfer.load_queue import LoadQueue
from dualpath.transfer.overtaking import overtaken
from dualpath.transfer.path_state import PathCondition, PathState
from dualpath.transfer.path_table import PathTable
from dualpath.transfer.path_trial import chunk_to_try
from dualpath.transfer.placement import (
    AssignedPolicy,
    PathKind,
    PathView,
    PlacementPolicy,
    fallback_path,
    relay_of,
)
from dualpath.transfer.queued_load import QueuedLoad

CHUNKS_PER_LOAD_MAX = 1 << 20


class Dispatcher:
    """See the module's docstring."""

    def __init__(self, config: DispatchConfig | None = None) -> None:
        self._config = config or DispatchConfig()
        self._paths = PathTable(self._config)
        self._loads = LoadQueue(self._paths)
        self._counters: Counter[str] = Counter()
        self._now = -math.inf

    # ---------------------------------------------------------------- paths

    def add_path(self, name: str, kind: PathKind, now: float, limit_bytes_per_s: float = 0) -> None:
        """Register a path, up. `limit_bytes_per_s` 0: none. Raises InvalidRequest if known."""
        self._see(now)
        self._paths.add(name, kind, limit_bytes_per_s)
        self._replace_loads("path_added")

    def set_up(self, name: str, up: bool, now: float) -> None:
        """Tell that a path works (again), or must not be used until set up again.

        Up ends its backoff at once; if it had stalled, a trial follows. Down leaves what is in
        flight there: it may still arrive; `path_lost` gives it back. Raises InvalidRequest if the
        path is unknown.
        """
        self._see(now)
        path = self._paths.known(name)
        risen = PathCondition.TRIAL if path.doubted else PathCondition.UP
        condition = risen if up else PathCondition.DOWN
        if path.condition is condition:
            return
        path.condition = condition
        path.tried_at_s = math.inf
        self._replace_loads("path_up" if up else "path_down")

    def set_spare(self, name: str, spare: bool, now: float) -> None:
        """Tell whether a path arrives by the device that binds the direct one; see PathView."""
        self._see(now)
        path = self._paths.known(name)
        if path.spare is not spare:
            path.spare = spare
            self._replace_loads("path_spare")

    def report_queue(self, name: str, queue_bytes: int, now: float) -> None:
        """What the path's node says waits there for others. Unknown path: no effect."""
        self._see(now)
        path = self._paths.get(name)
        if path is not None:
            path.report(max(0, queue_bytes), now)

    def path_lost(self, name: str, reason: str, now: float) -> dict[str, tuple[int, ...]]:
        """The path is down for a backoff and then tried again; returns by load what it had.

        Those chunks wait again. Loads that were bound to it go direct or by any up path.
        """
        self._see(now)
        path = self._paths.get(name)
        if path is None:
            return {}
        if path.up:
            self._counters[f"path_lost:{reason}"] += 1
        path.lose(now, stalled=reason == STALLED_REASON)
        given_back = self._give_back(path, reason)
        self._replace_loads(reason)
        return given_back

    def stalled(self, now: float) -> tuple[str, ...]:
        """Paths with chunks in flight that have not moved for their patience (`stall_s` or,
        for a slow path, a few chunks' time)."""
        self._see(now)
        return tuple(path.name for path in self._paths if now >= path.stalls_at_s())

    def views(self, now: float) -> tuple[PathView, ...]:
        """All paths in the order of `add_path`."""
        self._see(now)
        return tuple(self._paths.views(frozenset(), self._now))

    # ---------------------------------------------------------------- loads

    def add_load(
        self,
        load_id: str,
        chunk_nbytes: Sequence[int],
        policy: PlacementPolicy,
        now: float,
        *,
        decode_peer: str = "",
        allowed: Collection[str] = (),
    ) -> None:
        """Queue a load; `chunk_nbytes` must not change any more. `allowed` (): all paths.

        Raises InvalidRequest (known id, empty chunk, too many, no known path in `allowed`) or
        Overloaded.
        """
        self._see(now)
        if load_id in self._loads:
            raise InvalidRequest(f"load {load_id!r} is already there")
        if len(self._loads) >= self._config.loads_max:
            raise Overloaded(
                f"{len(self._loads)} loads are under way, the most allowed", retry_after_s=0.1
            )
        if len(chunk_nbytes) > CHUNKS_PER_LOAD_MAX:
            raise InvalidRequest(
                f"a load of {len(chunk_nbytes)} chunks exceeds {CHUNKS_PER_LOAD_MAX}; load less"
            )
        if chunk_nbytes and min(chunk_nbytes) < 1:
            raise InvalidRequest(f"a chunk has at least one byte, not {min(chunk_nbytes)}")
        hint = frozenset(allowed)
        self._paths.check_hint(hint)
        load = self._loads.add(load_id, ChunkQueue(chunk_nbytes), policy, decode_peer, hint)
        paths = policy.paths_for(load.view, self._paths.views(hint, self._now))
        relays = {relay_of(path.name) for path in self._paths}
        known = policy.direct_share == 1 or decode_peer in relays
        self._count_stray(load, paths, "path_down" if known else "no_relay")
        self._loads.bind(load, paths)

    def remove_load(self, load_id: str) -> dict[str, tuple[int, ...]]:
        """Forget a load; returns by path what was in flight. Unknown: {}."""
        load = self._loads.get(load_id)
        if load is None:
            return {}
        inflight = load.chunks.inflight_by_path()
        for chunk, path in load.chunks.inflight.items():
            self._paths[path].release(load.chunks.nbytes[chunk])
        self._loads.remove(load)
        return inflight

    def drop(self, load_id: str, chunks: Collection[int]) -> dict[str, tuple[int, ...]]:
        """Never load these; returns by path those in flight. Unknown load: {}.

        What is verified or dropped already stays as it is.
        """
        load = self._loads.get(load_id)
        if load is None:
            return {}
        for chunk in chunks:
            load.check(chunk)
        inflight = load.chunks.inflight_by_path(frozenset(chunks))
        for chunk in chunks:
            path = load.chunks.drop(chunk)
            if path:
                self._paths[path].release(load.chunks.nbytes[chunk])
        self._loads.settle(load)
        return inflight

    def is_done(self, load_id: str) -> bool:
        """Whether every chunk is verified or dropped."""
        return self._loads.known(load_id).chunks.over

    def inflight_on(self, load_id: str, path: str, chunks: Iterable[int]) -> list[int]:
        """Those of `chunks` that are in flight on this path."""
        inflight = self._loads.known(load_id).chunks.inflight
        return [chunk for chunk in chunks if inflight.get(chunk) == path]

    def inflight(self, load_id: str) -> dict[str, tuple[int, ...]]:
        """Chunks in flight by path."""
        return self._loads.known(load_id).chunks.inflight_by_path()

    def waiting(self, load_id: str) -> int:
        """Bytes that are not granted yet."""
        return self._loads.known(load_id).chunks.waiting_bytes

    def paths_of(self, load_id: str) -> tuple[str, ...]:
        """Paths that the load is placed on now."""
        return self._loads.known(load_id).paths

    def progress(self, load_id: str) -> Mapping[ChunkState, int]:
        """Chunks in each state; they add up to all chunks."""
        return dict(zip(ChunkState, self._loads.known(load_id).chunks.counts, strict=True))

    def shares(self, load_id: str) -> Mapping[str, int]:
        """Verified bytes of the load by path."""
        return dict(self._loads.known(load_id).shares)

    def events(self, load_id: str) -> Mapping[str, int]:
        """Failures and fallbacks of the load by reason, with the words of `counters`."""
        return dict(self._loads.known(load_id).events)

    @property
    def counters(self) -> Mapping[str, int]:
        """Events of all loads since the start, as `what:reason`.

        path_lost, given_back (chunks), chunk_failed, attempts_used_up, fallback (loads that had
        to leave their path); `late` counts reports about chunks that were not in flight there.
        """
        return dict(self._counters)

    # ---------------------------------------------------------------- chunks

    def grants(self, now: float) -> list[Grant]:
        """What to fetch now. Call after every event, and when `next_event_s` has passed."""
        self._see(now)
        self._paths.look(now)
        granted: dict[tuple[str, str], list[int]] = {}
        while self._take_round(granted, now):
            pass  # what some took may make it worth while for one that left it to them
        return [self._grant(name, load_id, chunks) for (name, load_id), chunks in granted.items()]

    def verified(self, load_id: str, chunks: Sequence[int], path: str, now: float) -> Sequence[int]:
        """Chunks have landed and their checksums hold. Returns those that count: the others are
        late."""
        self._see(now)
        load = self._loads.get(load_id)
        inflight = {} if load is None else load.chunks.inflight
        fresh = [chunk for chunk in dict.fromkeys(chunks) if inflight.get(chunk) == path]
        self._counters["late"] += len(chunks) - len(fresh)
        if load is None or not fresh:
            return ()
        sizes = [load.chunks.nbytes[chunk] for chunk in fresh]
        load.chunks.done(fresh)
        load.shares[path] += sum(sizes)
        state = self._paths[path]
        trial = state.condition is PathCondition.TRIAL
        state.land(sizes, now)
        if trial:
            self._replace_loads("path_up")
        return fresh

    def failed(self, load_id: str, chunk: int, path: str, reason: str, now: float) -> bool:
        """A chunk did not arrive, or not intact.

        True: it will be tried again, by another path if one is up (or the report is late).
        False: its attempts are used up and it counts as dropped. Reason `overloaded` pauses the
        path and, like `cancelled` and `overtaken`, is not held against the chunk.
        """
        self._see(now)
        load = self._loads.get(load_id)
        if load is None or load.chunks.inflight.get(chunk) != path:
            self._counters["late"] += 1
            return True
        state = self._paths[path]
        if reason == OVERTAKEN_REASON:
            state.overtaken(now)
        elif reason != CANCELLED_REASON:
            state.progress_at_s = now
        state.release(load.chunks.nbytes[chunk])
        self._count(load, f"chunk_failed:{reason}", 1)
        again = True
        if reason in UNBLAMED_REASONS:
            load.chunks.give_back(chunk)
            if reason == OVERLOADED_REASON:
                state.pause(now)
        else:
            again = load.chunks.fail(chunk, self._config.attempts_max)
        if not again:
            self._count(load, f"attempts_used_up:{reason}", 1)
        self._loads.settle(load)
        return again

    def overtaken(self, now: float) -> list[Grant]:
        """Chunks in flight on a slow path that an idle one would land sooner (`overtake_s`).

        Changes nothing. Fence them, then call `failed` with reason `overtaken` for each that had
        not landed; the next `grants` gives them to the idle path.
        """
        self._see(now)
        slow = overtaken(self._paths, self._loads, self._config.overtake_s, now)
        return [self._grant(path, load.view.load_id, chunks) for load, path, chunks in slow]

    def trials(self, now: float) -> list[Grant]:
        """A chunk for each path on trial, of a load that goes by another path meanwhile: fetch a
        copy of it, which is thrown away, and tell `tried`.

        A path without an answer stalls, as one with chunks in flight: see `stalled`.
        """
        self._see(now)
        grants = []
        for path in self._paths:
            found = chunk_to_try(path, self._paths, self._loads)
            if found is not None:
                load, chunk = found
                path.tried_at_s = now
                grants.append(self._grant(path.name, load.view.load_id, (chunk,)))
        return grants

    def tried(self, name: str, now: float) -> None:
        """The copy has come by this path, and is right: loads may use it again. If it does not come
        say `path_lost`; if it was given up, `untried`."""
        self._see(now)
        path = self._paths.known(name)
        if path.tried_at_s < math.inf and path.condition is PathCondition.TRIAL:
            path.prove()
            self._replace_loads("path_up")

    def untried(self, name: str, now: float) -> None:
        """The copy was given up, through no fault of the path: `trials` names another."""
        self._see(now)
        self._paths.known(name).tried_at_s = math.inf

    def patience_s(self, name: str) -> float:
        """How long this path may be silent before it has stalled."""
        return self._paths.known(name).patience_s()

    def next_event_s(self, now: float) -> float:
        """Seconds from `now` until time alone may change an answer; inf if it cannot.

        Then ask `stalled`, `overtaken` and `grants` again.
        """
        at_s = math.inf
        idle = any(not path.inflight_chunks and path.dependable(now) for path in self._paths)
        for path in self._paths:
            at_s = min(at_s, path.stalls_at_s())
            if path.inflight_chunks and idle:
                at_s = min(at_s, max(path.progress_at_s, now) + self._config.overtake_s)
            if path.condition is PathCondition.BACKOFF:
                at_s = min(at_s, path.retry_at_s)
            if path.queue and path.up:
                if path.paused_until_s > now:
                    at_s = min(at_s, path.paused_until_s)
                elif not path.inflight_chunks:
                    # It leaves chunks to faster paths: look again whether they still are.
                    at_s = min(at_s, now + self._config.recheck_s)
        return max(0.0, at_s - now)

    # ---------------------------------------------------------------- decisions

    def _take_round(self, granted: dict[tuple[str, str], list[int]], now: float) -> bool:
        """Let all paths take turns until each has declined; whether any took something."""
        ready = [
            (path.drained_in_s(), order, path)
            for order, path in enumerate(self._paths)
            if path.queue and path.usable(now)
        ]
        heapq.heapify(ready)
        any_taken = False
        while ready:
            # The path that would be idle first takes a part of what it may, then all look anew.
            _, order, path = heapq.heappop(ready)
            if self._take_turn(path, granted, now):
                any_taken = True
                heapq.heappush(ready, (path.drained_in_s(), order, path))
        return any_taken

    def _take_turn(
        self, path: PathState, granted: dict[tuple[str, str], list[int]], now: float
    ) -> bool:
        """Grant `path` up to a batch, in the order of loads; whether it took anything."""
        batch_bytes = self._config.credit.batch_bytes(path.window)
        taken_bytes = 0
        ahead_bytes = 0
        index = 0
        while index < len(path.queue):
            load = self._loads.at(path.queue[index])
            chunk = chunk_for(load, path, self._paths, ahead_bytes, now)
            if chunk < 0:
                ahead_bytes += load.chunks.waiting_bytes
                index += 1
                continue
            nbytes = load.chunks.nbytes[chunk]
            if not path.may_take(nbytes, 0 if taken_bytes else batch_bytes):
                break
            count = 1
            if len(load.paths) == 1 and not load.chunks.has_retries:
                # Nothing has to be weighed chunk by chunk.
                most = min(-(-(batch_bytes - taken_bytes) // nbytes), path.may_take_run(nbytes))
                count = load.chunks.plain_run(chunk, most)
            load.chunks.grant_run(chunk, count, path.name)
            path.take(nbytes, now, count)
            granted.setdefault((path.name, load.view.load_id), []).extend(
                range(chunk, chunk + count)
            )
            taken_bytes += count * nbytes
            self._loads.settle(load)  # takes it off path.queue when nothing waits any more
            # Near the end of a split load go chunk by chunk, so that its paths end together.
            share = load.chunks.waiting_bytes // (4 * len(load.paths)) if load.paths else 0
            if taken_bytes >= (batch_bytes if len(load.paths) < 2 else min(batch_bytes, share)):
                break
        return taken_bytes > 0

    def _replace_loads(self, reason: str) -> None:
        """Paths came or went: place anew the loads that this concerns."""
        for load in self._loads:
            if load.policy.fixed:
                if any(self._paths.serves(self._paths[name], load.hint) for name in load.paths):
                    self._loads.settle(load)  # a new path may take what has failed
                    continue
                views = self._paths.views(load.hint, self._now)
                paths = (
                    fallback_path(views) if load.paths else load.policy.paths_for(load.view, views)
                )
                if load.paths and not load.chunks.over:
                    self._count(load, f"fallback:{reason}", 1)
            else:
                paths = load.policy.paths_for(load.view, self._paths.views(load.hint, self._now))
                self._count_stray(load, paths, reason)
            self._loads.bind(load, paths)

    def _count_stray(self, load: QueuedLoad, paths: tuple[str, ...], reason: str) -> None:
        """A load leaves the paths that it was assigned to."""
        policy = load.policy
        if (
            isinstance(policy, AssignedPolicy)
            and not load.chunks.over
            and policy.strays(load.view, paths)
            and not (load.paths and policy.strays(load.view, load.paths))
        ):
            self._count(load, f"fallback:{reason}", 1)

    # ---------------------------------------------------------------- bookkeeping

    def _see(self, now: float) -> None:
        """Time has passed: paths whose backoff is over go on trial."""
        self._now = max(now, self._now)
        changed = False
        for path in self._paths:
            if path.condition is PathCondition.BACKOFF and now >= path.retry_at_s:
                path.condition = PathCondition.TRIAL
                changed = True
        if changed:
            self._replace_loads("path_up")

    def _give_back(self, path: PathState, reason: str) -> dict[str, tuple[int, ...]]:
        given_back = {}
        if not path.inflight_chunks:
            return {}
        for load in self._loads:
            chunks = load.chunks.inflight_by_path().get(path.name, ())
            if not chunks:
                continue
            for chunk in chunks:
                load.chunks.give_back(chunk)
                path.release(load.chunks.nbytes[chunk])
            given_back[load.view.load_id] = chunks
            self._count(load, f"given_back:{reason}", len(chunks))
            self._loads.settle(load)
        return given_back

    def _grant(self, path: str, load_id: str, chunks: Sequence[int]) -> Grant:
        nbytes = self._loads.known(load_id).chunks.nbytes
        return Grant(load_id, path, tuple(chunks), sum(nbytes[chunk] for chunk in chunks))

    def _count(self, load: QueuedLoad, event: str, amount: int) -> None:
        self._counters[event] += amount
        load.events[event] += amount
