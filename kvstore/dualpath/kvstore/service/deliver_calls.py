"""The calls that take blocks out over the data plane: attach, and the Deliver stream.

Owns the meeting of one stream with the delivery engine: grants and cancels in, progress out. A
look-up may come with its first grant, which spares a load a round trip before its first byte. A
grant that is wrong in itself fails alone, with its reason; a broken stream (unknown session, an
id used twice, reports left unread) ends. An attachment has one stream: a new one replaces it.
When a stream ends, what it granted is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, TypeAlias

from dualpath.kvstore.service.attachments import Attachment, Attachments, check_alive
from dualpath.kvstore.service.auth import Caller
from dualpath.kvstore.service.deliver import DeliveryEngine
from dualpath.kvstore.service.delivery_queue import GRANT_CHUNKS_MAX, ChunkFailure, GrantedChunks
from dualpath.kvstore.service.gate import Gate
from dualpath.kvstore.service.lease_owners import LeaseOwners
from dualpath.kvstore.service.messages import checked_session, grant_of, progress_message
from dualpath.kvstore.service.ticket import TicketMint
from dualpath.proto.first_message import first_message
from dualpath.proto.status import Context
from dualpath.proto.v1 import common_pb2, store_pb2
from dualpath.transfer.errors import (
    DualPathError,
    InvalidRequest,
    LeaseExpired,
    Overloaded,
    PermissionDenied,
    Unavailable,
)

CANCELS_MAX = 4096
FOUND_MAX = 64
"""Most answers to look-ups of one stream that wait to be read."""
FOUND_BYTES_MAX = 8 << 20
"""So many bytes of them wait, and no further look-up is taken: one answer may have 3 MB."""
FOUND_S_MAX = 30.0
"""Longest that a look-up waits for that."""
LookUp: TypeAlias = Callable[[store_pb2.LookupRequest, str, str], store_pb2.LookupResponse]
"""Of a request, an owner and a principal."""
DONE_PAUSE_S = 0.005
"""Grants that are done are reported together: their receiver knows of the chunks already."""
# What refuses a grant alone, most specific first. While the daemon stops, another path serves.
_REFUSALS: tuple[tuple[type[DualPathError], ChunkFailure], ...] = (
    (PermissionDenied, ChunkFailure.DENIED),
    (LeaseExpired, ChunkFailure.LEASE_EXPIRED),
    (InvalidRequest, ChunkFailure.INVALID),
    (Overloaded, ChunkFailure.OVERLOADED),
    (Unavailable, ChunkFailure.OVERLOADED),
)


class DeliverCalls:
    """Handlers of Attach and Deliver."""

    def __init__(
        self,
        *,
        attachments: Attachments,
        engine: DeliveryEngine,
        owners: LeaseOwners,
        mint: TicketMint,
        gate: Gate,
        look_up: LookUp,
        server_id: str,
        clock: Callable[[], float],
    ) -> None:
        self._attachments = attachments
        self._engine = engine
        self._owners = owners
        self._mint = mint
        self._gate = gate
        self._look_up = look_up
        self._server_id = server_id
        self._clock = clock
        self._streams: dict[str, _Stream] = {}
        self._stopping = False

    def attach(
        self, request: common_pb2.AttachRequest, caller: Caller
    ) -> common_pb2.AttachResponse:
        """See common.proto."""
        if self._stopping:
            raise Unavailable("the daemon is stopping: use another", reason="draining")
        self._gate.admit_attach(caller.principal)
        attachment, session, invitation = self._attachments.attach(
            request.name, request.transports, caller, now=self._clock(), rail=request.rail
        )
        transport = attachment.plane.transport.name
        return common_pb2.AttachResponse(
            session=session,
            peer_id=attachment.peer_id,
            server_id=self._server_id,
            transport=transport,
            address=attachment.plane.address,
            invitation=invitation,
            looks_up=True,
            rails=[
                common_pb2.Rail(address=address, control=control)
                for address, control in self._attachments.rails(transport)
            ],
        )

    async def deliver(
        self, requests: AsyncIterator[store_pb2.DeliverRequest], caller: Caller, context: Context
    ) -> AsyncIterator[store_pb2.DeliverResponse]:
        """See store.proto."""
        first = await first_message(requests)
        if first is None:
            return
        attachment = self._attachments.of_session(checked_session(first.session), caller)
        if attachment.peer_id in self._streams:
            # The client lost the old one, though this side may not know yet.
            self._streams[attachment.peer_id].replace()
        stream = _Stream(self, attachment)
        # Also run when the call is cancelled while this generator is not being awaited. The
        # stubs ask for a class of theirs where gRPC takes any callable.
        ended: Any = lambda _: stream.end()  # noqa: E731
        context.add_done_callback(ended)
        self._streams[attachment.peer_id] = stream
        try:
            yield store_pb2.DeliverResponse(peer_id=attachment.peer_id)
            stream.take(first)
            stream.reader = asyncio.ensure_future(stream.read(requests))
            stream.reader.add_done_callback(lambda _: stream.wake.set())
            async for response in stream.responses():
                yield response
        finally:
            stream.end()

    async def stop(self) -> None:
        """End all streams with UNAVAILABLE."""
        self._stopping = True
        for stream in list(self._streams.values()):
            stream.stop()

    def forget(self, peer: str) -> None:
        """The stream of `peer` ended."""
        self._streams.pop(peer, None)

    def take(
        self, peer: str, principal: str, request: store_pb2.DeliverRequest
    ) -> store_pb2.Found | None:
        """Act on one message of `peer`; the answer to its look-up, if it has one. Raises what
        ends its stream."""
        if len(request.cancel_grant_id) > CANCELS_MAX:
            raise InvalidRequest(
                f"cancel_grant_id: {len(request.cancel_grant_id)}; {CANCELS_MAX} at most"
            )
        for grant_id in request.cancel_grant_id:
            self._engine.cancel(peer, grant_id)
        if not request.HasField("grant"):
            if request.HasField("lookup"):
                raise InvalidRequest("lookup: it needs a grant on this stream; or call Lookup")
            return None
        message = request.grant
        if len(message.tag) > GRANT_CHUNKS_MAX:
            # Not even refused chunk by chunk: the report would be as long.
            raise InvalidRequest(
                f"grant {message.grant_id}: {len(message.tag)} chunks; {GRANT_CHUNKS_MAX} at most"
            )
        if not request.HasField("lookup"):
            self._deliver(peer, principal, request)
            return None
        try:
            hit = self._look_up(request.lookup, peer, principal)
        except DualPathError:
            return store_pb2.Found(grant_id=message.grant_id)
        if hit.lease_id:
            self._deliver(peer, principal, request, hit)
        return store_pb2.Found(grant_id=message.grant_id, hit=hit)

    def _deliver(
        self,
        peer: str,
        principal: str,
        request: store_pb2.DeliverRequest,
        hit: store_pb2.LookupResponse | None = None,
    ) -> None:
        """Queue a message's grant, or report why not; of what was `hit` just now if given."""
        message = request.grant
        try:
            if hit is None:
                lease_id = self.lease_of(peer, request.lease_id, request.ticket)
            else:
                lease_id = hit.lease_id
            grant = grant_of(message, lease_id, now=self._clock())
            if hit is not None and grant.granted is not None:
                found = _of_blocks_below(grant.granted, hit.blocks)
                if found is None:
                    return
                grant = replace(grant, granted=found)
            self._gate.quotas.check(
                principal,
                "queue_bytes",
                self._engine.principal_pending_bytes(principal),
                grant.nbytes,
                "bytes to be delivered",
            )
            self._engine.submit(peer, grant)
        except DualPathError as error:
            failure = _refusal_of(error)
            if failure is None:
                raise
            self._engine.refuse(peer, message.grant_id, list(message.tag), failure, str(error))

    def lease_of(self, peer: str, lease_id: int, ticket: bytes) -> int:
        """The lease under which `peer` may read: its own, or one that was delegated to it.
        Raises PermissionDenied, LeaseExpired."""
        if ticket:
            delegated = self._mint.lease_of(ticket, peer, now=self._clock())
            if lease_id not in (0, delegated):
                raise PermissionDenied(
                    f"the ticket is for lease {delegated}, not {lease_id}",
                    reason="ticket_foreign",
                )
            self._owners.check_delegated(delegated)
            return delegated
        self._owners.check(lease_id, peer)
        return lease_id

    @property
    def engine(self) -> DeliveryEngine:
        """The engine behind the streams."""
        return self._engine


