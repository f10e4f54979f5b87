"""Chunks that a relay holds already, and forwards without a storage read.

Owns which of them may be served, and their turns. Guarantees that none is forwarded for a ticket
that its daemon has not confirmed shortly before; what may not be served is read at the daemon,
which says why. Belongs to the loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.holdings import Holdings
from dualpath.agent.relay_job import ReadRight, RelayChunk, RelayGrant, Requester, Source
from dualpath.agent.relay_rights import RelayRights
from dualpath.agent.relay_serving import RelayServing
from dualpath.proto.v1 import common_pb2
from dualpath.transfer.errors import Overloaded

if TYPE_CHECKING:
    from dualpath.agent.relay_job import ChunkFailure

RIGHT_FAILURES = (common_pb2.CHUNK_FAILURE_DENIED, common_pb2.CHUNK_FAILURE_LEASE_EXPIRED)
"""A ticket under which a read failed with these may be worth nothing any more."""


class RelayHeld:
    """See the module docstring. `to_read(chunk)` takes one that may not be served; `on_news` is
    called when grants have news to be told, and chunks may be forwarded."""

    def __init__(
        self,
        holdings: Holdings,
        loop: asyncio.AbstractEventLoop,
        to_read: Callable[[RelayChunk], None],
        on_news: Callable[[Iterable[RelayGrant]], None],
    ) -> None:
        self._holdings = holdings
        self._loop = loop
        self._to_read = to_read
        self._on_news = on_news
        self._rights = RelayRights(loop, self._on_rights)
        self._serving = RelayServing()

    def take(self, chunk: RelayChunk, *, fresh: bool) -> bool:
        """Let a chunk that is held be forwarded from there; False if it has to be read."""
        held = self._holdings.find(chunk.name) if chunk.name is not None else None
        if held is None or not held.held or held.nbytes != chunk.target.nbytes:
            return False
        if fresh:
            self._holdings.doubt(held)
            return False
        grant = chunk.grant
        if grant.right is ReadRight.UNKNOWN:
            grant.right = self._right_of(chunk)
        if grant.right is ReadRight.REFUSED:
            return False
        self._holdings.use(held)
        chunk.held, chunk.slot = held, held.slot
        if grant.right is ReadRight.CONFIRMED:
            self._serve(chunk)
        grant.requester.held_queue.append(chunk)
        self._serving.add(grant.requester)
        return True

    def next(self) -> RelayChunk | None:
        """Take the chunk that is forwarded next, or None if nothing may start now."""
        return self._serving.next()

    def ended(self, chunk: RelayChunk) -> None:
        """A chunk that was taken by `next` has ended."""
        self._serving.ended(chunk)

    def recheck(self, requesters: Iterable[Requester]) -> None:
        """Ask again for grants that wait long: rights are taken away meanwhile."""
        changed: list[RelayGrant] = []
        for requester in requesters:
            firsts: dict[RelayGrant, RelayChunk] = {}
            for chunk in requester.held_queue:
                firsts.setdefault(chunk.grant, chunk)
            for grant, chunk in firsts.items():
                if grant.right is ReadRight.CONFIRMED:
                    grant.right = self._right_of(chunk)
                    if grant.right is ReadRight.REFUSED:
                        changed.append(grant)
        if changed:
            self._on_rights(changed)

    def failed(self, source: Source, failure: ChunkFailure) -> None:
        """A read at the daemon has failed."""
        if failure in RIGHT_FAILURES:
            self._rights.refused(source)

    def daemon_lost(self, daemon: DaemonLink) -> None:
        """Its tickets may have died with it."""
        self._rights.daemon_lost(daemon)

    def close(self) -> None:
        """Ask no more."""
        self._rights.close()

    def _right_of(self, chunk: RelayChunk) -> ReadRight:
        assert chunk.name is not None
        return self._rights.find(chunk.grant, chunk.name[0], chunk.block)

    def _serve(self, chunk: RelayChunk) -> None:
        """It will be forwarded from where it is held; a request keeps it, too."""
        if chunk.served:
            return
        chunk.served = True
        grant, held = chunk.grant, chunk.held
        assert held is not None
        grant.held_bytes += chunk.target.nbytes
        if grant.request:
            try:
                sharer = grant.requester.sharer
                self._holdings.pin(held, grant.request, self._loop.time(), sharer)
            except Overloaded:
                grant.request = ""

    def _on_rights(self, grants: list[RelayGrant]) -> None:
        """It is known of these whether they may be served."""
        told = set(grants)
        for requester in {grant.requester: None for grant in grants}:
            queued, requester.held_queue = requester.held_queue, deque()
            for chunk in queued:
                assert chunk.held is not None
                if chunk.grant not in told:
                    requester.held_queue.append(chunk)
                elif chunk.grant.right is ReadRight.CONFIRMED and chunk.held.held:
                    self._serve(chunk)
                    requester.held_queue.append(chunk)
                else:
                    self._holdings.unuse(chunk.held)
                    chunk.held, chunk.slot, chunk.served = None, None, False
                    self._to_read(chunk)
        self._on_news(grants)
