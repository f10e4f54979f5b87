"""All receives of this node's decode engines.

Owns the checks of a request, how many run at once, and their counters. A receive that was accepted
always ends with a result, at its deadline at the latest. Belongs to the loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Sequence

from dualpath.agent.active_load import ActiveLoad
from dualpath.agent.config import AgentConfig
from dualpath.agent.hand_off_spec import check_chunks, check_distinct, check_request
from dualpath.agent.hand_offs import Layouts
from dualpath.agent.handed_request import HandedRequests
from dualpath.agent.holdings import Holdings
from dualpath.agent.load_spec import LoadSpec, LoadUpdate
from dualpath.agent.network import Network
from dualpath.agent.outcome import LoadStarted, MissReason
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
                yield await load.next_change()
            if load.last_told is not load.result:
                yield LoadUpdate(load.layers_ready, load.result.blocks, result=load.result)
        finally:
            if receive is not None:
                receive.finish("aborted", "nobody waits for it")
            if load.result is not None:
                self.done += 1
                self.received_bytes += sum(load.result.shares.values())
                self.events.update(load.result.events)
                if load.result.miss is not MissReason.NONE:
                    self.misses[load.result.miss.value] += 1

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
