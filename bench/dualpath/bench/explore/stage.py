"""One small load on a stage: real loader, real relay, real windows; everything else on the agenda.

Owns the composition, the faults that may strike, and what must hold: after every event, when the
load ends, and once everything has come to rest. The memory is filled with a canary the moment the
load has ended, as an engine would use it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from dualpath.agent.active_load import ActiveLoad
from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.daemon_loads import DaemonLoads
from dualpath.agent.load_spec import LoadSpec
from dualpath.agent.network import Network
from dualpath.agent.outcome import LoadResult, LoadStarted, MissReason
from dualpath.agent.places import Places
from dualpath.agent.regions import EngineRegion
from dualpath.agent.relay_link import RelayLink
from dualpath.agent.self_relay import SelfRelay
from dualpath.bench.explore.stage_daemon import (
    LAYOUT,
    NAMESPACE_ID,
    StageDaemon,
    StageDaemonLink,
    content,
)
from dualpath.bench.explore.stage_play import REST_S, Fault, StagePlay
from dualpath.bench.explore.stage_relay import StageRelay, StageRelayLink
from dualpath.bench.explore.stage_transport import StageNetwork, StageTransport, Violation
from dualpath.transfer.dispatch_config import DispatchConfig
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.placement import policy_named
from dualpath.transfer.region import Region

DEADLINE_S = 2.0
CONFIG = DispatchConfig(stall_s=0.5, stall_s_max=0.6, overtake_s=0.1, backoff_s=0.05)
BLOCKS_MAX = 16
RELAYS_MAX = 4
CANARY = b"\xc3"
UNASKED = frozenset({MissReason.UNAVAILABLE, MissReason.DEADLINE, MissReason.CORRUPT})
"""Why a load of stored blocks may end short."""


@dataclass(frozen=True, slots=True)
class StageConfig:
    """How large the load is, by how many relays, under which policy; with `retain` the first relay
    is the request's own decode node and keeps what it relays."""

    blocks: int = 2
    relays: int = 1
    policy: str = "split"
    retain: bool = False
    hand_off: bool = False
    """Not a load, but the hand-off of so many blocks from one engine to another."""

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("blocks", self.blocks, 1, BLOCKS_MAX),
            ("relays", self.relays, 0, RELAYS_MAX),
        ):
            if not least <= value <= most:
                raise InvalidRequest(f"--{name} must lie in {least}..{most}, not {value}")
        policy_named(self.policy)


