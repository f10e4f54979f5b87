"""What a running load needs from its daemon besides bytes: tickets, a new lease, its release.

Owns the background calls of loads and their tasks. Guarantees that each request ends in one of
its callbacks unless the load ended first, and that a lease is released after what is still to be
said under it. Decides nothing about chunks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any

import numpy as np
from dualpath.agent.active_load import ActiveLoad
from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.load_routes import Delegate
from dualpath.agent.outcome import MissReason
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import DeadlineExceeded, DualPathError, Unavailable
from numpy.typing import NDArray

log = logging.getLogger(__name__)

TICKET_S_MAX = 600.0
RELEASE_PAUSE_S = 0.05
"""Leases that end within this time are released together."""
RETRY_S = 0.01
"""Pause after a call that failed with its session, until the link notices."""

OnReady = Callable[[ActiveLoad], None]
OnRefused = Callable[[ActiveLoad, Collection[str], str], None]
OnCut = Callable[[ActiveLoad, int, str, str], None]
"""The prefix ends before this block, for this reason; detail."""


class LoadRefresh:
    """See the module docstring. `delegates` are by path. Belongs to the loop."""

    def __init__(
        self, daemon: DaemonLink, delegates: Mapping[str, Delegate], lease_s: float
    ) -> None:
        self._daemon = daemon
        self._delegates = delegates
        self._lease_s = lease_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._over: list[int] = []

    def ready(self, load: ActiveLoad, path: str) -> bool:
        """Whether grants of this load may be sent on a path now."""
        if load.refreshing is not None or load.looking is not None:
            return False
        delegate = self._delegates.get(path)
        if delegate is None:
            return True
        peer_id = delegate.peer_id_at(self._daemon.address)
        return bool(peer_id) and load.tickets.get(path, ("", b""))[0] == peer_id

    def delegate(
        self, load: ActiveLoad, paths: Collection[str], on_ready: OnReady, on_refused: OnRefused
    ) -> None:
        """Get tickets for those of `paths` that lack one; one call at a time a load."""
        known = [path for path in paths if path in self._delegates]
        missing = [path for path in known if not self.ready(load, path)]
        if missing and load.delegating is None and load.lease_id and load.refreshing is None:
            load.delegating = self._start(
                self._delegate(load, missing, on_ready, on_refused), f"tickets {load.spec.load_id}"
            )

    async def _delegate(
        self, load: ActiveLoad, paths: list[str], on_ready: OnReady, on_refused: OnRefused
    ) -> None:
        address = self._daemon.address
        peer_ids = {path: self._delegates[path].peer_id_at(address) for path in paths}
        away = [path for path, peer_id in peer_ids.items() if not peer_id]
        asked = {path: peer_id for path, peer_id in peer_ids.items() if peer_id}
        ttl_s = min(TICKET_S_MAX, load.spec.deadline_s)
        reason = ""
        if asked:
            try:
                tickets = await self._daemon.delegate(load.lease_id, tuple(asked.values()), ttl_s)
                for (path, peer_id), ticket in zip(asked.items(), tickets, strict=True):
                    load.tickets[path] = (peer_id, ticket)
            except DualPathError as error:
                log.warning("load %s got no tickets: %s", load.spec.load_id, error)
                reason = error.reason
        load.delegating = None
        if load.result is not None:
            return
        if reason:
            on_refused(load, tuple(asked), reason)
        if away:
            on_refused(load, away, "path_lost")
        on_ready(load)

    def renew(self, load: ActiveLoad, on_ready: OnReady, on_cut: OnCut) -> None:
        """Look up again after the lease was lost, once at a time."""
        if load.refreshing is not None:
            return
        load.tickets.clear()
        load.refreshing = self._start(
            self._renew(load, on_ready, on_cut), f"lease {load.spec.load_id}"
        )

    async def _renew(self, load: ActiveLoad, on_ready: OnReady, on_cut: OnCut) -> None:
        wanted = load.progress.blocks_valid
        cut: tuple[int, str, str] | None = None
        try:
            hit = await self._look_up(load, wanted)
            load.former_leases.append(load.lease_id)
            load.lease_id = hit.lease_id
            same = _same_blocks(load, np.frombuffer(hit.checksums, "<u8"), hit.blocks)
            if same < wanted:
                # Blocks that were written anew with other bytes are not these.
                miss = MissReason.of_proto(hit.miss) if same == hit.blocks else MissReason.ABSENT
                cut = (same, miss.value, f"gone since the load began: {hit.detail}")
        except DualPathError as error:
            cut = (0, error.reason, str(error))
        load.refreshing = None
        if load.result is not None:
            await self._daemon.release(_leases_of(load))
            return
        if cut is not None:
            # What is verified stays: only blocks that still lack something are given up.
            on_cut(load, max(cut[0], load.progress.complete_blocks()), cut[1], cut[2])
        on_ready(load)

    async def _look_up(self, load: ActiveLoad, wanted: int) -> store_pb2.LookupResponse:
        """Look up as often as the session breaks; the load's end cancels this."""
        loop = asyncio.get_running_loop()
        while True:
            left_s = load.deadline_at - loop.time()
            if left_s <= 0 or not await self._daemon.link.wait_up(left_s):
                raise DeadlineExceeded("the daemon did not come back in time")
            try:
                return await self._daemon.lookup(
                    load.spec.namespace_id,
                    load.spec.hashes[:wanted],
                    lease_s=self._lease_s,
                    timeout_s=max(0.05, load.deadline_at - loop.time()),
                )
            except Unavailable as error:
                log.info("load %s has no new lease yet: %s", load.spec.load_id, error)
                await asyncio.sleep(RETRY_S)

    async def renew_all(
        self, loads: Mapping[str, ActiveLoad], lease_s: float, on_ready: OnReady, on_cut: OnCut
    ) -> None:
        """Extend the leases of running loads, in one call; those that are gone are made anew."""
        by_lease = {load.lease_id: load for load in loads.values() if load.lease_id}
        if not by_lease or not self._daemon.up:
            return
        try:
            expired = await self._daemon.renew(tuple(by_lease), lease_s)
        except DualPathError as error:
            log.warning("leases at daemon %s were not renewed: %s", self._daemon.address, error)
            return
        for lease_id in expired:
            load = by_lease[lease_id]
            if loads.get(load.spec.load_id) is load and load.refreshing is None:
                load.events["lease_expired"] += 1
                self.renew(load, on_ready, on_cut)

    def report_corrupt(self, load: ActiveLoad, block: int, chunk: int) -> None:
        """Tell the daemon of a chunk that failed its checksum on all paths."""
        task = self._start(
            self._report(load, block, chunk), f"corrupt {load.spec.load_id} {block}.{chunk}"
        )
        load.reports.append(task)

    async def _report(self, load: ActiveLoad, block: int, chunk: int) -> None:
        try:
            dropped = await self._daemon.report_corrupt(load.lease_id, block, chunk)
        except DualPathError as error:
            log.warning("block %d of %s was not reported: %s", block, load.spec.load_id, error)
            return
        log.warning(
            "load %s: block %d chunk %d is corrupt; the daemon %s",
            load.spec.load_id,
            block,
            chunk,
            "dropped it" if dropped else "finds it intact",
        )

    def release(self, load: ActiveLoad) -> None:
        """The load ended: give its lease back, with those of others that end now."""
        if not _leases_of(load) or not self._daemon.up:
            return
        if load.reports:
            self._start(self._release_after(load), f"release {load.spec.load_id}")
            return
        first = not self._over
        self._over += _leases_of(load)
        if first:
            asyncio.get_running_loop().call_later(RELEASE_PAUSE_S, self._release)

    async def _release_after(self, load: ActiveLoad) -> None:
        await asyncio.wait(load.reports)
        await self._daemon.release(_leases_of(load))

    def _release(self) -> None:
        over, self._over = self._over, []
        if over and self._daemon.up:
            self._start(self._daemon.release(over), f"release {len(over)} leases")

    def close(self) -> None:
        """Cancel what is under way; leases end with the session."""
        for task in tuple(self._tasks):
            task.cancel()

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)


def _leases_of(load: ActiveLoad) -> list[int]:
    """All that the load has had and not given back."""
    return [lease_id for lease_id in (*load.former_leases, load.lease_id) if lease_id]


def _same_blocks(load: ActiveLoad, checksums: NDArray[np.uint64], blocks: int) -> int:
    """Length of the prefix that is still the one that the load began with."""
    chunks = load.layout.chunk_count
    compared = min(blocks * chunks, len(checksums), len(load.checksums))
    differs = np.flatnonzero(load.checksums[:compared] != checksums[:compared])
    return int(differs[0] if len(differs) else compared) // chunks
