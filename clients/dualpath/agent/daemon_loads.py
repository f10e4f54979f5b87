"""All running loads of one daemon: who fetches what by which path, and what came of it.

Owns the dispatcher of these loads and carries out its decisions: arms windows, sends grants,
takes verdicts and failures, fences what is given up, and ends loads. The order is always: fence,
then give back, so that no two paths ever write the same bytes. Belongs to the loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Collection, Mapping
from functools import partial

from dualpath.agent.active_load import ActiveLoad
from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.first_looks import FirstLooks
from dualpath.agent.load_cuts import LoadCuts
from dualpath.agent.load_refresh import LoadRefresh
from dualpath.agent.load_routes import LoadRoutes
from dualpath.agent.load_window import LoadWindow
from dualpath.agent.mailbox import Mailbox
from dualpath.agent.network import Network
from dualpath.agent.outcome import LoadResult, MissReason
from dualpath.agent.outgoing_grants import OutgoingGrants
from dualpath.agent.path_counts import PathCounts
from dualpath.agent.path_trials import PathTrials
from dualpath.agent.relay_job import REASON_OF_FAILURE
from dualpath.agent.relay_link import RelayLink
from dualpath.agent.self_relay import SelfRelay
from dualpath.proto.v1 import common_pb2
from dualpath.transfer.dispatch_config import DispatchConfig
from dualpath.transfer.dispatcher import Dispatcher
from dualpath.transfer.grant import CANCELLED_REASON, OVERTAKEN_REASON, Grant
from dualpath.transfer.placement import DIRECT_PATH, PathKind, PathView, PlacementPolicy, relay_of

log = logging.getLogger(__name__)

STALLS_MAX = 2
"""Stalls of a path without a chunk in between; then its link is made anew."""
ARRIVALS_PAUSE_S = 0.004
"""Time between two looks at what has landed, but for the last of what is in flight."""
REFRESHES_MAX = 3
"""Most new leases of one load after failures; then they count against its chunks."""

_MISS_OF_REASON = {reason.value: reason for reason in MissReason}
"""The rest is UNAVAILABLE."""


class DaemonLoads:
    """See the module docstring."""

    def __init__(
        self,
        daemon: DaemonLink,
        relays: Mapping[str, RelayLink],
        compute: Network,
        self_relay: SelfRelay,
        config: DispatchConfig,
        loop: asyncio.AbstractEventLoop,
        *,
        storage_limit_bytes_per_s: float,
        lease_s: float,
        grace_s: float,
    ) -> None:
        self.daemon = daemon
        self.loads: dict[str, ActiveLoad] = {}
        self.counts = PathCounts()
        self.routes = LoadRoutes(daemon, relays.values(), compute, self_relay)
        self._loop = loop
        self._grace_s = grace_s
        self._arrivals: Mailbox[LoadWindow] = Mailbox(loop, self._on_arrivals, ARRIVALS_PAUSE_S)
        self._stalls: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        self._stranded_timer: asyncio.TimerHandle | None = None
        self._pumping = False
        self._again = False
        self._refresh = LoadRefresh(daemon, self.routes.delegates, lease_s)
        self.dispatcher = Dispatcher(config)
        self._cuts = LoadCuts()
        self._grants = OutgoingGrants(
            self.loads,
            self.dispatcher,
            self.routes,
            self._refresh,
            self._arrivals,
            loop,
            on_ready=self.sendable,
            on_refused=self._refused,
            on_progress=self._on_progress,
            on_lost=self._not_sent,
        )
        self._trials = PathTrials(
            self.loads,
            self.dispatcher,
            self.routes,
            self._refresh,
            loop,
            on_ready=self.sendable,
            on_refused=self._refused,
            on_failed=self._not_sent,
            on_proven=self._proven,
        )
        self.first_looks = FirstLooks(self, self.routes, self._refresh, loop, lease_s)
        for name in self.routes.names:
            self._add_path(name, storage_limit_bytes_per_s if name == DIRECT_PATH else 0)
        self.link_changed()

    # Paths.

    def add_path(self, path: str, link: DaemonLink | RelayLink, limit_bytes_per_s: float) -> None:
        """Use a further link, of ours or of a relay. Raises InvalidRequest beyond PATHS_MAX."""
        self._add_path(path, limit_bytes_per_s)
        self.routes.add(path, link)
        self.link_changed()

    def _add_path(self, path: str, limit_bytes_per_s: float) -> None:
        kind = PathKind.RELAY if relay_of(path) else PathKind.DIRECT
        self.dispatcher.add_path(path, kind, self._loop.time(), limit_bytes_per_s)
        self.dispatcher.set_up(path, False, self._loop.time())

    def views(self) -> tuple[PathView, ...]:
        """State of the paths."""
        return self.dispatcher.views(self._loop.time())

    def link_changed(self) -> None:
        """The daemon or a relay came or went: bring the dispatcher's paths in line."""
        now = self._loop.time()
        up = {view.name: view.up for view in self.views()}
        wanted = {name: self.routes.up(name) for name in self.routes.names}
        for name, is_up in wanted.items():
            if is_up and not up[name]:
                self.dispatcher.set_spare(name, self.routes.spare(name), now)
                self.dispatcher.set_up(name, True, now)
            elif not is_up:
                self._lose(name, "path_lost")
                self.dispatcher.set_up(name, False, now)
        if not self.daemon.up:
            for load in self.loads.values():
                if load.refreshing is None and load.looking is None:
                    load.events["lease_expired"] += 1  # leases end with the session
                    self._refresh.renew(load, self.sendable, self.cut)
        if not any(wanted.values()):
            self._watch_stranded()
        self.pump()

    def report_queue(self, path: str, queue_bytes: int) -> None:
        """What waits at the storage link of a path for others."""
        self.dispatcher.report_queue(path, queue_bytes, self._loop.time())

    def _lose(self, path: str, reason: str) -> None:
        """Fence everything in flight on a path and give it back."""
        self._arrivals.drain()
        now = self._loop.time()
        inflight = [each for each in self.loads if path in self.dispatcher.inflight(each)]
        for load_id in tuple(self.loads):
            self._close_window(self.loads[load_id], path)
        self._arrivals.drain()  # those that had landed before the fence
        self._trials.end(path)
        self.dispatcher.path_lost(path, reason, now)
        for load_id in inflight:
            load = self.loads.get(load_id)
            if load is not None:
                load.events[reason] += 1
                self._grants.take_held(load, (path,))
        if inflight:
            log.warning("path %s: %s; %d loads go on by others", path, reason, len(inflight))

    def _not_sent(self, path: str, reason: str) -> None:
        self._lose(path, reason)
        if self._pumping:
            self._again = True
        else:
            self._loop.call_soon(self.pump)

    def _proven(self, path: str) -> None:
        self._stalls[path] = 0
        log.info("path %s works again", path)
        self.pump()

    def _close_window(self, load: ActiveLoad, path: str) -> None:
        window = load.windows.pop(path, None)
        if window is None:
            return
        window.close()
        window.outstanding.clear()
        self.routes.cancel(load, path, window.grant_ids)

    # Loads.

    def add(self, load: ActiveLoad, policy: PlacementPolicy) -> None:
        """Run a load that has begun. Raises InvalidRequest, Overloaded."""
        spec = load.spec
        self.dispatcher.add_load(
            spec.load_id,
            load.progress.chunk_nbytes,
            policy,
            self._loop.time(),
            decode_peer=spec.decode_peer,
            allowed=spec.paths,
        )
        self.loads[spec.load_id] = load
        self._skip_had(load)
        load.deadline_timer = self._loop.call_at(
            load.deadline_at, self.end, load, MissReason.DEADLINE, "the deadline passed"
        )
        gone = MissReason.UNAVAILABLE, "its memory was taken back", "aborted"
        load.entry.on_gone[load] = partial(self.end, load, *gone)
        placed = self.dispatcher.paths_of(spec.load_id)
        self._refresh.delegate(load, placed, self.sendable, self._refused)
        self.pump()
        if load.had:
            self._check_done(load)  # there may be nothing left

    def _skip_had(self, load: ActiveLoad) -> None:
        """What is there already is not fetched."""
        blocks = load.progress.blocks
        had = [chunk * blocks + block for block, chunk in load.had if block < blocks]
        if had:
            load.progress.verified(had)
            self.dispatcher.drop(load.spec.load_id, had)

    def end(
        self, load: ActiveLoad, miss: MissReason, detail: str, event: str = ""
    ) -> LoadResult | None:
        """End a load now, with the longest verified prefix; fenced when this returns."""
        load_id = load.spec.load_id
        if self.loads.get(load_id) is not load:
            return load.result
        for window in load.windows.values():
            window.close()
        self._arrivals.drain()  # what had landed before the fence; it may complete the load
        if self.loads.get(load_id) is not load:
            return load.result
        if not load.progress.complete:
            load.miss, load.detail = miss, detail
            load.events[event or miss.value] += 1
            log.warning(
                "%s, placed on %s of %s, ended early, %s: %s",
                load.describe(self.dispatcher.progress(load_id)),
                self.dispatcher.paths_of(load_id),
                {view.name: view.up for view in self.views()},
                miss.value,
                detail,
            )
        return self._finish(load)

    def _finish(self, load: ActiveLoad) -> LoadResult:
        load_id = load.spec.load_id
        extra = {
            name: count
            for name, count in self.dispatcher.events(load_id).items()
            if name.startswith("fallback")
        }
        self.remove(load)
        if load.refreshing is not None:
            load.refreshing.cancel()
        self._refresh.release(load)
        result = load.finish(self._loop.time(), extra)
        if load.looking is not None:
            load.looking.end(begun=True)
        self._loop.call_soon(self.pump)
        return result

    def remove(self, load: ActiveLoad) -> None:
        """Fence a load and forget it."""
        for window in load.windows.values():
            window.close()
            landed = not window.outstanding
            self.routes.cancel(load, window.path, window.grant_ids, landed=landed)
        self._trials.forget(load)
        self.dispatcher.remove_load(load.spec.load_id)
        del self.loads[load.spec.load_id]
        load.entry.on_gone.pop(load, None)
        if load.deadline_timer is not None:
            load.deadline_timer.cancel()

    def cut(self, load: ActiveLoad, block: int, reason: str, detail: str) -> None:
        """The prefix ends before `block`."""
        if block >= load.progress.blocks_valid:
            return
        load.miss = _MISS_OF_REASON.get(reason, MissReason.UNAVAILABLE)
        load.detail = detail
        dropped = load.progress.cut(block)
        for path, chunks in self.dispatcher.drop(load.spec.load_id, dropped).items():
            window = load.windows.get(path)
            if window is not None:
                window.fence_chunks(chunks)
        load.changed()

    def _check_done(self, load: ActiveLoad) -> None:
        if load.result is None and (
            load.progress.complete or self.dispatcher.is_done(load.spec.load_id)
        ):
            self._finish(load)

    def _watch_stranded(self) -> None:
        if self._stranded_timer is None and self.loads:
            self._stranded_timer = self._loop.call_later(self._grace_s, self._end_stranded)

    def _end_stranded(self) -> None:
        """End loads that no path can serve any more, rather than wait for their deadlines."""
        self._stranded_timer = None
        up = {view.name for view in self.views() if view.up}
        for load in tuple(self.loads.values()):
            if not self.daemon.up:
                reason = f"daemon {self.daemon.address}: {self.daemon.link.reason}"
                self.end(load, MissReason.UNAVAILABLE, reason, "daemon_unavailable")
            elif not up & set(load.spec.paths or self.routes.names):
                self.end(load, MissReason.UNAVAILABLE, "no path is up", "no_path")

    # Decisions.

    def pump(self) -> None:
        """Carry out what the dispatcher decides now."""
        if self._pumping:
            self._again = True
            return
        self._pumping = True
        try:
            self._again = True
            while self._again:
                self._again = False
                self._pump_once()
        finally:
            self._pumping = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.loads or self._trials:
            wait_s = self.dispatcher.next_event_s(self._loop.time())
            if wait_s < float("inf"):
                self._timer = self._loop.call_later(max(wait_s, 0.001), self.pump)

    def _pump_once(self) -> None:
        now = self._loop.time()
        for path in self.dispatcher.stalled(now):
            self._lose(path, "stalled")
            self._stalls[path] += 1
            if self._stalls[path] >= STALLS_MAX:
                self._stalls[path] = 0
                self.routes.renew(path, f"stalled {STALLS_MAX} times")
        for grant in self.dispatcher.overtaken(now):
            self._take_back(grant)
        for cut in self._cuts.due(self.loads, self.dispatcher.paths_of, self.views, now):
            load = self.loads.get(cut.load_id)
            if load is not None:
                load.events["shortened"] += 1
                self.cut(load, cut.blocks, cut.reason, cut.detail)
                self._ask_anew(load)
                self._check_done(load)
        for grant in self.dispatcher.grants(now):
            self._grants.send(grant)
        for grant in self.dispatcher.trials(now):
            self._trials.begin(grant)

    def _ask_anew(self, load: ActiveLoad) -> None:
        """Fence and cancel what is under way, so that nobody sends what is wanted no more."""
        load_id, now = load.spec.load_id, self._loop.time()
        for path in tuple(load.windows):
            self._close_window(load, path)
        self._arrivals.drain()  # those that had landed before the fence
        if load_id in self.loads:
            load.held.clear()
            for path, chunks in self.dispatcher.inflight(load_id).items():
                for index in chunks:
                    self.dispatcher.failed(load_id, index, path, CANCELLED_REASON, now)
            self._again = True

    def _take_back(self, grant: Grant) -> None:
        """Fence chunks on a slow path, so that an idle one can fetch them sooner."""
        load = self.loads.get(grant.load_id)
        if load is None:
            return
        wanted = set(grant.chunks)
        taken: set[int] = set()
        window = load.windows.get(grant.path)
        if window is not None:
            tags = [tag for tag, index in window.outstanding.items() if index in wanted]
            taken.update(window.fence(tags).values())
        taken.update(load.take_from_held(grant.path, wanted))  # not even sent
        now = self._loop.time()
        for index in taken:
            self.dispatcher.failed(grant.load_id, index, grant.path, OVERTAKEN_REASON, now)
        load.events[OVERTAKEN_REASON] += len(taken)

    def sendable(self, load: ActiveLoad) -> None:
        """Tickets or a new lease came: send what waited for them."""
        self._grants.send_held(load)
        self._trials.go_on(load)
        self._check_done(load)  # the prefix may have been cut to what is there
        self.pump()

    def _refused(self, load: ActiveLoad, paths: Collection[str], reason: str) -> None:
        """No ticket for these paths: their grants of this load go elsewhere."""
        for grant in self._grants.take_held(load, paths):
            for index in grant.chunks:
                self._failed(load, grant.path, index, reason, "no ticket for this path")
        self._trials.refused(load, paths, reason)
        self._check_done(load)
        self.pump()

    # News.

    def _on_arrivals(self, windows: list[LoadWindow]) -> None:
        now = self._loop.time()
        touched: dict[str, ActiveLoad] = {}
        for window in windows:
            load = self.loads.get(window.load_id)
            landed = window.take_landed(now)
            if load is None or not (landed.intact or landed.corrupt):
                continue
            touched[window.load_id] = load
            if fresh := self.dispatcher.verified(window.load_id, landed.intact, window.path, now):
                nbytes = load.verified(fresh, window.path)
                self._stalls[window.path] = 0
                self.counts.verified(window.path, nbytes, landed.waits_s)
            load.distrusted.update(landed.corrupt)
            for index in landed.corrupt:
                self._failed(load, window.path, index, "corrupt", "checksum does not hold")
        for load in touched.values():
            load.changed()
            self._check_done(load)
        self.pump()

    def _on_progress(self, window: LoadWindow, progress: common_pb2.GrantProgress) -> None:
        self._arrivals.drain()  # what landed before this message was sent
        if window.path in self.routes.relays:
            self.report_queue(window.path, progress.queue_bytes)
        if progress.done:
            window.grant_ids.discard(progress.grant_id)
        load = self.loads.get(window.load_id)
        if load is not None:
            load.held_bytes[window.path] += progress.held_bytes
        if load is None or not progress.failed_tag:
            return
        unlanded = window.fence(progress.failed_tag)
        for tag, failure in zip(progress.failed_tag, progress.failure, strict=True):
            index = unlanded.get(tag)
            if index is not None:
                reason = REASON_OF_FAILURE.get(failure, "refused")
                self._failed(load, window.path, index, reason, progress.detail)
        self._check_done(load)
        self.pump()

    def _failed(self, load: ActiveLoad, path: str, index: int, reason: str, detail: str) -> None:
        """A chunk did not come, or not intact: again, or the prefix ends before its block."""
        now = self._loop.time()
        load_id = load.spec.load_id
        load.events[reason] += 1
        if reason in ("lease_expired", "denied") and load.refreshes < REFRESHES_MAX:
            # Not the chunk's fault: it waits until the load has a lease (and tickets) again.
            self.dispatcher.failed(load_id, index, path, CANCELLED_REASON, now)
            if load.refreshing is None:
                load.refreshes += 1
                self._refresh.renew(load, self.sendable, self.cut)
            return
        # A broken connection is the path's fault: it pauses, and the chunk keeps its attempts.
        blamed = "overloaded" if reason == "peer_lost" else reason
        if self.dispatcher.failed(load_id, index, path, blamed, now):
            return
        block, chunk = load.progress.chunk_ref(index)
        if reason == "corrupt":
            self._refresh.report_corrupt(load, block, chunk)
        self.cut(load, block, reason, f"block {block}, chunk {chunk}: {detail}")

    async def renew_leases(self, lease_s: float) -> None:
        """Extend the leases of all running loads, in one call."""
        await self._refresh.renew_all(self.loads, lease_s, self.sendable, self.cut)

    def self_relay_lost(self) -> None:
        """Our own compute connection broke: what went through it goes again."""
        for path in self.routes.direct:
            self._lose(path, "path_lost")
        self.pump()

    def close(self) -> None:
        """End all loads."""
        self._trials.close()
        self._refresh.close()
        for load in tuple(self.loads.values()):
            self.end(load, MissReason.UNAVAILABLE, "the agent stops", "aborted")
        for timer in (self._timer, self._stranded_timer):
            if timer is not None:
                timer.cancel()