def _refusal_of(error: DualPathError) -> ChunkFailure | None:
    for kind, failure in _REFUSALS:
        if isinstance(error, kind):
            return failure
    return None


def _of_blocks_below(granted: GrantedChunks, limit: int) -> GrantedChunks | None:
    """The chunks of blocks [0, limit); None if there are none."""
    if max(granted.blocks) < limit:
        return granted
    kept = [index for index, block in enumerate(granted.blocks) if block < limit]
    if not kept:
        return None
    blocks, chunks, tags = (
        [each[index] for index in kept] for each in (granted.blocks, granted.chunks, granted.tags)
    )
    return GrantedChunks(blocks, chunks, tags, granted.targets.chosen(kept))


class _Stream:
    """One Deliver stream: lives in the event loop, woken by the engine's threads."""

    def __init__(self, calls: DeliverCalls, attachment: Attachment) -> None:
        self._calls = calls
        self._attachment = attachment
        self._ended = False
        self.wake = asyncio.Event()
        self._telling = False
        self._found: deque[tuple[store_pb2.Found, int]] = deque()  # and its bytes
        self._found_bytes = 0
        self._room = asyncio.Event()
        self._stopped: Unavailable | None = None
        self.reader: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        calls.engine.open(
            attachment.peer_id,
            attachment.plane.transport,
            self._news,
            name=attachment.name,
            principal=attachment.principal,
        )
        attachment.on_lost = self.wake.set

    def take(self, request: store_pb2.DeliverRequest) -> None:
        """Act on one message."""
        if request.HasField("lookup") and len(self._found) >= FOUND_MAX:
            raise Overloaded(
                f"{FOUND_MAX} answers to look-ups wait: read the stream", retry_after_s=1.0
            )
        found = self._calls.take(self._attachment.peer_id, self._attachment.principal, request)
        if found is not None:
            nbytes = found.ByteSize()  # encodes it, so not twice
            self._found.append((found, nbytes))
            self._found_bytes += nbytes
            self.wake.set()

    async def read(self, requests: AsyncIterator[store_pb2.DeliverRequest]) -> None:
        """Act on all messages to come; returns at the client's half-close."""
        try:
            async for request in requests:
                if self._ended or self._attachment.lost:
                    return
                if request.HasField("lookup"):
                    await self._room_for_found()
                self.take(request)
        except DualPathError:
            # Nobody may be reading, and then the stream's end waits: its answers need not.
            self._drop_found()
            raise

    async def responses(self) -> AsyncIterator[store_pb2.DeliverResponse]:
        """Yield progress until everything granted is done and the client has half-closed."""
        engine, peer = self._calls.engine, self._attachment.peer_id
        while True:
            await self.wake.wait()
            self.wake.clear()
            while not self._ended:
                if self._found:
                    found, nbytes = self._found.popleft()
                    self._found_bytes -= nbytes
                    self._room.set()
                    yield store_pb2.DeliverResponse(found=found)
                    continue
                if not (taken := engine.reports(peer)):
                    break
                queue_bytes = engine.pending_bytes
                yield store_pb2.DeliverResponse(
                    progress=[progress_message(each, queue_bytes) for each in taken]
                )
            if self._stopped is not None:
                raise self._stopped
            check_alive(self._attachment)
            if self.reader is not None and self.reader.done():
                self.reader.result()  # raises what ended the stream
                if engine.open_grants(peer) == 0:
                    return

    def _news(self, failed: bool) -> None:
        """The engine has reports. From any thread."""
        if failed:
            call = self.wake.set
        elif self._telling:
            return
        else:
            self._telling = True
            call = self._tell_soon
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody to tell
            self._loop.call_soon_threadsafe(call)

    def _tell_soon(self) -> None:
        self._loop.call_later(DONE_PAUSE_S, self._tell)

    def _tell(self) -> None:
        self._telling = False  # first: what comes from now on is told again
        self.wake.set()

    def stop(self) -> None:
        """The daemon stops: end the stream once what is known was reported."""
        self._stopped = Unavailable("the daemon is stopping: use another", reason="draining")
        self.wake.set()

    def replace(self) -> None:
        """End the stream at once: the engine's reports are the new stream's from now on."""
        self.end()
        self._stopped = Unavailable("replaced by a new Deliver stream", reason="replaced")
        self.wake.set()

    def end(self) -> None:
        """Drop what is queued. Idempotent."""
        if self._ended:
            return
        self._ended = True
        self._drop_found()
        if self.reader is not None:
            self.reader.cancel()
        self._attachment.on_lost = None
        self._calls.engine.close_peer(self._attachment.peer_id)
        self._calls.forget(self._attachment.peer_id)

    async def _room_for_found(self) -> None:
        """Wait until the client has read answers, if many bytes of them wait. Raises Overloaded."""
        if self._found_bytes < FOUND_BYTES_MAX:
            return
        try:
            async with asyncio.timeout(FOUND_S_MAX):
                while self._found_bytes >= FOUND_BYTES_MAX:
                    self._room.clear()
                    await self._room.wait()
        except TimeoutError:
            raise Overloaded(
                f"{self._found_bytes} bytes of answers to look-ups wait: read the stream",
                retry_after_s=1.0,
            ) from None

    def _drop_found(self) -> None:
        self._found.clear()
        self._found_bytes = 0
