"""All hand-offs that come in at this decode node, and the Take stream of each.

Owns how many there may be, whose chunk gets room next, their counters, and the end of a stream: an
intake ends with its stream, with the attachment over which its bytes come, or at its deadline.
Those whose request is being received go first; of each kind all peers go by turns, and of each peer
all hand-offs, one chunk each. No peer has so much coming, or so many hand-offs, that another could
not have as much; peers that show the same credential from the same host count as one. Where a peer
stalls while others wait for room, what it has for chunks that do not come is taken back. Belongs to
the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator

from dualpath.agent.attachments import Attachment, Attachments
from dualpath.agent.handed_request import HandedRequests
from dualpath.agent.holdings import Holdings
from dualpath.agent.intake import Intake
from dualpath.agent.network import Network
from dualpath.agent.peer_room import PeerRoom, SharerRoom
from dualpath.agent.staging import SLAB_BYTES
from dualpath.agent.unread_call import UnreadCall
from dualpath.kvstore.service.shares import Shares
from dualpath.proto.first_message import first_message
from dualpath.proto.v1 import agent_pb2
from dualpath.transfer.errors import DualPathError, InvalidRequest

INTAKES_MAX = 1024
OFFER_CHUNKS_MAX = 4096
LOOKS = 4
"""How often in `stall_s` to look for what has stalled."""


class Intakes:
    """See the module docstring."""

    def __init__(
        self,
        attachments: Attachments,
        requests: HandedRequests,
        holdings: Holdings,
        compute: Network,
        events: Counter[str],
        deadline_s_max: float,
        stall_s: float,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.taken_bytes = 0
        self._attachments = attachments
        self._requests = requests
        self._holdings = holdings
        self._compute = compute
        self._events = events
        self._deadline_s_max = deadline_s_max
        self._stall_s = stall_s
        self._loop = loop
        self._running: dict[Intake, UnreadCall] = {}
        self._peers: dict[bytes, PeerRoom] = {}
        """By session."""
        self._sharers: dict[str, SharerRoom] = {}
        self._shares = Shares(INTAKES_MAX, "hand-offs that come in", retry_after_s=1.0)
        self._looking = False
        self._look: asyncio.TimerHandle | None = None
        holdings.on_room = self._room

    def __len__(self) -> int:
        return len(self._running)

    async def serve(
        self, requests: AsyncIterator[agent_pb2.TakeRequest]
    ) -> AsyncGenerator[agent_pb2.TakeResponse, None]:
        """Run one Take stream until its intake has ended. Raises InvalidRequest, Overloaded."""
        hello = await first_message(requests)
        if hello is None:
            return
        attachment = self._attachments.find(hello.session)
        if not self._holdings.capacity_bytes:
            yield agent_pb2.TakeResponse(
                done=True, reason="unsupported", detail="hold_bytes of the decode agent is 0"
            )
            return
        intake = self._begin(hello, attachment)
        call = self._running[intake]
        reader = asyncio.create_task(self._read(intake, requests))
        try:
            yield agent_pb2.TakeResponse(window=intake.window.to_bytes())
            while True:
                for response in intake.responses():
                    yield response
                    if response.done:
                        return
                await intake.wake.wait()
                intake.wake.clear()
        finally:
            intake.lost("the prefill side went away")
            call.ended()
            attachment.on_close.pop(intake, None)
            self._leave(hello.session)
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError, DualPathError):
                await reader

    def close(self) -> None:
        """End all."""
        if self._look is not None:
            self._look.cancel()
        for intake in tuple(self._running):
            intake.finish("aborted", "the decode agent stops")

    def _begin(self, hello: agent_pb2.TakeRequest, attachment: Attachment) -> Intake:
        self._shares.take(attachment.sharer)
        try:
            return self._begun(hello, attachment)
        except BaseException:
            self._shares.give_back(attachment.sharer)
            raise

    def _begun(self, hello: agent_pb2.TakeRequest, attachment: Attachment) -> Intake:
        hello.deadline_ms = min(hello.deadline_ms, round(self._deadline_s_max * 1000))
        sharer = self._sharers.get(attachment.sharer) or SharerRoom(attachment.sharer)
        peer = self._peers.get(hello.session) or PeerRoom(self._loop.time(), sharer)
        intake = Intake(
            hello,
            self._requests,
            self._holdings,
            self._compute,
            peer,
            self._stall_s,
            self._loop,
            self._ended,
        )
        self._running[intake] = UnreadCall(self._loop)
        peer.intakes += 1
        if peer.intakes == 1:
            sharer.peers += 1
        self._peers[hello.session] = peer
        self._sharers[sharer.sharer] = sharer
        self._share()
        self._look_later()
        attachment.on_close[intake] = lambda reason: intake.finish("peer_lost", reason)
        return intake

    def _leave(self, session: bytes) -> None:
        peer = self._peers[session]
        sharer = peer.sharer
        self._shares.give_back(sharer.sharer)
        peer.intakes -= 1
        if not peer.intakes:
            del self._peers[session]
            sharer.peers -= 1
            if not sharer.peers:
                del self._sharers[sharer.sharer]
            self._share()

    def _share(self) -> None:
        share = self._holdings.capacity_bytes // (1 + max(1, len(self._sharers)))
        for sharer in self._sharers.values():
            sharer.share_bytes = max(share, SLAB_BYTES)
        for peer in self._peers.values():
            peer.share_bytes = max(share // peer.sharer.peers, SLAB_BYTES)

    async def _read(self, intake: Intake, requests: AsyncIterator[agent_pb2.TakeRequest]) -> None:
        try:
            async for request in requests:
                if len(request.checksum) > OFFER_CHUNKS_MAX:
                    raise InvalidRequest(
                        f"an offer of {len(request.checksum)} chunks; {OFFER_CHUNKS_MAX} at most"
                    )
                if request.abort:
                    intake.finish("aborted", "the prefill engine gave it up")
                else:
                    intake.offer(request.checksum)
                    self._room()
            intake.lost("the prefill side ended its stream")
        except DualPathError as error:
            intake.finish(error.reason, str(error))

    def _ended(self, intake: Intake) -> None:
        call = self._running.pop(intake, None)
        if call is not None:
            call.ends()
        self.taken_bytes += intake.taken_bytes
        assert intake.over is not None
        if intake.over[0]:
            self._events[f"intake_{intake.over[0]}"] += 1

    def _room(self) -> None:
        if self._running and not self._looking:
            self._looking = True
            self._loop.call_soon(self._find_room)

    def _look_later(self) -> None:
        if self._look is None and self._running:
            self._look = self._loop.call_later(self._stall_s / LOOKS, self._look_for_stalls)

    def _look_for_stalls(self) -> None:
        self._look = None
        now = self._loop.time()
        for intake in tuple(self._running):
            intake.look_for_stalls(now)
        waiting = [intake for intake in self._running if intake.waits]
        for intake in tuple(self._running):
            if any(other is not intake for other in waiting[:2]):
                intake.take_back(now)
        if waiting:
            self._room()
        self._look_later()

    def _find_room(self) -> None:
        self._looking = False
        running = tuple(self._running)
        for claimed in (True, False):
            queues: dict[SharerRoom, deque[Intake]] = {}
            for each in running:
                if each.waits and each.claimed is claimed:
                    queues.setdefault(each.peer.sharer, deque()).append(each)
            turns = deque(queues.values())
            while turns:
                queue = turns.popleft()
                intake = queue.popleft()
                if intake.take_turn():
                    queue.append(intake)
                if queue:
                    turns.append(queue)
        for intake in running:
            intake.flush()
