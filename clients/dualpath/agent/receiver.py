"""All receives of this node's decode engines.

Owns the checks of a request, how many run at once, and their counters. A receive that was accepted
always ends with a result, at its deadline at the latest. Belongs to the loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from dualpath.agent.active_load import ActiveLoad
from dualpath.agent.config import AgentConfig
from dualpath.agent.hand_off_spec import check_chunks, check_distinct, check_request
from dualpath.agent.hand_offs import Layouts
from dualpath.agent.handed_request import HandedRequests
from dualpath.agent.holdings import Holdings
from dualpath.agent.load_spec import LoadSpec, LoadUpdate
from dualpath.agent.loader import Loader
from dualpath.agent.network import Network
from dualpath.agent.outcome import LoadResult, LoadStarted, MissReason
from dualpath.agent.receive import Receive
from dualpath.agent.regions import Regions
from dualpath.agent.self_relay import SelfRelay
from dualpath.transfer.errors import DualPathError, InvalidRequest


class Receiver:
    """See the module docstring."""

    def __init__(
        self,
        config: AgentConfig,
        requests: HandedRequests,
        holdings: Holdings,
        regions: Regions,
        layouts: Layouts,
        loader: Loader,
        compute: Network,
        self_relay: SelfRelay,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.events: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self.done = 0
        self.received_bytes = 0
        self._config = config
        self._requests = requests
        self._holdings = holdings
        self._regions = regions
        self._layouts = layouts
        self._loader = loader
        self._compute = compute
        self._self_relay = self_relay
        self._loop = loop
        self._running: dict[str, Receive] = {}

    def __len__(self) -> int:
        return len(self._running)

    async def receive(self, spec: LoadSpec) -> AsyncGenerator[LoadUpdate, None]:
        """Run a receive. Raises InvalidRequest before the first update, nothing later. Closing the
        iterator early aborts it."""
        load = self._accepted(spec)
        yield LoadUpdate(started=LoadStarted(len(spec.hashes), MissReason.NONE))
        receive: Receive | None = None
        try:
            receive = await self._begin(load)
            while load.result is None:
                update = await load.next_change()
                if update.result is None:
                    yield update
            rest = None if receive is None else self._rest(receive, load.result)
            if rest is not None:
                try:
                    async for update in rest:
                        yield update
                finally:
                    await rest.aclose()
            else:
                yield LoadUpdate(load.layers_ready, load.result.blocks, result=load.result)
        finally:
            if receive is not None:
                receive.finish("aborted", "nobody waits for it")
            if load.result is not None:
                self._count(load.result)

    def _count(self, result: LoadResult) -> None:
        """Of what was handed off; what came from storage counts as a load."""
        self.done += 1
        self.received_bytes += sum(result.shares.values())
        self.events.update(result.events)
        if result.miss is not MissReason.NONE:
            self.misses[result.miss.value] += 1

    def _rest(
        self, receive: Receive, result: LoadResult
    ) -> AsyncGenerator[LoadUpdate, None] | None:
        """The updates of what is left of a receive that ended short, from storage; None if nobody
        wants it, or its time is over."""
        load = receive.load
        left_s = load.deadline_at - self._loop.time()
        if result.blocks == result.requested_blocks or result.events.get("aborted"):
            return None
        if left_s <= 0 or not self._config.daemons or load.entry.gone:
            return None
        return self._completed(receive, result, left_s)

    async def _completed(
        self, receive: Receive, result: LoadResult, left_s: float
    ) -> AsyncGenerator[LoadUpdate, None]:
        load = receive.load
        spec = replace(load.spec, deadline_s=left_s, decode_peer="", request="")
        had = receive.copied()
        updates = self._loader.load(spec, had)
        whole = False
        try:
            async for update in updates:
                if update.started is not None:
                    whole = update.started.hit_blocks == result.requested_blocks
                elif update.result is not None:
                    blocks = max(result.blocks, update.result.blocks)
                    chunks = Counter(block for block, _ in had)
                    while chunks[blocks] == load.layout.chunk_count:
                        blocks += 1  # not stored, but handed off
                    elapsed_s = self._loop.time() - load.started_at
                    nbytes = blocks * load.layout.block_bytes
                    final = _joined(result, update.result, blocks, nbytes, elapsed_s)
                    yield LoadUpdate(load.layout.layers, blocks, result=final)
                elif whole and update.blocks_valid == result.requested_blocks:
                    yield update  # else it says nothing of what was handed off beyond
        except InvalidRequest:  # its memory is about to go, or a load has its name
            yield LoadUpdate(load.layers_ready, result.blocks, result=result)
        finally:
            await updates.aclose()

    def abort(self, load_ids: Sequence[str]) -> int:
        """End receives; fenced when this returns. Says how many there were."""
        aborted = 0
        for load_id in load_ids:
            receive = self._running.get(load_id)
            if receive is not None:
                receive.finish("aborted", "aborted")
                aborted += 1
        return aborted

    def close(self) -> None:
        """End all."""
        for receive in tuple(self._running.values()):
            receive.finish("aborted", "the agent stops")

    def _accepted(self, spec: LoadSpec) -> ActiveLoad:
        layout = self._layouts.layout(spec.namespace_id)
        entry = self._regions.get(spec.region)
        check_request(spec.request)
        check_distinct(spec.hashes)
        check_chunks(layout, len(spec.hashes))
        spec.places.check(layout, len(spec.hashes), entry.region.nbytes)
        if spec.deadline_s > self._config.deadline_s_max:
            raise InvalidRequest(
                f"deadline_s {spec.deadline_s} is over {self._config.deadline_s_max}; ask for less"
            )
        if spec.load_id in self._running:
            raise InvalidRequest(
                f"receive {spec.load_id!r} is running already; choose another load_id",
                reason="duplicate_load",
            )
        return ActiveLoad(spec, layout, entry, self._loop.time())

    async def _begin(self, load: ActiveLoad) -> Receive | None:
        """Start it; None if it has ended at once."""
        spec = load.spec
        try:
            if not self._holdings.capacity_bytes:
                raise DualPathError(
                    "this agent holds nothing: it serves no peers, or hold_bytes is 0",
                    reason="unsupported",
                )
            if len(self._running) >= self._config.loads_max:
                raise DualPathError(
                    f"{self._config.loads_max} receives are running", reason="overloaded"
                )
            if load.entry.behind_compute_link:
                await self._self_relay.ensure()
            record = self._requests.of(spec.namespace_id, spec.request)
            if record.receive is not None:
                raise DualPathError(
                    f"request {spec.request!r} is being received already",
                    reason="duplicate_request",
                )
            if load.entry.gone:
                raise DualPathError("its memory was taken back", reason="aborted")
            peer = self._self_relay.peer if load.entry.behind_compute_link else ""
            receive = Receive(
                load,
                record,
                self._requests,
                self._holdings,
                self._compute,
                peer,
                self._loop,
                self._ended,
            )
        except DualPathError as error:
            load.events[error.reason] += 1
            overloaded = error.reason == "overloaded"
            load.miss = MissReason.OVERLOADED if overloaded else MissReason.UNAVAILABLE
            load.detail = str(error)
            load.progress.cut(0)
            load.finish(self._loop.time(), {})
            return None
        if load.result is None:
            self._running[spec.load_id] = receive
        return receive

    def _ended(self, receive: Receive) -> None:
        self._running.pop(receive.load.spec.load_id, None)


def _joined(
    received: LoadResult, rest: LoadResult, blocks: int, nbytes: int, elapsed_s: float
) -> LoadResult:
    """The result of a receive of which `blocks`, of `nbytes`, are whole with what came from
    storage."""
    whole = blocks == received.requested_blocks
    return replace(
        received,
        blocks=blocks,
        miss=MissReason.NONE if whole else received.miss,
        detail="" if whole else received.detail,
        shares=Counter(received.shares) + Counter(rest.shares),
        events=Counter(received.events) + Counter(rest.events),
        held_bytes=rest.held_bytes,
        elapsed_s=elapsed_s,
        nbytes=nbytes,
    )
