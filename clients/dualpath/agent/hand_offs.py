"""All hand-offs that go out from this prefill node.

Owns the checks of a request, how many run at once, and their counters. A hand-off that was accepted
always ends with a result that names its reason, at its deadline at the latest. Belongs to the loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from dualpath.agent.config import AgentConfig
from dualpath.agent.hand_off import HandOff
from dualpath.agent.hand_off_spec import HandOffResult, HandOffSpec, LayerGate, check_chunks
from dualpath.agent.regions import Regions
from dualpath.agent.relay_link import RelayLink
from dualpath.kvstore.layout import KVLayout
from dualpath.transfer.errors import InvalidRequest

HAND_OFFS_MAX = 1024
CLOSE_S_MAX = 2.0
"""How long a stop waits for writes to a peer that does not answer; they end with the transport."""


class Layouts(Protocol):
    """Who knows the namespaces: the loader."""

    def layout(self, namespace_id: bytes) -> KVLayout:
        """Layout of an opened namespace. Raises InvalidRequest."""


class HandOffs:
    """See the module docstring. `relays` are by name."""

    def __init__(
        self,
        config: AgentConfig,
        relays: Mapping[str, RelayLink],
        regions: Regions,
        layouts: Layouts,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.events: Counter[str] = Counter()
        self.sent_bytes = 0
        self._config = config
        self._relays = relays
        self._regions = regions
        self._layouts = layouts
        self._loop = loop
        self._running: dict[HandOff, asyncio.Task[HandOffResult]] = {}

    def __len__(self) -> int:
        return len(self._running)

    async def run(self, spec: HandOffSpec, gate: LayerGate) -> HandOffResult:
        """Hand blocks over as `gate` opens. Raises InvalidRequest, nothing else. To give it up,
        abort the gate; a cancelled call gives it up as well."""
        layout = self._layouts.layout(spec.namespace_id)
        entry = self._regions.get(spec.region)
        spec.places.check(layout, len(spec.hashes), entry.region.nbytes)
        check_chunks(layout, len(spec.hashes))
        if spec.deadline_s > self._config.deadline_s_max:
            raise InvalidRequest(
                f"deadline_s {spec.deadline_s} is over {self._config.deadline_s_max}; ask for less"
            )
        relay = self._relays.get(spec.decode_peer)
        if relay is None:
            raise InvalidRequest(
                f"unknown decode peer {spec.decode_peer!r}; the relays of this agent are "
                f"{', '.join(self._relays) or 'none'}"
            )
        if len(self._running) >= HAND_OFFS_MAX:
            self.events["hand_off_overloaded"] += 1
            return HandOffResult(0, 0, 0, "overloaded", f"{HAND_OFFS_MAX} hand-offs are running")
        gate.limit(layout.layers)
        stall_s = self._config.stall_s
        hand_off = HandOff(spec, layout, entry, relay, gate, stall_s, self._loop)
        entry.pins += 1
        entry.on_gone[hand_off] = lambda: hand_off.finish("aborted", "its memory was taken back")
        task = asyncio.create_task(hand_off.run(), name=f"hand-off {spec.request}")
        self._running[hand_off] = task
        # Whoever waits may go away; the memory is let go when no write reads it any more.
        task.add_done_callback(lambda _: self._ended(hand_off))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            hand_off.finish("aborted", "nobody waits for it")
            raise

    async def close(self) -> None:
        """End all: no write begins any more."""
        tasks = tuple(self._running.values())
        for hand_off in tuple(self._running):
            hand_off.finish("aborted", "the agent stops")
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S_MAX)

    def _ended(self, hand_off: HandOff) -> None:
        task = self._running.pop(hand_off)
        entry = hand_off.entry
        entry.on_gone.pop(hand_off, None)
        self._regions.unpin(entry)
        self.sent_bytes += hand_off.sent_bytes
        reason = "aborted" if task.cancelled() or task.exception() else task.result().reason
        if reason:
            self.events[f"hand_off_{reason}"] += 1
