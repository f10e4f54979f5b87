"""One hand-off as it comes in at the decode node.

Owns its window on the holdings, the chunks that are on their way into it, and its end. An offered
chunk that is held here is only pinned; one that somebody else is bringing is waited for; any other
is armed and asked for, as soon as there is room: the room is the credit. If that somebody stalls,
it is asked for here as well, and the first that comes right is taken. Guarantees that a chunk
counts only once its bytes hash to what was offered, and that after the end nothing of it lands any
more. Belongs to the loop, but for what its window calls.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from dualpath.agent.hand_off_spec import HAND_OFF_CHUNKS_MAX, check_distinct
from dualpath.agent.handed_request import HandedRequest, HandedRequests
from dualpath.agent.holdings import ChunkName, Filler, HeldChunk, Holdings
from dualpath.agent.known_chunks import check_id
from dualpath.agent.load_spec import check_hashes
from dualpath.agent.mailbox import Mailbox
from dualpath.agent.network import Network
from dualpath.agent.peer_room import PeerRoom
from dualpath.agent.staging import SLAB_BYTES
from dualpath.kvstore.checksum import of_fields
from dualpath.kvstore.layout import CHUNKS_PER_BLOCK_MAX
from dualpath.proto.v1 import agent_pb2
from dualpath.transfer.errors import DualPathError, InvalidRequest
from dualpath.transfer.region import RegionDescriptor
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import Arrival

ATTEMPTS_MAX = 3
"""How often a chunk may come with other bytes than were offered."""
RESPONSE_CHUNKS_MAX = 4096


class Intake:
    """See the module docstring. `over` is (reason, detail) once it has ended, the reason "" if
    every chunk is held; `wake` is set when there is something to say."""

    def __init__(
        self,
        hello: agent_pb2.TakeRequest,
        requests: HandedRequests,
        holdings: Holdings,
        compute: Network,
        peer: PeerRoom,
        stall_s: float,
        loop: asyncio.AbstractEventLoop,
        on_end: Callable[[Intake], None],
    ) -> None:
        """Begin. `stall_s`: how long to wait for a chunk that somebody else brings who gets none.
        Raises InvalidRequest, Overloaded."""
        self._hashes, self._sizes = _checked(hello)
        self._namespace_id = hello.namespace_id
        self._requests = requests
        self._holdings = holdings
        self._transport = compute.transport
        self.peer, self._stall_s = peer, stall_s
        self._loop = loop
        self._on_end = on_end
        self.taken_bytes = 0
        self.held_bytes = 0
        self.over: tuple[str, str] | None = None
        self.wake = asyncio.Event()
        self._fenced = False
        self._names: list[ChunkName] = []
        """Of what was offered, by number."""
        self._roomless: deque[int] = deque()
        self._coming: dict[int, HeldChunk] = {}
        """By tag, armed in the window."""
        self._own: set[int] = set()
        """Numbers of these."""
        self._filler = Filler(loop.time())
        self._asks: Counter[int] = Counter()
        """How often each number was asked for."""
        self._slow = False
        """What was asked for did not come: one at a time, until something comes."""
        self._others: dict[int, float] = {}
        """Numbers of chunks that somebody else brings, and since when they are waited for."""
        self._beside: set[int] = set()
        """Numbers of those that are to come here as well."""
        self._unarmed: list[tuple[int, Slices]] = []
        self._asked: deque[tuple[int, int]] = deque()
        """Tag and place of what is to be asked for."""
        self._attempts: Counter[int] = Counter()
        self._counted = bytearray(self.chunks)
        """By number: 1 once it is held, or with the engine."""
        self._final = 0
        self._by_block = [0] * len(self._hashes)
        self._landed: Mailbox[tuple[int, bool]] = Mailbox(loop, self._on_landed)
        self._record: HandedRequest = requests.of(
            hello.namespace_id, hello.request, peer.sharer.sharer
        )
        if self._record.intake is not None:
            raise InvalidRequest(
                f"request {hello.request!r} is being handed off already; wait for its end",
                reason="duplicate_request",
            )
        requests.begin_intake(self._record, self)
        region = holdings.region
        try:
            self.window: RegionDescriptor = self._transport.expose(
                region, 0, region.nbytes, self._arrived, on_hashed=self._hashed
            )
        except DualPathError as error:
            requests.end_intake(self._record, error.reason, str(error))
            raise
        self._timer = loop.call_later(hello.deadline_ms / 1000, self._on_deadline)

    @property
    def chunks(self) -> int:
        """Chunks of all blocks."""
        return len(self._hashes) * len(self._sizes)

    @property
    def blocks(self) -> int:
        """Leading blocks that are held whole."""
        for block, count in enumerate(self._by_block):
            if count < len(self._sizes):
                return block
        return len(self._by_block)

    @property
    def claimed(self) -> bool:
        """Whether its request is being received."""
        return self._record.receive is not None

    @property
    def waits(self) -> bool:
        """Whether chunks wait for a turn, or for room."""
        return bool(self._roomless)

    def offer(self, checksums: Sequence[int]) -> None:
        """The next chunks are final, and hash to this; they wait for turns. Raises
        InvalidRequest."""
        first = len(self._names)
        if first + len(checksums) > self.chunks:
            raise InvalidRequest(
                f"{first + len(checksums)} chunks are offered of a hand-off of {self.chunks}"
            )
        blocks = len(self._hashes)
        for number, checksum in enumerate(checksums, first):
            chunk, block = divmod(number, blocks)
            self._names.append((self._namespace_id, self._hashes[block], chunk, checksum))
        if self.over is None:
            self._roomless.extend(range(first, len(self._names)))

    def take_turn(self) -> bool:
        """One of the chunks that wait may come now, if there is room. Whether it did, and others
        wait; `flush` after the turns."""
        if self._roomless and self.over is None:
            number = self._roomless.popleft()
            if self._want(number):
                return bool(self._roomless)
            self._roomless.appendleft(number)
        return False

    def look_for_stalls(self, now: float) -> None:
        """Ask for chunks here, too, whose bringer has stalled."""
        stalled = [
            number for number, since in self._others.items() if self._is_stalled(number, since, now)
        ]
        for number in stalled:
            del self._others[number]
        self._beside.update(stalled)
        self._roomless.extend(stalled)

    def take_back(self, now: float) -> None:
        """Others need room: give what it has for chunks that do not come, if its peer has stalled.
        They wait for room again."""
        moved_at = max(self._filler.moved_at, self.peer.moved_at)
        if self.over is not None or not self._coming or now - moved_at < self._stall_s:
            return
        for tag in self._transport.disarm(self.window, tuple(self._coming)):
            chunk = self._gone(tag)
            if chunk is not None:
                self._own.discard(tag % self.chunks)
                self._roomless.append(tag % self.chunks)
                self._holdings.discard(chunk)
                self._holdings.unuse(chunk)
        self._slow = True

    def _is_stalled(self, number: int, since: float, now: float) -> bool:
        chunk = self._holdings.find(self._names[number])
        if chunk is None or chunk.held:
            return False  # it was told, and is about to be looked at
        moved_at = since if chunk.filler is None else chunk.filler.moved_at
        return now - moved_at >= self._stall_s

    def again(self, name: ChunkName) -> bool:
        """A chunk that counted has lost its bytes where it was held: have it come once more. False
        if it will not: it was not of this hand-off, or that is over."""
        if self.over is not None or name[1] not in self._hashes:
            return False
        blocks = len(self._hashes)
        number = name[2] * blocks + self._hashes.index(name[1])
        if number >= len(self._names) or self._names[number] != name or not self._counted[number]:
            return False
        self._counted[number] = 0
        self._final -= 1
        self._by_block[number % blocks] -= 1
        self._attempts[number] += 1
        if self._attempts[number] >= ATTEMPTS_MAX:
            self.finish("corrupt", f"chunk {name[2]} of {name[1].hex()} lost its bytes here")
            return False
        self._roomless.append(number)
        self._holdings.on_room()
        return True

    def lost(self, detail: str) -> None:
        """The prefill side ended its stream: gone, or because its deadline came first."""
        if self._roomless:
            self.finish("no_room", self._no_room())
        else:
            self.finish("peer_lost", detail)

    def finish(self, reason: str, detail: str) -> None:
        """End it now, unless it has ended; fenced when this returns."""
        if self.over is None:
            self._fenced = True
            self._transport.revoke(self.window)
            # What had landed before the fence: the last of it perhaps, or bytes that are wrong.
            self._landed.drain()
            self._end(reason, detail)

    def _end(self, reason: str, detail: str) -> None:
        if self.over is not None:
            return
        self.over = (reason, detail)
        self._timer.cancel()
        for chunk in self._coming.values():
            self.peer.add(-chunk.nbytes)
            self._holdings.discard(chunk)
            self._holdings.unuse(chunk)
        for kept in (self._coming, self._roomless, self._asked, self._unarmed, self._others):
            kept.clear()
        self._requests.end_intake(self._record, reason, detail)
        self._on_end(self)
        self.wake.set()

    def responses(self) -> Iterator[agent_pb2.TakeResponse]:
        """What is to be said now; the last one has `done`."""
        while self._asked:
            batch = [
                self._asked.popleft() for _ in range(min(RESPONSE_CHUNKS_MAX, len(self._asked)))
            ]
            yield agent_pb2.TakeResponse(
                tag=[tag for tag, _ in batch], offset=[offset for _, offset in batch]
            )
        if self.over is not None:
            reason, detail = self.over
            yield agent_pb2.TakeResponse(
                done=True,
                reason=reason,
                detail=detail,
                blocks=self.blocks,
                held_bytes=self.held_bytes,
            )

    # Chunks.

    def _want(self, number: int) -> bool:
        """See that an offered chunk comes to be held; False if there is no room for it now."""
        self._others.pop(number, None)
        if self._counted[number]:
            return True
        name = self._names[number]
        nbytes = self._sizes[number // len(self._hashes)]
        copied = self._record.copied.get(name[:3])
        if copied is not None:
            if copied != name[3]:
                self.finish("corrupt", f"chunk {name[2]} of {name[1].hex()} was other bytes before")
            else:
                self._count(number, nbytes, had=True)
            return True
        chunk = self._holdings.find(name)
        if chunk is not None and chunk.held:
            if not self._holdings.may_pin(chunk, self._record.key):
                return False
            if chunk.nbytes != nbytes:
                self.finish("invalid", f"a chunk of {nbytes} bytes is held with {chunk.nbytes}")
            else:
                self._keep(number, chunk, had=True)
        elif number in self._own:
            pass
        elif chunk is None or chunk.nbytes != nbytes or number in self._beside:
            return self._fill(number, nbytes)
        else:  # somebody else brings it: look again then
            chunk.waiters.append(partial(self._soon, number))
            self._others[number] = self._loop.time()
        return True

    def _fill(self, number: int, nbytes: int) -> bool:
        if self._slow and self._coming:
            return False
        if not self.peer.takes(nbytes):
            return False
        name, claimed = self._names[number], self.claimed
        chunk = self._holdings.fill(name, nbytes, self._filler, claimed=claimed)
        if chunk is not None:
            self._ask(number, chunk)
        return chunk is not None

    def _ask(self, number: int, chunk: HeldChunk) -> None:
        tag = number + self._asks[number] * self.chunks
        self._asks[number] += 1
        self.peer.add(chunk.nbytes)
        if not self._coming:
            self._filler.moved_at = self._loop.time()
        self._coming[tag] = chunk
        self._own.add(number)
        self._unarmed.append((tag, chunk.slot.slices))

    def _gone(self, tag: int) -> HeldChunk | None:
        """It is not coming any more: it has landed, or is fenced."""
        chunk = self._coming.pop(tag, None)
        if chunk is not None:
            self.peer.add(-chunk.nbytes)
        return chunk

    def flush(self) -> None:
        """Arm what is to be asked for, and have it said."""
        unarmed, self._unarmed = self._unarmed, []
        if unarmed and not self._fenced:
            self._transport.arm(self.window, unarmed)
            self._asked.extend((tag, slices.start) for tag, slices in unarmed)
            self.wake.set()

    def _soon(self, number: int) -> None:
        self._loop.call_soon(self._look_again, number)

    def _look_again(self, number: int) -> None:
        if self.over is None:
            if not self._want(number):
                self._roomless.append(number)
            self.flush()

    def _keep(self, number: int, chunk: HeldChunk, *, had: bool) -> None:
        self._requests.final(self._record, self._names[number][:3], chunk, had)
        self._count(number, chunk.nbytes, had=had)

    def _count(self, number: int, nbytes: int, *, had: bool) -> None:
        if had:
            self.held_bytes += nbytes
        else:
            self.taken_bytes += nbytes
        self._counted[number] = 1
        self._final += 1
        self._by_block[number % len(self._hashes)] += 1
        if self._final == self.chunks:
            self.finish("", "")

    def _on_landed(self, items: list[tuple[int, bool]]) -> None:
        for tag, intact in items:
            chunk = self._gone(tag)
            if chunk is None:
                continue
            number = tag % self.chunks
            if intact or self._counted[number]:
                self._own.discard(number)
                self._take(number, chunk, intact=intact)
                continue
            self._attempts[number] += 1
            self._ask(number, chunk)
            if self._attempts[number] >= ATTEMPTS_MAX:
                name = self._names[number]
                self.finish(
                    "corrupt",
                    f"chunk {name[2]} of {name[1].hex()} came {ATTEMPTS_MAX} times with other "
                    "bytes than were offered",
                )
        self.flush()
        if self._roomless:
            self._holdings.on_room()

    def _take(self, number: int, chunk: HeldChunk, *, intact: bool) -> None:
        """It came right, or nobody waits for it any more."""
        if intact:
            self._filler.moved_at = self.peer.moved_at = self._loop.time()
            self._slow = False
            held = self._holdings.filled(chunk)
            if not self._counted[number]:
                self._keep(number, held, had=False)
        else:
            self._holdings.discard(chunk)
        self._holdings.unuse(chunk)

    def _on_deadline(self) -> None:
        if self._roomless:
            self.finish("no_room", self._no_room())
        else:
            self.finish("deadline", "the deadline passed")

    def _no_room(self) -> str:
        return f"{len(self._roomless)} chunks found no room in hold-bytes"

    # On threads of the transport.

    def _arrived(self, arrival: Arrival) -> bool:
        digest = of_fields(self._holdings.region.view, arrival.fields)
        return self._hashed((arrival.tag,), (digest,))[0]

    def _hashed(self, tags: Sequence[int], digests: Sequence[int]) -> Sequence[bool]:
        taken = []
        for tag, digest in zip(tags, digests, strict=True):
            chunk = self._coming.get(tag)
            intact = chunk is not None and digest == chunk.name[3]
            taken.append(intact)
            self._landed.put((tag, intact))
        return taken


def _checked(hello: agent_pb2.TakeRequest) -> tuple[tuple[bytes, ...], tuple[int, ...]]:
    """The blocks and the sizes of their chunks. Raises InvalidRequest."""
    hashes, sizes = tuple(hello.hash), tuple(hello.chunk_bytes)
    check_id(hello.namespace_id)
    check_hashes(hashes)
    check_distinct(hashes)
    if not 1 <= len(sizes) <= CHUNKS_PER_BLOCK_MAX:
        raise InvalidRequest(f"a block has 1..{CHUNKS_PER_BLOCK_MAX} chunks, not {len(sizes)}")
    if min(sizes) < 1 or max(sizes) > SLAB_BYTES:
        raise InvalidRequest(f"a chunk has 1..{SLAB_BYTES} bytes, not {min(sizes)}..{max(sizes)}")
    if len(hashes) * len(sizes) > HAND_OFF_CHUNKS_MAX:
        raise InvalidRequest(
            f"a hand-off has at most {HAND_OFF_CHUNKS_MAX} chunks, not {len(hashes) * len(sizes)}"
        )
    if not hello.deadline_ms:
        raise InvalidRequest("a hand-off has a deadline: deadline_ms is 0")
    return hashes, sizes
