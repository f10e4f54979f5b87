"""One hand-off as it goes out from the prefill node.

Owns its stream to the decode agent, what is offered there, and the writes that are asked for in
answer. Chunks are hashed and offered as soon as the engine has said that their layers are final;
offers, answers and writes overlap, and a message is about several MiB. Guarantees one result, in
time, and that the engine's memory is not read any more once there is one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import grpc
import grpc.aio
from dualpath.agent.hand_off_spec import HandOffResult, HandOffSpec, LayerGate
from dualpath.agent.mailbox import Mailbox
from dualpath.agent.regions import EngineRegion
from dualpath.agent.relay_link import RelayLink
from dualpath.kvstore.checksum import of_slices
from dualpath.kvstore.layout import KVLayout
from dualpath.proto.status import translated
from dualpath.proto.v1 import agent_pb2
from dualpath.transfer.errors import DualPathError, InvalidRequest, Overloaded, PeerLost
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import RegionDescriptor
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import Completion, Transport, Write, WriteStatus

OFFER_BYTES = 16 << 20
"""About how much is hashed and offered at once,"""
OFFER_CHUNKS_MAX = 1024
WRITING_BYTES_MAX = 32 << 20
"""Most bytes of one hand-off that wait for their acknowledgement."""
AGAIN_S = 0.01
"""Pause after the transport's queue was full of others' writes."""
LAST_WORD_S_MAX = 1.0
"""How long to wait for how far it came, before the deadline or after an abort."""
LAST_WORD_SHARE = 0.25
"""At most of the time that a hand-off has."""

DETAIL_CHARS_MAX = 2000
REASONS = frozenset(
    (
        *("", "aborted", "corrupt", "deadline", "duplicate_request", "expired"),
        *("invalid", "no_room", "overloaded", "peer_lost", "quota", "unsupported"),
    )
)
"""How a hand-off can end; what a peer says beyond them is `peer_lost`."""
_OURS = frozenset(("aborted", "peer_lost"))
"""What the other side sees of our own end."""


class HandOff:
    """See the module docstring. Belongs to the loop."""

    def __init__(
        self,
        spec: HandOffSpec,
        layout: KVLayout,
        entry: EngineRegion,
        relay: RelayLink,
        gate: LayerGate,
        stall_s: float,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.spec = spec
        self.sent_bytes = 0
        self._layout = layout
        self.entry = entry
        self._relay = relay
        self._gate = gate
        self._stall_s = stall_s
        self._loop = loop
        self._blocks = len(spec.hashes)
        self._chunks = self._blocks * layout.chunk_count
        self._extents = [layout.chunk_extent(chunk) for chunk in range(layout.chunk_count)]
        self._deadline_at = loop.time() + spec.deadline_s
        self._last_word_s = min(LAST_WORD_S_MAX, LAST_WORD_SHARE * spec.deadline_s)
        self._over: tuple[str, str] | None = None
        self._ended = asyncio.Event()
        self._offered = 0
        self._hashing: asyncio.Future[list[int]] | None = None
        self._answer = agent_pb2.TakeResponse()
        self._window: RegionDescriptor | None = None
        self._transport: Transport | None = None
        self._peer = ""
        self._waiting: deque[tuple[int, int]] = deque()
        """Tag and place of writes that are asked for."""
        self._writing_bytes = 0
        self._written: Mailbox[Completion] = Mailbox(loop, self._on_written)
        self._idle = asyncio.Event()
        self._idle.set()
        self._again: asyncio.TimerHandle | None = None

    def finish(self, reason: str, detail: str) -> None:
        """End it now, unless it has ended: nothing more is offered or written."""
        if self._over is None:
            self._over = (reason, detail)
            self._waiting.clear()
            self._ended.set()

    async def run(self) -> HandOffResult:
        """Carry it out. Raises nothing; if it is cancelled, no write begins any more."""
        started_at = self._loop.time()
        timer = self._loop.call_at(
            self._deadline_at - self._last_word_s, self.finish, "deadline", "the deadline passed"
        )
        self._gate.on_abort = self._on_abort
        if self._gate.aborted:
            self._on_abort()
        session = asyncio.create_task(self._session(), name=f"hand-off {self.spec.request}")
        ended = asyncio.create_task(self._ended.wait(), name="end of a hand-off")
        try:
            await asyncio.wait((session, ended), return_when=asyncio.FIRST_COMPLETED)
            self.finish("peer_lost", f"decode peer {self._relay.name}: {self._relay.link.reason}")
            # Time for the last word: how far it came, if the other side still answers.
            await asyncio.wait((session,), timeout=self._last_word_s)
        finally:
            self.finish("aborted", "the agent stops")
            session.cancel()
            ended.cancel()
            timer.cancel()
            if self._again is not None:
                self._again.cancel()
        if self._hashing is not None:
            await asyncio.wait((self._hashing,))  # it ends with the chunk that it reads
        await self._acknowledged()
        assert self._over is not None
        reason, detail = self._over
        return HandOffResult(
            blocks=self._answer.blocks,
            sent_bytes=self.sent_bytes,
            held_bytes=self._answer.held_bytes,
            reason=reason,
            detail=detail,
            elapsed_s=self._loop.time() - started_at,
        )

    async def _acknowledged(self) -> None:
        """Wait until no write reads the memory: each is acknowledged, refused or expired. A peer
        that takes and acknowledges nothing for a while is left."""
        before = (0, 0)
        while self._writing_bytes:
            try:
                async with asyncio.timeout(self._stall_s):
                    await self._idle.wait()
            except TimeoutError:
                now = (self._writing_bytes, self._moved_bytes())
                if now == before:
                    self._relay.link.lose("it acknowledges no write of a hand-off")
                before = now

    def _moved_bytes(self) -> int:
        """What went to the peer so far, of all writes."""
        assert self._transport is not None
        return sum(each.sent_bytes for each in self._transport.traffic() if each.peer == self._peer)

    def _on_abort(self) -> None:
        self.finish("aborted", "its engine gave it up")

    # The stream.

    async def _session(self) -> None:
        try:
            if not await self._relay.link.tried(self.spec.deadline_s):
                raise PeerLost(f"decode peer {self._relay.name}: {self._relay.link.reason}")
            if not self._relay.holds:
                self.finish("unsupported", f"agent {self._relay.name} takes no hand-offs")
                return
            attached, network = self._relay.link.attached, self._relay.link.network
            assert attached is not None
            assert network is not None
            self._peer, self._transport = self._relay.link.peer, network.transport
            call = self._relay.take()
            try:
                with translated(f"hand-off to {self._relay.name}"):
                    await self._talk(call, attached.session)
            finally:
                call.cancel()
        except DualPathError as error:
            self.finish(_reason_of(error), str(error))

    async def _talk(self, call: Any, session: bytes) -> None:
        spec = self.spec
        await call.write(
            agent_pb2.TakeRequest(
                session=session,
                request=spec.request,
                namespace_id=spec.namespace_id,
                hash=spec.hashes,
                chunk_bytes=[nbytes for _, nbytes in self._extents],
                deadline_ms=max(1, round((self._deadline_at - self._loop.time()) * 1000)),
            )
        )
        offers: asyncio.Task[None] | None = None
        try:
            while True:
                answer = await call.read()
                if answer is grpc.aio.EOF:
                    raise PeerLost(f"decode peer {self._relay.name} ended the stream")
                if answer.window:
                    self._window = RegionDescriptor.from_bytes(answer.window)
                    offers = offers or asyncio.create_task(self._offer(call))
                self._ask(answer)
                if answer.done:
                    self._on_last_word(answer)
                    return
        finally:
            if offers is not None:
                offers.cancel()
                await asyncio.gather(offers, return_exceptions=True)

    def _on_last_word(self, answer: agent_pb2.TakeResponse) -> None:
        """How it ended there. Raises InvalidRequest if that cannot be."""
        short = answer.blocks < self._blocks and not answer.reason
        if short or answer.blocks > self._blocks:
            raise InvalidRequest(
                f"{answer.blocks} blocks of {self._blocks} with reason {answer.reason[:80]!r}"
            )
        reason = answer.reason if answer.reason in REASONS else "peer_lost"
        self._answer = answer
        if self._over is not None and self._over[0] == "deadline" and reason not in _OURS:
            self._over = (reason, answer.detail[:DETAIL_CHARS_MAX])  # it knows better why
        self.finish(reason, answer.detail[:DETAIL_CHARS_MAX])

    async def _offer(self, call: Any) -> None:
        """Hash and offer what is final, in order; say at last if it was given up."""
        try:
            while self._offered < self._chunks and self._over is None:
                layers = self._gate.layers
                until = self._final_chunks(layers)
                if self._offered < until:
                    await self._offer_some(call, until)
                elif self._gate.closed:
                    self.finish("aborted", f"ended when {layers} layers were done")
                else:
                    await self._gate.more(layers)
            await self._ended.wait()
            assert self._over is not None
            if self._over[0] == "aborted":
                await call.write(agent_pb2.TakeRequest(abort=True))
            else:
                await call.done_writing()
        except DualPathError as error:
            self.finish(_reason_of(error), str(error))
        except grpc.RpcError:
            pass  # whoever reads the stream says why

    async def _offer_some(self, call: Any, until: int) -> None:
        nbytes, last = 0, self._offered
        while last < min(until, self._offered + OFFER_CHUNKS_MAX) and nbytes < OFFER_BYTES:
            nbytes += self._extents[last // self._blocks][1]
            last += 1
        numbers = range(self._offered, last)
        self._hashing = self._loop.run_in_executor(None, self._hashes_of, numbers)
        checksums = await asyncio.shield(self._hashing)
        if self._over is not None:
            return
        self._offered = last
        await call.write(agent_pb2.TakeRequest(checksum=checksums))

    def _final_chunks(self, layers: int) -> int:
        """How many leading chunks of the hand-off have only bytes of the first `layers` layers."""
        reach = layers * self._layout.layer_bytes
        final = sum(offset + nbytes <= reach for offset, nbytes in self._extents)
        return final * self._blocks

    def _hashes_of(self, numbers: range) -> list[int]:
        """Checksums of chunks; fewer once it is over, since the memory is the engine's again."""
        view = self.entry.region.view
        checksums: list[int] = []
        for number in numbers:
            if self._over is not None:
                break
            checksums.append(of_slices(view, self._source(number)))
        return checksums

    def _source(self, number: int) -> Slices:
        """Where a chunk lies in the engine's memory."""
        chunk, block = divmod(number, self._blocks)
        whole = self.spec.places.block(self._layout, block)
        return whole.part(*self._extents[chunk])

    # Writes.

    def _ask(self, answer: agent_pb2.TakeResponse) -> None:
        """The decode side lacks these chunks. Raises InvalidRequest."""
        if len(answer.tag) != len(answer.offset):
            raise InvalidRequest(f"{len(answer.tag)} tags with {len(answer.offset)} places")
        for tag, offset in zip(answer.tag, answer.offset, strict=True):
            if tag % self._chunks >= self._offered:
                raise InvalidRequest(f"tag {tag} asks for a chunk that was not offered")
            self._waiting.append((tag, offset))
        if len(self._waiting) > self._chunks:
            raise InvalidRequest(f"{len(self._waiting)} chunks are asked for, of {self._chunks}")
        self._write()

    def _write(self) -> None:
        self._again = None
        while self._waiting and self._over is None and self._writing_bytes < WRITING_BYTES_MAX:
            tag, offset = self._waiting[0]
            assert self._transport is not None
            assert self._window is not None
            source = self._source(tag % self._chunks)
            write = Write(
                self.entry.region,
                source,
                self._window,
                Slices.contiguous(offset, source.nbytes),
                Lane.LOAD_DECODE,
                tag,
                max(0.001, self._deadline_at - self._loop.time()),
            )
            try:
                self._transport.write(self._peer, write, self._written.put)
            except Overloaded:  # others fill the queue; some of it is always under way
                self._again = self._loop.call_later(AGAIN_S, self._write)
                return
            except DualPathError as error:
                self.finish(_reason_of(error), str(error))
                return
            self._waiting.popleft()
            self._writing_bytes += source.nbytes
            self._idle.clear()

    def _on_written(self, completions: list[Completion]) -> None:
        for completion in completions:
            nbytes = self._extents[completion.tag % self._chunks // self._blocks][1]
            self._writing_bytes -= nbytes
            if completion.status is WriteStatus.DONE:
                self.sent_bytes += nbytes
            elif completion.status is WriteStatus.EXPIRED:
                self.finish("deadline", "a write did not end in time")
            elif completion.status is not WriteStatus.REFUSED:
                # What is refused, the other side asks for once more, or has ended.
                self.finish("peer_lost", completion.detail)
        if not self._writing_bytes:
            self._idle.set()
        if self._again is None:
            self._write()


def _reason_of(error: DualPathError) -> str:
    """The word for the end of a hand-off. What says nothing more exact means that it is lost."""
    if isinstance(error, InvalidRequest | Overloaded) and error.reason in REASONS:
        return error.reason
    return "deadline" if error.reason == "deadline" else "peer_lost"
