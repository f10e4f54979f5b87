"""Agents of other nodes that are attached to us, and the Relay stream of each.

Owns the sessions: their secrets, their invitations to the compute network, their requester at
the relay and the messages that wait to be sent to them. A session lives from Attach until its
stream or its data connection ends, or until its invitation ran out without a stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import logging
import secrets
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field

from dualpath.agent.config import check_name
from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.daemon_rails import DaemonRails
from dualpath.agent.network import Network
from dualpath.agent.relay import Relay
from dualpath.agent.relay_job import FAILURE_OF_REASON, Requester, Source
from dualpath.agent.slice_table import GRANT_CHUNKS_MAX
from dualpath.agent.unread_call import UnreadCall
from dualpath.kvstore.service.shares import Shares
from dualpath.proto.first_message import first_message
from dualpath.proto.v1 import agent_pb2, common_pb2
from dualpath.transfer.errors import (
    DualPathError,
    InvalidRequest,
    Overloaded,
    PeerLost,
    PermissionDenied,
)
from dualpath.transfer.rails import RAILS_MAX
from dualpath.transfer.transport import INVITATION_TTL_S

ATTACHMENTS_MAX = 1024
UNPROVEN_S = 1.0
"""How long whoever attached may take to open its stream, before it makes way for others."""
RESPONSE_GRANTS_MAX = 256
"""Most progress entries of one message."""
RESPONSE_TAGS_MAX = 1 << 16
"""Most failed chunks of one message, so that it stays below what gRPC takes."""
UNREAD_MAX = 1 << 14
"""Most progress entries that wait to be read,"""
UNREAD_TAGS_MAX = 1 << 18
"""and most failed chunks in them: an agent that does not read ends, and they with it."""

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Attachment:
    """One attached agent."""

    session: bytes
    peer_id: str
    requester: Requester
    sharer: str
    """As whom it takes its share of all attachments."""
    attached_at: float
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    streaming: bool = False
    closed: str = ""
    """Why it ended, "" while it lives."""
    progress: deque[common_pb2.GrantProgress] = field(default_factory=deque)
    unread_tags: int = 0
    """Failed chunks in it."""
    announced: dict[str, tuple[str, int]] = field(default_factory=dict)
    """What it was told of our attachment at each daemon that it named: its name, how many links."""
    told_queue_bytes: int = -1
    expiry: asyncio.TimerHandle | None = None
    on_close: dict[object, Callable[[str], None]] = field(default_factory=dict)
    """Called with the reason when it ends."""


class Attachments:
    """See the module docstring. All methods belong to the loop."""

    def __init__(
        self,
        server_id: str,
        compute: Network,
        relay: Relay,
        daemons: Mapping[str, DaemonRails],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._server_id = server_id
        self._compute = compute
        self._relay = relay
        self._daemons = daemons
        self._loop = loop
        self._by_session: dict[bytes, Attachment] = {}
        self._shares = Shares(ATTACHMENTS_MAX, "attachments", retry_after_s=5.0)
        self._serial = itertools.count(1)

    def __len__(self) -> int:
        return len(self._by_session)

    def attach(self, request: common_pb2.AttachRequest, sharer: str) -> common_pb2.AttachResponse:
        """Invite an agent to the compute network, which counts as `sharer`'s. Raises
        InvalidRequest, Overloaded."""
        transport = self._compute.transport
        if transport.name not in request.transports:
            raise InvalidRequest(
                f"this agent speaks {transport.name!r}, the caller {list(request.transports)}"
            )
        check_name(request.name)
        if not transport.address:
            raise InvalidRequest("this agent does not relay: it has no data_listen")
        if request.rail >= RAILS_MAX:
            raise InvalidRequest(f"rail: a node has {RAILS_MAX} links at most, not {request.rail}")
        peer_id = f"{request.name}@{next(self._serial)}"
        self._take_share(sharer)
        try:
            requester = self._relay.open(request.name, peer_id, request.rail, sharer)
        except BaseException:
            self._shares.give_back(sharer)
            raise
        attachment = Attachment(
            secrets.token_bytes(16), peer_id, requester, sharer, self._loop.time()
        )
        attachment.requester.on_queue = lambda: self._tell_queue(attachment)
        attachment.requester.on_stall = lambda reason: self._close(attachment, reason)
        self._by_session[attachment.session] = attachment
        self._compute.watch(peer_id, lambda reason: self._close(attachment, reason))
        attachment.expiry = self._loop.call_later(
            INVITATION_TTL_S, self._close, attachment, "no stream was opened in time"
        )
        return common_pb2.AttachResponse(
            session=attachment.session,
            peer_id=peer_id,
            server_id=self._server_id,
            transport=transport.name,
            address=transport.address,
            invitation=transport.invite(peer_id),
        )

    def _take_share(self, sharer: str) -> None:
        """Room for one more; who attached and has opened no stream yet makes way for it, those of
        the same sharer first. Raises Overloaded."""
        try:
            self._shares.take(sharer)
        except Overloaded as error:
            held = [each for each in self._by_session.values() if each.sharer == sharer]
            late = self._loop.time() - UNPROVEN_S
            for each in held or (self._by_session.values() if error.reason != "quota" else ()):
                if not each.streaming and each.attached_at <= late:
                    self._close(each, "others attach, and it has opened no stream", keep_share=True)
                    break
            else:
                raise
            if not held:
                self._shares.give_back(each.sharer)
                self._shares.take(sharer)

    async def serve(
        self, requests: AsyncIterator[agent_pb2.RelayRequest]
    ) -> AsyncGenerator[agent_pb2.RelayResponse, None]:
        """Run one Relay stream until either side ends it."""
        first = await first_message(requests)
        if first is None:
            return
        attachment = self.find(first.session)
        if attachment.streaming:
            raise InvalidRequest("this attachment has a Relay stream already")
        attachment.streaming = True
        if attachment.expiry is not None:
            attachment.expiry.cancel()
        call = UnreadCall(self._loop)
        attachment.on_close[call] = lambda _: call.ends()
        reader = asyncio.create_task(self._read(attachment, first, requests))
        try:
            while not attachment.closed:
                await attachment.wake.wait()
                attachment.wake.clear()
                for response in self._responses(attachment):
                    yield response
                if reader.done():
                    break
            if reader.done():
                await reader  # raises what the peer did wrong
            elif attachment.closed:
                raise PeerLost(f"the attachment ended: {attachment.closed}")
        finally:
            self._close(attachment, "the stream ended")
            call.ended()
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError, DualPathError):
                await reader

    def daemon_changed(self, daemon: DaemonLink) -> None:
        """Our attachment at a daemon came or went: tell those who asked for it."""
        for attachment in tuple(self._by_session.values()):
            if daemon.address in attachment.announced:
                attachment.wake.set()

    def close(self) -> None:
        """End all attachments."""
        for attachment in tuple(self._by_session.values()):
            self._close(attachment, "this agent stops")

    def find(self, session: bytes) -> Attachment:
        """The attachment of a session. Raises PermissionDenied."""
        for known, attachment in self._by_session.items():
            if hmac.compare_digest(known, session):
                return attachment
        raise PermissionDenied("unknown session: attach first")

    async def _read(
        self,
        attachment: Attachment,
        first: agent_pb2.RelayRequest,
        requests: AsyncIterator[agent_pb2.RelayRequest],
    ) -> None:
        try:
            self._handle(attachment, first)
            async for request in requests:
                self._handle(attachment, request)
        finally:
            attachment.wake.set()

    def _handle(self, attachment: Attachment, request: agent_pb2.RelayRequest) -> None:
        rails = self._daemons.get(request.daemon)
        if request.daemon and request.daemon not in attachment.announced:
            if rails is None:
                raise InvalidRequest(
                    f"this agent does not read from daemon {request.daemon!r}; it knows "
                    f"{', '.join(self._daemons) or 'none'}"
                )
            attachment.announced[request.daemon] = ("?", 0)
            attachment.wake.set()
        if request.cancel_grant_id:
            self._relay.cancel(attachment.requester, request.cancel_grant_id)
        if not request.HasField("grant"):
            return
        if rails is None:
            raise InvalidRequest("a grant names the daemon to read from")
        if len(request.grant.tag) > GRANT_CHUNKS_MAX:
            # Not even refused chunk by chunk: the report would be as long.
            raise InvalidRequest(
                f"a grant of {len(request.grant.tag)} chunks; {GRANT_CHUNKS_MAX} at most"
            )
        try:
            daemon = rails.serving(attachment.requester.rail)
            if daemon is None:
                raise PeerLost("that link of this agent is not in use", reason="peer_lost")
            self._relay.submit(
                attachment.requester,
                Source(daemon, ticket=request.ticket),
                request.grant,
                lambda progress: self._add(attachment, progress),
                request.known if request.HasField("known") else None,
            )
        except DualPathError as error:
            failure = FAILURE_OF_REASON.get(error.reason, common_pb2.CHUNK_FAILURE_INVALID)
            refused = common_pb2.GrantProgress(
                grant_id=request.grant.grant_id,
                done=True,
                failed_tag=request.grant.tag,
                failure=[failure] * len(request.grant.tag),
                detail=str(error),
            )
            self._add(attachment, refused)

    def _add(self, attachment: Attachment, progress: common_pb2.GrantProgress) -> None:
        if attachment.closed:
            return
        attachment.progress.append(progress)
        attachment.unread_tags += len(progress.failed_tag)
        attachment.wake.set()
        if len(attachment.progress) > UNREAD_MAX or attachment.unread_tags > UNREAD_TAGS_MAX:
            self._close(attachment, "it does not read its reports")

    def _tell_queue(self, attachment: Attachment) -> None:
        queue_bytes = self._relay.others_read_bytes(attachment.requester)
        if queue_bytes != attachment.told_queue_bytes and attachment.streaming:
            self._add(attachment, common_pb2.GrantProgress(queue_bytes=queue_bytes))

    def _responses(self, attachment: Attachment) -> list[agent_pb2.RelayResponse]:
        responses = []
        for address, told in attachment.announced.items():
            rails = self._daemons[address]
            link = rails.serving(attachment.requester.rail)
            peer_id = link.peer_id if link is not None and link.up else ""
            if (peer_id, len(rails.links)) != told:
                attachment.announced[address] = (peer_id, len(rails.links))
                responses.append(
                    agent_pb2.RelayResponse(
                        daemon=address,
                        daemon_peer_id=peer_id,
                        holds=self._relay.holdings.capacity_bytes > 0,
                        rails=len(rails.links),
                    )
                )
        while attachment.progress:
            batch = [attachment.progress.popleft()]
            tags = len(batch[0].failed_tag)
            while attachment.progress and len(batch) < RESPONSE_GRANTS_MAX:
                tags += len(attachment.progress[0].failed_tag)
                if tags > RESPONSE_TAGS_MAX:
                    break
                batch.append(attachment.progress.popleft())
            attachment.unread_tags -= sum(len(each.failed_tag) for each in batch)
            attachment.told_queue_bytes = batch[-1].queue_bytes
            responses.append(agent_pb2.RelayResponse(progress=batch))
        return responses

    def _close(self, attachment: Attachment, reason: str, *, keep_share: bool = False) -> None:
        if attachment.closed:
            return
        attachment.closed = reason
        attachment.progress.clear()
        attachment.wake.set()
        if attachment.expiry is not None:
            attachment.expiry.cancel()
        self._by_session.pop(attachment.session, None)
        if not keep_share:
            self._shares.give_back(attachment.sharer)
        self._relay.close(attachment.requester)
        for on_close in tuple(attachment.on_close.values()):
            try:
                on_close(reason)
            except Exception:  # the others must still end
                log.exception("agent %s: what it used could not be ended", attachment.peer_id)
        self._compute.forget(attachment.peer_id)
        log.info("agent %s left: %s", attachment.peer_id, reason)
