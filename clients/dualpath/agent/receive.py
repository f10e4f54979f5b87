"""One receive: chunks of a request go from this node's holdings into its decode engine's memory.

Owns the window on that memory, what waits to be copied, and the end. To its engine it is a load:
layers, a verified prefix, a result with a reason. Each chunk is hashed where it has landed and
compared with what the prefill side offered; only then it counts, and the request's pin on it goes.
Memory behind a compute link is written through that link, by way of this agent's connection to
itself. Guarantees that nothing is written into the memory after the end. Belongs to the loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from dualpath.agent.active_load import ActiveLoad
from dualpath.agent.handed_request import ChunkPlace, HandedRequest, HandedRequests
from dualpath.agent.holdings import ChunkName, HeldChunk, Holdings
from dualpath.agent.load_window import ArmedChunks, LoadWindow
from dualpath.agent.mailbox import Mailbox
from dualpath.agent.network import Network
from dualpath.agent.outcome import LoadStarted, MissReason
from dualpath.transfer.errors import DualPathError
from dualpath.transfer.lane import Lane
from dualpath.transfer.transport import Completion, Write, WriteStatus

RETAINED = "retained"
"""Source of what this node held before it was offered,"""
HANDED_OFF = "handed_off"
"""and of what came from the prefill node."""
GRACE_S = 0.5
"""How long a hand-off that failed before the receive began may be followed by another."""
ATTEMPTS_MAX = 3
"""How often a chunk may be copied whose bytes did not come right."""
COPY_BYTES_MAX = 16 << 20
"""Most bytes on their way into the engine's memory."""

_MISSES = {
    "peer_lost": MissReason.PEER_LOST,
    "deadline": MissReason.DEADLINE,
    "corrupt": MissReason.CORRUPT,
    "no_room": MissReason.OVERLOADED,
    "overloaded": MissReason.OVERLOADED,
    "absent": MissReason.ABSENT,
}
"""The rest is UNAVAILABLE."""


