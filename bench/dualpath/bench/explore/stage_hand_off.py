"""One small hand-off on a stage: the real hand-off, intake, holdings and receive of two engines.

Owns the two processes and the stream between them, the faults that may strike, and what must hold.
Layers become final, messages and writes travel, and threads hash and copy when the agenda says so.
Either engine's memory is filled with a canary the moment its part has ended, as it would be used
again: a late write into the decode engine's, or a late read of the prefill engine's, is seen.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import grpc.aio
from dualpath.agent.active_load import ActiveLoad
from dualpath.agent.attachments import Attachments
from dualpath.agent.hand_off import HandOff
from dualpath.agent.hand_off_spec import HandOffResult, HandOffSpec, LayerGate
from dualpath.agent.handed_request import HandedRequests
from dualpath.agent.holdings import ChunkName, Holdings
from dualpath.agent.intakes import Intakes
from dualpath.agent.load_spec import LoadSpec
from dualpath.agent.network import Network
from dualpath.agent.outcome import LoadResult, MissReason
from dualpath.agent.places import Places
from dualpath.agent.receive import Receive
from dualpath.agent.regions import EngineRegion
from dualpath.agent.relay_link import RelayLink
from dualpath.agent.staging import SLAB_BYTES
from dualpath.bench.explore.stage import StageConfig
from dualpath.bench.explore.stage_play import REST_S, Fault, StagePlay
from dualpath.bench.explore.stage_transport import StageNetwork, StageTransport, Violation
from dualpath.kvstore import checksum
from dualpath.kvstore.layout import CHUNK_BYTES_MIN, KVLayout
from dualpath.proto.v1 import agent_pb2
from dualpath.transfer.errors import DualPathError, PeerLost
from dualpath.transfer.region import Region
from dualpath.transfer.slices import Slices

LAYOUT = KVLayout(layers=2, block_tokens=16, layer_bytes=CHUNK_BYTES_MIN, dtype="float16")
"""A chunk is one layer of a block, so that layers go one by one."""
DEADLINE_S = 2.0
STALL_S = 0.5
SLACK_S = 0.01
HOLD_S = 5.0
REQUEST = "request"
NAMESPACE = b"n" * 16
CANARY = b"\xc3"
SHORT = frozenset(
    {MissReason.PEER_LOST, MissReason.DEADLINE, MissReason.UNAVAILABLE, MissReason.CORRUPT}
)
_regions: dict[str, Region] = {}
"""Memory that is the same in all runs: making it costs more than a run."""
_contents: dict[int, bytes] = {}


def content(block: int) -> bytes:
    """The bytes of a block, each layer's different."""
    if block not in _contents:
        layers = [bytes((block * 37 + layer * 101 + each) % 251 for each in range(256))
                  for layer in range(LAYOUT.layers)]  # fmt: skip
        _contents[block] = b"".join(layer * (LAYOUT.layer_bytes // 256) for layer in layers)
    return _contents[block]


def _digest(data: bytes) -> int:
    return checksum.of_slices(memoryview(data), Slices.contiguous(0, len(data)))


def _region(name: str, nbytes: int) -> Region:
    region = _regions.get(name)
    if region is None or region.nbytes != nbytes:
        region = _regions[name] = Region.of(bytearray(nbytes))
    return region


@dataclass(eq=False)
class _TakeCall:
    """The prefill side's end of a Take stream: what grpc.aio's call offers."""

    stage: HandOffStage
    heard: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    asked: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    server: asyncio.Task[None] | None = None
    lost: bool = False

    async def write(self, request: agent_pb2.TakeRequest) -> None:
        """On its way."""
        if self.lost:
            raise PeerLost("the stream ended")
        sent = agent_pb2.TakeRequest()
        sent.CopyFrom(request)
        what = f"{len(sent.checksum)} chunks are offered" if sent.checksum else "a take begins"
        what = "the hand-off is given up" if sent.abort else what
        self.stage.agenda.add("prefill>decode", what, lambda: self.asked.put_nowait(sent))

    async def done_writing(self) -> None:
        """The other side sees the end of the requests."""
        self.stage.agenda.add(
            "prefill>decode", "the requests end", lambda: self.asked.put_nowait(grpc.aio.EOF)
        )

    async def read(self) -> Any:
        """The next answer, or EOF. Raises PeerLost."""
        answer = await self.heard.get()
        if isinstance(answer, DualPathError):
            raise answer
        return answer

    def cancel(self) -> None:
        """The other side's handler is cancelled, some time later."""
        self.stage.agenda.add("prefill>decode", "the stream is cancelled", self.end)

    def end(self) -> None:
        """The handler at the decode side is cancelled."""
        if self.server is not None:
            self.server.cancel()

    async def requests(self) -> AsyncIterator[agent_pb2.TakeRequest]:
        """As the decode side's handler reads them."""
        while (request := await self.asked.get()) is not grpc.aio.EOF:
            yield request

    def hear(self, what: str, answer: Any) -> None:
        """An answer is on its way back."""
        self.stage.agenda.add("decode>prefill", what, lambda: self.heard.put_nowait(answer))


class HandOffStage(StagePlay):
    """See the module docstring."""

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = config.blocks
        nbytes = config.blocks * LAYOUT.block_bytes
        self.source = _region("prefill", nbytes)
        self.target = _region("decode", nbytes)
        self.source.view[:] = b"".join(content(block) for block in range(config.blocks))
        self.given: HandOffResult | None = None
        self.received: LoadResult | None = None
        self.prefill_alive = self.decode_alive = self.linked = True
        self.given_up = self.asked_s = 0.0
        self.threads = self.working = 0
        self.call: _TakeCall | None = None
        self.receive: Receive | None = None
        self.load: ActiveLoad | None = None
        self.perform(self._compose)

    def _compose(self) -> None:
        self.loop.on_thread = self._on_thread
        self.prefill = StageTransport("prefill", self.wire)
        self.decode = StageTransport("decode", self.wire)
        self.prefill.links["decode"] = self.decode
        self.decode.links["prefill"] = self.prefill
        self.attachment = SimpleNamespace(on_close={}, sharer="prefill")
        compute = cast(Network, StageNetwork(self.decode))
        self.holdings = Holdings(_region("holdings", 4 * SLAB_BYTES), HOLD_S)
        self.counts: Counter[str] = Counter()
        self.requests = HandedRequests(self.holdings, HOLD_S, self.counts, self.loop)
        self.intakes = Intakes(
            cast(Attachments, SimpleNamespace(find=lambda _session: self.attachment)),
            self.requests,
            self.holdings,
            compute,
            self.counts,
            60.0,
            STALL_S,
            self.loop,
        )
        if self.config.retain:
            self._retain(0, 0)
        self.gate = LayerGate()
        spec = HandOffSpec(
            REQUEST, "decode", NAMESPACE, self._hashes(), 1, self._places(), DEADLINE_S
        )
        entry = EngineRegion(1, self.source, behind_compute_link=False, owned=False)
        self.hand_off = HandOff(
            spec, LAYOUT, entry, cast(RelayLink, self._relay_link()), self.gate, STALL_S, self.loop
        )
        self.running = self.loop.create_task(self.hand_off.run())
        for layer in range(LAYOUT.layers):
            self.agenda.add("engine", f"layer {layer} is done", self._layer_done(layer))
        self.agenda.add("decode engine", "the decode engine receives", self._begin_receive)

    def _relay_link(self) -> SimpleNamespace:
        """What a hand-off uses of a RelayLink."""

        async def tried(_timeout_s: float) -> bool:
            return self.linked

        link = SimpleNamespace(
            tried=tried,
            reason="peer_lost",
            attached=SimpleNamespace(session=b"session"),
            network=StageNetwork(self.prefill),
            peer="decode",
            lose=lambda _reason: self._break(),
        )
        return SimpleNamespace(name="decode", holds=True, link=link, take=self._take)

    def _take(self) -> _TakeCall:
        self.call = call = _TakeCall(self)
        call.server = self.loop.create_task(self._serve(call))
        return call

    async def _serve(self, call: _TakeCall) -> None:
        answers = self.intakes.serve(call.requests())
        try:
            async for answer in answers:
                what = f"{len(answer.tag)} chunks are taken"
                what = f"the intake ends {answer.reason!r}" if answer.done else what
                call.hear(what, answer)
            call.hear("the stream ends", grpc.aio.EOF)
        except DualPathError as error:
            call.hear(f"the take fails: {error}", error)
        finally:
            with contextlib.suppress(asyncio.CancelledError):
                await answers.aclose()

    def _hashes(self) -> tuple[bytes, ...]:
        return tuple(bytes([block + 1]) * 16 for block in range(self.blocks))

    def _places(self) -> Places:
        return Places.contiguous(LAYOUT, self.blocks)

    def _retain(self, block: int, chunk: int) -> None:
        """As if a relay had kept it for the request."""
        offset, nbytes = LAYOUT.chunk_extent(chunk)
        data = content(block)[offset : offset + nbytes]
        name: ChunkName = (NAMESPACE, self._hashes()[block], chunk, _digest(data))
        held = self.holdings.fill(name, nbytes)
        assert held is not None
        self.holdings.region.view[held.slot.offset : held.slot.offset + nbytes] = data
        self.holdings.pin(held, REQUEST, self.loop.time())
        self.holdings.filled(held)
        self.holdings.unuse(held)

    def _on_thread(self, work: Callable[[], None]) -> None:
        self.threads += 1
        self.working += 1

        def done() -> None:
            self.working -= 1
            work()

        self.agenda.add(f"thread {self.threads}", f"thread {self.threads} does its work", done)

    def _layer_done(self, layer: int) -> Callable[[], None]:
        return lambda: self.gate.done(layer)

    def _begin_receive(self) -> None:
        if not self.decode_alive:
            return
        self.asked_s = self.loop.time()
        spec = LoadSpec("receive", NAMESPACE, self._hashes(), 2, self._places(), DEADLINE_S)
        entry = EngineRegion(2, self.target, behind_compute_link=False, owned=False)
        self.load = ActiveLoad(spec, LAYOUT, entry, self.loop.time())
        record = self.requests.of(NAMESPACE, REQUEST)
        compute = cast(Network, StageNetwork(self.decode))
        self.receive = Receive(
            self.load, record, self.requests, self.holdings, compute, "", self.loop, lambda _: None
        )

    # What may go wrong.

    def faults(self) -> list[Fault]:
        """See StagePlay."""
        found = []
        if self.given is None and self.prefill_alive:
            found.append(Fault("the prefill engine gives the hand-off up", self._give_up))
            found.append(Fault("the prefill node dies", self._prefill_dies))
        if self.received is None and self.receive is not None and self.decode_alive:
            found.append(Fault("the decode engine gives the receive up", self._abort_receive))
        if self.decode_alive:
            found.append(Fault("the decode node dies", self._decode_dies))
        if self.linked:
            found.append(Fault("the link breaks", self._break))
        return found + self.spoil_writes()

    def _give_up(self) -> None:
        self.given_up += 1
        self.gate.abort()

    def _abort_receive(self) -> None:
        assert self.receive is not None
        self.given_up += 1
        self.receive.finish("aborted", "aborted")

    def _break(self) -> None:
        """The session of the two agents ends, for good."""
        if not self.linked:
            return
        self.linked = False
        self.given_up += 1
        self.agenda.drop("prefill>decode")
        self.agenda.drop("decode>prefill")
        self.wire.cut(self.prefill, self.decode)
        if self.call is not None:
            self.call.lost = True
            self.call.heard.put_nowait(PeerLost("the link broke"))
            self.call.end()
        if self.decode_alive:
            for on_close in tuple(self.attachment.on_close.values()):
                on_close("the link broke")

    def _prefill_dies(self) -> None:
        self.prefill_alive = False
        self._break()
        self.agenda.drop("engine")
        self.running.cancel()

    def _decode_dies(self) -> None:
        self.decode_alive = False
        self._break()
        self.agenda.drop("decode engine")

    # What must hold.

    @property
    def over(self) -> bool:
        """Whether both parts have ended, or died."""
        received = self.received is not None or not self.decode_alive
        return received and (self.given is not None or not self.prefill_alive)

    @property
    def horizon_s(self) -> float:
        """See StagePlay."""
        return 2 * DEADLINE_S + REST_S

    @property
    def events(self) -> Mapping[str, int]:
        """See StagePlay."""
        events = Counter(self.counts)
        if self.given is not None and self.given.reason:
            events[f"hand_off_{self.given.reason}"] += 1
        if self.received is not None:
            events.update(self.received.events)
        return events

    def check(self) -> None:
        """See StagePlay."""
        if self.running.done() and self.given is None and self.prefill_alive:
            self.given = self.running.result()
            self._check_given(self.given)
            self.source.view[:] = CANARY * self.source.nbytes
        late = self.loop.time() > DEADLINE_S + SLACK_S
        # A thread that reads the memory is waited for: it ends with the chunk that it hashes.
        if self.prefill_alive and self.given is None and late and not self.working:
            raise Violation("the hand-off runs on past its deadline")
        if not self.decode_alive:
            return
        self._check_held()
        load = self.load
        if load is None:
            return
        if self.received is not None:
            if bytes(self.target.view) != CANARY * self.target.nbytes:
                raise Violation("a copy landed in memory that is used again")
            return
        for block in range(load.progress.blocks_valid):
            self._check_layers(block, load.layers_ready)
        if load.result is not None:
            self._check_received(load.result)
            self.received = load.result
            self.target.view[:] = CANARY * self.target.nbytes
        elif self.loop.time() > self.asked_s + DEADLINE_S + SLACK_S:
            raise Violation("the receive runs on past its deadline")

    def _check_held(self) -> None:
        view = self.holdings.region.view
        for name, chunk in self.holdings._chunks.items():
            if chunk.held and checksum.of_slices(view, chunk.slot.slices) != name[3]:
                raise Violation(f"what is held of block {name[1].hex()} is wrong")

    def _check_layers(self, block: int, layers: int) -> None:
        start, nbytes = block * LAYOUT.block_bytes, layers * LAYOUT.layer_bytes
        # As bytes: a view is compared item by item.
        if bytes(self.target.view[start : start + nbytes]) != content(block)[:nbytes]:
            raise Violation(f"layers of block {block} count and are wrong")

    @property
    def _undisturbed(self) -> bool:
        """Nothing has happened that may cost blocks: one flipped or doubled write may not."""
        return not self.given_up and not self.hurried and self.struck <= 1

    def _check_given(self, result: HandOffResult) -> None:
        if self._undisturbed and result.reason:
            raise Violation(f"the hand-off has failed without a reason to: {result}")
        if not result.reason and result.blocks != self.blocks:
            raise Violation(f"the hand-off is not whole and says not why: {result}")

    def _check_received(self, result: LoadResult) -> None:
        for block in range(result.blocks):
            self._check_layers(block, LAYOUT.layers)
        whole = result.blocks == self.blocks
        if whole != (result.miss is MissReason.NONE) or not (whole or result.miss in SHORT):
            raise Violation(f"the receive ends with a reason that does not fit: {result}")
        if self._undisturbed and not whole:
            raise Violation(f"the receive is short without a reason to be: {result}")

    def check_rest(self) -> None:
        """See StagePlay."""
        if not self.over:
            raise Violation("nothing can happen any more, and not all has ended")
        if self.wire.flying:
            raise Violation(f"left: writes {self.wire.flying}")
        if not self.decode_alive:
            return
        if "windows=0" not in repr(self.decode.windows):
            raise Violation(f"left at the decode node: {self.decode.windows!r}")
        left = (self.holdings.in_use, self.holdings.requests, self.holdings.pinned_bytes)
        if any(left) or len(self.requests) or len(self.intakes):
            raise Violation(
                f"left at the decode node: {left[0]} chunks in use, {left[1]} requests, {left[2]} "
                f"bytes pinned, {len(self.requests)} records, {len(self.intakes)} intakes"
            )

    def close(self) -> None:
        """See StagePlay."""
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.on_thread = lambda work: work()
        self.loop.settle()
        self.loop.close()
