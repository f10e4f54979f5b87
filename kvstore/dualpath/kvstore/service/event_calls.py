"""The Events stream: what became present and what left, to routers that follow it.

Owns the meeting of the bounded log with its consumers. A consumer that does not read is ended, one
that is too slow is told how much it lost; neither holds memory of the daemon, nor does it ever slow
the store. Shows only namespaces that the caller may read, and ends soon after it may not any more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from dualpath.kvstore.block_events import BlockEvent, BlockEvents, EventKind
from dualpath.kvstore.service.access import Access
from dualpath.kvstore.service.auth import Caller
from dualpath.kvstore.service.messages import checked_namespace_id, miss_number
from dualpath.kvstore.service.principal import Rights
from dualpath.kvstore.service.quotas import Quotas
from dualpath.kvstore.service.shares import Shares
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import DeadlineExceeded, Unavailable

STREAMS_MAX = 128
BATCH_EVENTS = 512
"""Most events of one answer: about 60 KB."""
SEND_S_MAX = 60.0
"""Longest that a consumer may take no answer."""
ASK_AGAIN_S = 1.0
"""So often it is asked, where nothing happens, whether the caller may still follow."""

_KINDS = {
    EventKind.STORED: store_pb2.BLOCK_EVENT_KIND_STORED,
    EventKind.REMOVED: store_pb2.BLOCK_EVENT_KIND_REMOVED,
    EventKind.CLEARED: store_pb2.BLOCK_EVENT_KIND_CLEARED,
}

Send = Callable[[store_pb2.EventsResponse], Awaitable[None]]


class EventCalls:
    """Handler of Events."""

    def __init__(self, events: BlockEvents, access: Access, quotas: Quotas, server_id: str) -> None:
        self._events = events
        self._access = access
        self._quotas = quotas
        self._server_id = server_id
        self._stopping = asyncio.Event()
        self._shares = Shares(STREAMS_MAX, "Events streams", retry_after_s=5.0)

    def stop(self) -> None:
        """End all streams with UNAVAILABLE."""
        self._stopping.set()

    async def events(self, request: store_pb2.EventsRequest, caller: Caller, send: Send) -> None:
        """See store.proto. Returns only by an error: the stream has no end of its own."""
        namespace_id = b""
        if request.namespace_id:
            namespace_id = checked_namespace_id(request.namespace_id)
        self._check(namespace_id, caller)
        with self._shares.taken(caller.sharer), self._quotas.stream(caller.principal):
            await self._follow(request, namespace_id, caller, send)

    async def _follow(
        self, request: store_pb2.EventsRequest, namespace_id: bytes, caller: Caller, send: Send
    ) -> None:
        after, lost = self._start(request)
        first = True
        while True:
            self._check(namespace_id, caller)
            batch = self._events.read(after, BATCH_EVENTS, namespace_id)
            after, lost = batch.last, lost + batch.lost
            shown = [
                _message(event)
                for event in batch.events
                if self._access.may(caller.principal, event.namespace_id, Rights.READ)
            ]
            if shown or lost or first:
                await self._send(
                    send,
                    store_pb2.EventsResponse(
                        server_id=self._server_id, next_sequence=after + 1, lost=lost, event=shown
                    ),
                )
                lost, first = 0, False
            if after >= self._events.last:
                await self._news(after)

    def _check(self, namespace_id: bytes, caller: Caller) -> None:
        """Raises PermissionDenied if the caller may not follow, or not any more."""
        self._access.require_admitted(caller.principal)
        if namespace_id:
            self._access.require(caller.principal, namespace_id, Rights.READ)

    def _start(self, request: store_pb2.EventsRequest) -> tuple[int, int]:
        """(sequence number to go on after, events that are lost already)."""
        last = self._events.last
        wanted = request.from_sequence
        if request.server_id and request.server_id != self._server_id:
            # What this consumer has seen was another run's: all that is known here is new to it.
            return last, max(1, last)
        if not wanted:
            return last, 0
        if wanted > last + 1:
            return last, wanted - last - 1
        return wanted - 1, 0

    async def _send(self, send: Send, answer: store_pb2.EventsResponse) -> None:
        try:
            await asyncio.wait_for(send(answer), SEND_S_MAX)
        except TimeoutError:
            raise DeadlineExceeded(
                f"no answer was taken within {SEND_S_MAX:.0f} s: read the stream",
                reason="stalled",
            ) from None

    async def _news(self, after: int) -> None:
        """Wait for an event after `after`, ASK_AGAIN_S at most."""
        loop = asyncio.get_running_loop()
        news = asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody to tell
                loop.call_soon_threadsafe(news.set)

        self._events.call_at_news(after, tell)
        waits = [asyncio.ensure_future(each.wait()) for each in (news, self._stopping)]
        try:
            await asyncio.wait(waits, timeout=ASK_AGAIN_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            self._events.forget_callback(tell)
        if self._stopping.is_set():
            raise Unavailable("the daemon is stopping: use another", reason="draining")


def _message(event: BlockEvent) -> store_pb2.BlockEvent:
    return store_pb2.BlockEvent(
        sequence=event.sequence,
        kind=_KINDS[event.kind],
        namespace_id=event.namespace_id,
        hash=event.hash,
        parent=event.parent,
        reason=miss_number(event.reason),
        unix_s=event.unix_s,
    )