class Receive:
    """See the module docstring. `load` is what the engine sees; its result comes at the end."""

    def __init__(
        self,
        load: ActiveLoad,
        record: HandedRequest,
        requests: HandedRequests,
        holdings: Holdings,
        compute: Network,
        self_peer: str,
        loop: asyncio.AbstractEventLoop,
        on_end: Callable[[Receive], None],
    ) -> None:
        """Begin. `self_peer` is this agent's name in its own compute network, "" if the memory can
        be written without it."""
        self.load = load
        self._record = record
        self._requests = requests
        self._holdings = holdings
        self._transport = compute.transport
        self._self_peer = self_peer
        self._loop = loop
        self._on_end = on_end
        spec, blocks = load.spec, len(load.spec.hashes)
        chunks = load.layout.chunk_count
        self._index: dict[ChunkPlace, int] = {
            (spec.namespace_id, spec.hashes[block], chunk): chunk * blocks + block
            for chunk in range(chunks)
            for block in range(blocks)
        }
        self._places = {index: place for place, index in self._index.items()}
        load.begin(LoadStarted(blocks, MissReason.NONE), 0, np.zeros(blocks * chunks, np.uint64))
        self._waiting: deque[int] = deque()
        self._moving: dict[int, tuple[HeldChunk, bool]] = {}
        """By index: on its way; whether it was held before it was offered."""
        self._moving_bytes = 0
        self._attempts: Counter[int] = Counter()
        """Copies that did not come right, by index."""
        self._again: set[int] = set()
        """To be copied once more, when the last copy has ended."""
        self._missing = ""
        """Why something will not come, while the rest still does."""
        self._known: dict[int, ChunkName] = {}
        """What was declared final, by index."""
        self._arrivals: Mailbox[LoadWindow] = Mailbox(loop, self._on_arrivals)
        self._sent: Mailbox[tuple[HeldChunk, int, Completion]] = Mailbox(loop, self._on_sent)
        requests.begin_receive(record, self)
        try:
            self._window = LoadWindow(
                spec.load_id, HANDED_OFF, compute, load.entry.region, load.span, self._arrivals
            )
        except DualPathError as error:
            requests.end_receive(record, error.reason, str(error))
            raise
        load.windows[HANDED_OFF] = self._window
        load.entry.on_gone[self] = lambda: self.finish("aborted", "its memory was taken back")
        self._timer = loop.call_at(load.deadline_at, self.finish, "deadline", "the deadline passed")
        self._stale = record.outcome if record.outcome is not None and record.outcome[0] else None
        """How the last hand-off failed before; to be looked at when the grace is over."""
        self._grace = self._loop.call_later(GRACE_S, self._on_grace)
        for place in tuple(record.final):
            self.on_final(place)
        self.on_outcome()

    def finish(self, reason: str, detail: str) -> None:
        """End it now, with the longest verified prefix; fenced when this returns."""
        if self.load.result is None:
            self._window.close()
            self._arrivals.drain()  # what had landed before the fence; it may complete the receive
            self._end(reason, detail)

    def _end(self, reason: str, detail: str) -> None:
        load = self.load
        if load.result is not None:
            return
        self._timer.cancel()
        self._grace.cancel()
        load.entry.on_gone.pop(self, None)
        self._waiting.clear()
        if not load.progress.complete:
            load.miss, load.detail = _MISSES.get(reason, MissReason.UNAVAILABLE), detail
            load.events[reason] += 1
        self._requests.end_receive(self._record, "" if load.progress.complete else reason, detail)
        load.finish(self._loop.time(), {})
        self._on_end(self)

    def copied(self) -> list[tuple[int, int]]:
        """(block, chunk of the block) of what is in place and verified."""
        places = (self._index.get(place) for place in self._record.copied)
        return [self.load.progress.chunk_ref(index) for index in places if index is not None]

    # News of the request.

    def on_final(self, place: ChunkPlace) -> None:
        """A chunk is held and final."""
        index = self._index.get(place)
        if index is None or self.load.result is not None:
            return
        name = self._record.final[place][0].name
        known = self._known.setdefault(index, name)
        if known is name:
            self._waiting.append(index)
            self._move()
        elif known != name:
            self.finish("corrupt", f"chunk {place[2]} of {place[1].hex()} was other bytes before")

    def on_outcome(self) -> None:
        """The hand-off has ended, or one that ended before is looked at."""
        outcome = self._record.outcome
        if outcome is None or self._record.intake is not None or self.load.result is not None:
            return
        if self._waiting or self._moving:
            return  # again when they have landed
        if outcome is self._stale:
            return  # again when the grace is over
        reason, detail = outcome
        if self._missing:
            reason, detail = "corrupt", self._missing
        self.finish(reason or "absent", detail or "not all of these blocks were handed off")

    def _on_grace(self) -> None:
        self._stale = None
        self.on_outcome()

    # Copies.

    def _move(self) -> None:
        """Arm and copy what waits, as much as may be on its way."""
        load = self.load
        batch: list[int] = []
        while self._waiting and (not self._moving_bytes or self._moving_bytes < COPY_BYTES_MAX):
            index = self._waiting.popleft()
            chunk, had = self._record.final[self._places[index]]
            nbytes = load.progress.chunk_nbytes[index]
            if chunk.gone:
                self._lost(index)
                continue
            if chunk.nbytes != nbytes:
                detail = f"a chunk of {chunk.nbytes} bytes came where {nbytes} belong"
                self.finish("corrupt", detail)
                return
            self._holdings.use(chunk)
            self._moving[index] = (chunk, had)
            self._moving_bytes += nbytes
            block, number = load.progress.chunk_ref(index)
            load.checksums[block * load.layout.chunk_count + number] = chunk.name[3]
            batch.append(index)
        if not batch:
            return
        armed = load.arm(batch)
        self._window.arm(armed, self._loop.time())
        chunks = [self._moving[index][0] for index in batch]
        if self._self_peer:
            self._send(armed, chunks)
            return
        copying = self._loop.run_in_executor(None, self._copy, armed, chunks)
        copying.add_done_callback(partial(self._copied, batch, chunks))

    def _copy(self, armed: ArmedChunks, chunks: Sequence[HeldChunk]) -> None:
        """On a thread: land chunks, each judged by the window."""
        view = self._holdings.region.view
        for number, (tag, chunk) in enumerate(zip(armed.tags, chunks, strict=True)):
            source = view[chunk.slot.offset : chunk.slot.offset + chunk.nbytes]
            target = armed.targets.part(number)
            self._transport.place(self._window.descriptor, tag, target, source)

    def _copied(
        self, batch: Sequence[int], chunks: Sequence[HeldChunk], copying: asyncio.Future[None]
    ) -> None:
        self._arrivals.drain()
        if copying.cancelled() or copying.exception() is not None:  # the agent's memory is gone
            self.finish("aborted", "the copies were given up")
        for index, chunk in zip(batch, chunks, strict=True):
            self._let_go(index, chunk)
        self._go_on()

    def _send(self, armed: ArmedChunks, chunks: Sequence[HeldChunk]) -> None:
        """Write chunks through the compute link of this node."""
        for number, (tag, chunk) in enumerate(zip(armed.tags, chunks, strict=True)):
            write = Write(
                self._holdings.region,
                chunk.slot.slices,
                self._window.descriptor,
                armed.targets.part(number),
                Lane.LOAD_DECODE,
                tag,
                max(0.001, self.load.deadline_at - self._loop.time()),
            )
            index = armed.indices[number]

            def sent(completion: Completion, chunk: HeldChunk = chunk, index: int = index) -> None:
                self._sent.put((chunk, index, completion))

            try:
                self._transport.write(self._self_peer, write, sent)
            except DualPathError as error:
                failed = Completion(self._self_peer, tag, WriteStatus.LOST, 0, str(error))
                self._sent.put((chunk, index, failed))

    def _on_sent(self, items: list[tuple[HeldChunk, int, Completion]]) -> None:
        self._arrivals.drain()
        lost = ""
        for chunk, index, completion in items:
            self._let_go(index, chunk)
            if completion.status not in (WriteStatus.DONE, WriteStatus.REFUSED):
                lost = f"the compute connection to this node itself: {completion.detail}"
        if lost:
            self.finish("path_lost", lost)
        self._go_on()

    def _let_go(self, index: int, chunk: HeldChunk) -> None:
        """No copy reads it any more."""
        self._moving_bytes -= chunk.nbytes
        self._holdings.unuse(chunk)
        self._moving.pop(index, None)
        if index in self._again:
            self._again.discard(index)
            self._waiting.append(index)

    def _go_on(self) -> None:
        if self.load.result is None:
            self._move()
            self.on_outcome()

    def _on_arrivals(self, windows: list[LoadWindow]) -> None:
        load, now = self.load, self._loop.time()
        for window in windows:
            landed = window.take_landed(now)
            if load.result is not None:
                continue
            for index in landed.intact:
                load.verified((index,), RETAINED if self._moving[index][1] else HANDED_OFF)
                self._requests.copied(self._record, self._places[index])
            for index in landed.corrupt:
                self._came_wrong(index)
        if load.result is None:
            load.changed()
            if load.progress.complete:
                self.finish("", "")

    def _came_wrong(self, index: int) -> None:
        """A copy is not what was declared final: copy it once more, if it is right where it is
        held."""
        self._attempts[index] += 1
        self.load.events["corrupt"] += 1
        if self._holdings.doubt(self._moving[index][0]):
            self._lost(index)
        elif self._attempts[index] < ATTEMPTS_MAX:
            self._again.add(index)
        else:
            self.finish("corrupt", f"a copy was torn {ATTEMPTS_MAX} times")

    def _lost(self, index: int) -> None:
        """It is not held any more: the prefill side may still send it, or it is missing at last."""
        place = self._places[index]
        self._record.final.pop(place, None)
        name = self._known.pop(index)
        intake = self._record.intake
        if intake is None or not intake.again(name):
            self._missing = f"chunk {place[2]} of {place[1].hex()} lost its bytes where it was held"