class Stage(StagePlay):
    """See the module docstring. `close` it."""

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.config = config
        self.memory = bytearray(config.blocks * LAYOUT.block_bytes)
        self.region = Region.of(self.memory)
        self.load: ActiveLoad | None = None
        self.ended: LoadResult | None = None
        self.aborted = False
        self.perform(self._compose)

    def _compose(self) -> None:
        config = self.config
        self.daemon = StageDaemon(config.blocks, self.agenda, self.loop, self.wire)
        self.loads: DaemonLoads | None = None
        self.storage = StageTransport("loader.storage", self.wire)
        self.compute = StageTransport("loader.compute", self.wire)
        self.link = StageDaemonLink(
            "loader", self.daemon, StageNetwork(self.storage), lambda _: self._changed()
        )
        self.relays = [
            StageRelay(f"relay-{index}", self.daemon, self._changed)
            for index in range(config.relays)
        ]
        compute = StageNetwork(self.compute)
        self.relay_links = {
            relay.name: StageRelayLink("loader", relay, compute, self._changed)
            for relay in self.relays
        }
        self.loads = DaemonLoads(
            cast(DaemonLink, self.link),
            cast("dict[str, RelayLink]", self.relay_links),
            cast(Network, compute),
            cast(SelfRelay, None),
            CONFIG,
            self.loop,
            storage_limit_bytes_per_s=0,
            lease_s=60,
            grace_s=0.3,
        )
        spec = LoadSpec(
            "load",
            NAMESPACE_ID,
            tuple(bytes([index + 1]) * 16 for index in range(config.blocks)),
            1,
            Places.contiguous(LAYOUT, config.blocks),
            DEADLINE_S,
            decode_peer="relay-0" if config.retain else "",
            request="request" if config.retain else "",
        )
        entry = EngineRegion(1, self.region, behind_compute_link=False, owned=False)
        self.load = ActiveLoad(spec, LAYOUT, entry, self.loop.time())
        started = LoadStarted(config.blocks, MissReason.NONE)
        self.load.begin(started, self.daemon.new_lease("loader"), self.daemon.checksums)
        self.loads.add(self.load, spec.placement(config.policy))

    def _changed(self) -> None:
        if self.loads is not None:
            self.loads.link_changed()

    # What may happen.

    def faults(self) -> list[Fault]:
        """What may go wrong now."""
        found: list[Fault] = []
        if self.ended is None:
            found.append(Fault("the engine aborts", self._abort))
        if self.link.up:
            found.append(
                Fault("the loader's daemon session ends", lambda: self.link.break_off("cut"))
            )
        found.append(Fault("the daemon forgets its leases", self.daemon.leases.clear))
        for reason in ("overloaded", "corrupt"):
            if self.daemon.next_failure != reason:
                found.append(Fault(f"a chunk fails: {reason}", self._failing(reason)))
        for relay in self.relays:
            link = self.relay_links[relay.name]
            if link.up:
                found.append(Fault(f"the link to {relay.name} breaks", self._breaking(link)))
            if relay.alive:
                found.append(Fault(f"{relay.name} dies", self._dying(relay, link)))
                if relay.link.up:
                    found.append(Fault(f"{relay.name} loses the daemon", self._losing(relay)))
        found += self.spoil_writes()
        return found

    def strike(self, fault: Fault) -> None:
        """Let a fault happen."""
        self.aborted = self.aborted or fault.happen == self._abort
        super().strike(fault)

    @property
    def horizon_s(self) -> float:
        """See StagePlay."""
        return math.inf if self.ended is None else DEADLINE_S + REST_S

    @property
    def events(self) -> Mapping[str, int]:
        """See StagePlay."""
        assert self.ended is not None
        return self.ended.events

    def _abort(self) -> None:
        assert self.loads is not None
        assert self.load is not None
        self.loads.end(self.load, MissReason.UNAVAILABLE, "aborted", "aborted")

    def _failing(self, reason: str) -> Callable[[], None]:
        return lambda: setattr(self.daemon, "next_failure", reason)

    @staticmethod
    def _breaking(link: StageRelayLink) -> Callable[[], None]:
        return lambda: link.lose("cut")

    @staticmethod
    def _losing(relay: StageRelay) -> Callable[[], None]:
        return lambda: relay.link.break_off("cut")

    @staticmethod
    def _dying(relay: StageRelay, link: StageRelayLink) -> Callable[[], None]:
        def die() -> None:
            relay.die()
            link.lose("died")

        return die

    # What must hold.

    def check(self) -> None:
        """After every event. Raises Violation."""
        load = self.load
        assert load is not None
        for relay in self.relays:
            if relay.alive and (wrong := relay.wrongly_held()):
                raise Violation(f"what is held is wrong: {wrong}")
        if self.ended is not None:
            if load.result is not self.ended:
                raise Violation("the load ended twice")
            if self.memory != CANARY * len(self.memory):
                raise Violation("a write landed in memory that is used again")
            return
        ready, valid = load.layers_ready, load.progress.blocks_valid
        for block in range(valid):
            if ready and self._layers(block, ready) != content(block)[: ready * LAYOUT.layer_bytes]:
                raise Violation(f"layer {ready - 1} of block {block} counts and is wrong")
        if load.result is not None:
            self._check_result(load.result)
            self.ended = load.result
            self.memory[:] = CANARY * len(self.memory)
        elif self.loop.time() > DEADLINE_S + 0.01:
            raise Violation("the load runs on past its deadline")

    def _layers(self, block: int, layers: int) -> bytes:
        start = block * LAYOUT.block_bytes
        return bytes(self.memory[start : start + layers * LAYOUT.layer_bytes])

    def _check_result(self, result: LoadResult) -> None:
        for block in range(result.blocks):
            if self._layers(block, LAYOUT.layers) != content(block):
                raise Violation(f"block {block} of the result is wrong")
        if result.blocks < self.config.blocks and result.miss not in UNASKED:
            raise Violation(f"the load is short without a reason that fits: {result}")
        if result.blocks < self.config.blocks and not (
            self.aborted or self.hurried or self.struck > 1
        ):
            raise Violation(f"one fault has cost blocks: {result}")
        if result.blocks == self.config.blocks and result.miss is not MissReason.NONE:
            raise Violation(f"the load is whole and says why it is not: {result}")

    def check_rest(self) -> None:
        """Once nothing can happen any more. Raises Violation."""
        if self.ended is None:
            raise Violation("nothing can happen any more, and the load has not ended")
        assert self.loads is not None
        for relay in self.relays:
            if relay.alive and (left := relay.settled()):
                raise Violation(f"left at {relay.name}: {left}")
        for transport in (self.storage, self.compute):
            if "windows=0" not in repr(transport.windows):
                raise Violation(f"left at the loader: {transport.windows!r}")
        if self.loads.loads or self.wire.flying:
            raise Violation(f"left: loads {self.loads.loads}, writes {self.wire.flying}")
        busy = [view.name for view in self.loads.views() if view.inflight_bytes]
        if busy:
            raise Violation(f"credit is lost on {busy}")
        if self.daemon.leases:
            raise Violation(f"leases {self.daemon.leases} were not released")

    def close(self) -> None:
        """Give the loop back."""
        for relay in self.relays:
            relay.alive = False
        assert self.loads is not None
        self.loop.perform(self.loads.close)
        self.loop.close()
