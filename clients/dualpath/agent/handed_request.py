"""What of a request has come to its decode node: what hand-offs bring, and receives take away.

Owns, for each request, which chunks its prefill side has declared final and this node holds, which
of them its engine has already, and how the last hand-off ended. What came first waits for the other
side here, but for no longer than `hold_s`; then everything of the request is let go. Nobody's
requests take more of the room for them than is left for others'. Belongs to the loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from dualpath.agent.hand_off_spec import check_request
from dualpath.agent.holdings import REQUESTS_MAX, ChunkName, HeldChunk, Holdings, RequestKey
from dualpath.kvstore.service.shares import Shares
from dualpath.transfer.errors import Overloaded

ChunkPlace: TypeAlias = tuple[bytes, bytes, int]
"""Namespace id, block hash, chunk of the block."""

SWEEP_S_MAX = 1.0
"""Longest time between two looks for what has expired."""


class Intake(Protocol):
    """A hand-off that is under way, at the decode side."""

    def finish(self, reason: str, detail: str) -> None:
        """End it now."""

    def again(self, name: ChunkName) -> bool:
        """A final chunk has lost its bytes here: have it come once more. False if it will not."""


class Receive(Protocol):
    """A receive that is under way."""

    def on_final(self, place: ChunkPlace) -> None:
        """A chunk is held and final."""

    def on_outcome(self) -> None:
        """The hand-off has ended."""


@dataclass(slots=True, eq=False)
class HandedRequest:
    """One request of a namespace. `final` chunks are held and pinned; with each goes whether it was
    held before it was offered. `copied` are with the engine: the xxh3-64 of each."""

    key: RequestKey
    final: dict[ChunkPlace, tuple[HeldChunk, bool]] = field(default_factory=dict)
    copied: dict[ChunkPlace, int] = field(default_factory=dict)
    outcome: tuple[str, str] | None = None
    """Reason and detail of the hand-off that ended last, the reason "" if it was whole."""
    intake: Intake | None = None
    receive: Receive | None = None
    expires_at: float = 0.0
    sharer: str | None = None
    """In whose share it counts: the peer's that named it first. None: an engine of this node."""

    @property
    def idle(self) -> bool:
        """Whether neither side is there."""
        return self.intake is None and self.receive is None


class HandedRequests:
    """See the module docstring."""

    def __init__(
        self,
        holdings: Holdings,
        hold_s: float,
        events: Counter[str],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._holdings = holdings
        self._hold_s = hold_s
        self._events = events
        self._loop = loop
        self._requests: dict[RequestKey, HandedRequest] = {}
        self._shares = Shares(REQUESTS_MAX, "requests held", retry_after_s=1.0)
        self._sweep: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._requests)

    def of(self, namespace_id: bytes, name: str, sharer: str | None = None) -> HandedRequest:
        """The record of a request. One that is new counts in the share of `sharer`, unless it is an
        engine of this node (None), whose receives are bounded elsewhere. Raises InvalidRequest,
        Overloaded: reason `quota` if it is this one who has too many."""
        check_request(name)
        key = (namespace_id, name)
        record = self._requests.get(key)
        if record is None:
            if sharer is not None:
                self._take_share(sharer)
            record = self._requests[key] = HandedRequest(key, sharer=sharer)
            record.expires_at = self._loop.time() + self._hold_s
            self._arm()
        return record

    def _take_share(self, sharer: str) -> None:
        """Room for one more. Requests of which nothing came, and where nobody is, make way, those
        of the same sharer first: their outcome is lost. Raises Overloaded."""
        while True:
            try:
                self._shares.take(sharer)
            except Overloaded as error:
                empty = self._empty(sharer)
                if empty is None and error.reason != "quota":
                    empty = self._empty(None)
                if empty is None:
                    raise
                self._forget(empty)
            else:
                return

    def _empty(self, sharer: str | None) -> HandedRequest | None:
        """One that makes way, of this sharer or of any peer."""
        for record in self._requests.values():
            empty = record.idle and not record.final and not record.copied
            if empty and record.sharer is not None and sharer in (None, record.sharer):
                return record
        return None

    def _forget(self, record: HandedRequest) -> None:
        if self._requests.get(record.key) is record:
            del self._requests[record.key]
            if record.sharer is not None:
                self._shares.give_back(record.sharer)

    def begin_intake(self, record: HandedRequest, intake: Intake) -> None:
        """A hand-off begins."""
        assert record.intake is None
        self._holdings.begin(record.key, sharer=record.sharer)
        record.intake, record.outcome = intake, None

    def end_intake(self, record: HandedRequest, reason: str, detail: str) -> None:
        """It has ended: tell whoever receives."""
        record.intake, record.outcome = None, (reason, detail)
        self._settle(record)
        if record.receive is not None:
            record.receive.on_outcome()

    def begin_receive(self, record: HandedRequest, receive: Receive) -> None:
        """A receive begins."""
        assert record.receive is None
        self._holdings.begin(record.key, claims=True)
        record.receive = receive

    def end_receive(self, record: HandedRequest, reason: str, detail: str) -> None:
        """It has ended, and with it the request; `reason` is "" if the engine has everything."""
        record.receive = None
        self._forget(record)
        intake = record.intake
        if intake is not None:
            intake.finish(reason or "aborted", detail or "the decode engine has what it wanted")
        self._holdings.release(record.key)
        self._holdings.end(record.key, self._loop.time())

    def final(self, record: HandedRequest, place: ChunkPlace, chunk: HeldChunk, had: bool) -> None:
        """A chunk is held and has its last bytes: pin it until the engine has it."""
        self._holdings.pin(chunk, record.key[1], self._loop.time(), record.sharer)
        record.final[place] = (chunk, had)
        if record.receive is not None:
            record.receive.on_final(place)

    def copied(self, record: HandedRequest, place: ChunkPlace) -> None:
        """The engine has it."""
        chunk, _ = record.final.pop(place)
        record.copied[place] = chunk.name[3]
        self._holdings.unpin(chunk, record.key[1])

    def close(self) -> None:
        """Let everything go."""
        if self._sweep is not None:
            self._sweep.cancel()
        for record in tuple(self._requests.values()):
            if record.intake is not None:
                record.intake.finish("aborted", "the agent stops")

    def _settle(self, record: HandedRequest) -> None:
        now = self._loop.time()
        record.expires_at = now + self._hold_s
        self._holdings.end(record.key, now)

    def _arm(self) -> None:
        if self._sweep is None:
            self._sweep = self._loop.call_later(min(SWEEP_S_MAX, self._hold_s / 4), self._on_sweep)

    def _on_sweep(self) -> None:
        self._sweep = None
        now = self._loop.time()
        self._holdings.expire(now)
        for record in tuple(self._requests.values()):
            if record.idle and record.expires_at <= now:
                self._forget(record)
                self._holdings.release(record.key)
                self._events["hand_off_expired"] += 1
        if self._requests or self._holdings.requests:
            self._arm()
