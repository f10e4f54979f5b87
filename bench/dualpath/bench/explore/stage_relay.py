"""A decode node that relays, and the loader's session with it.

Owns the process of the relay: the real `Relay` with its staging and its own session at the daemon,
which can die and come back. `StageRelayLink` is the loader's end: what loads use of a RelayLink.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.holdings import Holdings
from dualpath.agent.network import Network
from dualpath.agent.open_grants import OnProgress
from dualpath.agent.relay import Relay
from dualpath.agent.relay_job import FAILURE_OF_REASON, Source
from dualpath.agent.staging import SLAB_BYTES, Staging
from dualpath.bench.explore.stage_daemon import StageDaemon, StageDaemonLink
from dualpath.bench.explore.stage_transport import StageNetwork, StageTransport
from dualpath.kvstore.checksum import of_slices
from dualpath.proto.v1 import agent_pb2, common_pb2
from dualpath.transfer.errors import DualPathError, PathDown
from dualpath.transfer.region import Region

HOLD_S = 5.0
"""How long a decode node keeps what it retains for a request that nobody asks for."""
_memory: dict[str, Region] = {}
"""Staging and holdings of each relay, the same in all runs: making them costs more than a run."""


class StageRelay:
    """The relay's process. `on_daemon_change` is called when its session at the daemon changes."""

    def __init__(
        self, name: str, daemon: StageDaemon, on_daemon_change: Callable[[], None]
    ) -> None:
        self.name = name
        self.daemon = daemon
        self.alive = False
        self.attachments = 0
        self._on_daemon_change = on_daemon_change
        self.start()

    def start(self) -> None:
        """A new process, with nothing of the old one."""
        loop, wire = self.daemon.loop, self.daemon.wire
        self.compute = StageTransport(f"{self.name}.compute", wire)
        self.storage = StageTransport(f"{self.name}.storage", wire)
        self.staging = Staging(_region(f"staging of {self.name}"))
        self.holdings = Holdings(_region(f"holdings of {self.name}"), HOLD_S)
        self.relay = Relay(
            self.staging,
            self.holdings,
            cast(Network, StageNetwork(self.compute)),
            loop,
            lambda: None,
        )
        self.alive = True
        self.link = StageDaemonLink(
            self.name, self.daemon, StageNetwork(self.storage), self._daemon_changed
        )

    def _daemon_changed(self, link: StageDaemonLink) -> None:
        if not self.alive:
            return
        if not link.up:
            self.relay.daemon_lost(cast(DaemonLink, link), "lost")
        self._on_daemon_change()

    def die(self) -> None:
        """The process ends: its memory, its connections, what it was about to say."""
        self.alive = False
        if self.relay._sweep is not None:
            self.relay._sweep.cancel()
        self.relay._reports.close()
        self.relay._held.close()
        self.link.up = False
        self.daemon.end_session(self.name)
        self.daemon.agenda.drop(f"{self.name}>")
        self.daemon.agenda.drop(f"{self.name} comes back")
        self.daemon.wire.cut(self.daemon.transport, self.storage)

    def wrongly_held(self) -> str:
        """A chunk that is held and whose bytes are not those of its name; "" if there is none."""
        view = self.holdings.region.view
        for name, chunk in self.holdings._chunks.items():
            if chunk.held and of_slices(view, chunk.slot.slices) != name[3]:
                return f"block {name[1].hex()} at {self.name}"
        return ""

    def settled(self) -> str:
        """Whether nothing is left of any load; else what is."""
        relay = self.relay
        left = []
        if self.staging.used_bytes:
            left.append(f"{self.staging.used_bytes} bytes of staging")
        if relay.read_bytes:
            left.append(f"{relay.read_bytes} bytes to read")
        for requester in relay._requesters.values():
            counts = (
                len(requester.grants),
                len(requester.queue),
                requester.waiting_bytes,
                requester.staged_bytes,
                requester.reading_bytes,
            )
            if any(counts):
                left.append(f"of requester {requester.peer}: {counts}")
        if reading := len(list(relay._upstream.reading())):
            left.append(f"{reading} chunks being read")
        if self.holdings.in_use or self.holdings.requests:
            left.append(f"{self.holdings.in_use} users, {self.holdings.requests} requests")
        return ", ".join(left)


def _region(name: str) -> Region:
    if name not in _memory:
        _memory[name] = Region.of(bytearray(2 * SLAB_BYTES))
    return _memory[name]


class StageRelayLink:
    """The loader's session at a relay; see the module docstring."""

    attached = None

    def __init__(
        self,
        caller: str,
        relay: StageRelay,
        network: StageNetwork,
        on_change: Callable[[], None],
    ) -> None:
        self.name = relay.name
        self.holds = True
        self.relay = relay
        self.up = False
        self.link = self
        self._caller = caller
        self._network = network
        self._on_change = on_change
        self._grants: dict[int, OnProgress] = {}
        self._next_grant = 1
        self.rise()

    def rise(self) -> None:
        """A session, with its connection; the relay's process is started if there is none."""
        relay = self.relay
        if not relay.alive:
            relay.start()
        relay.attachments += 1
        self._peer = f"{self._caller}@{relay.attachments}"
        relay.compute.links[self._peer] = self._network.transport
        self._network.transport.links[self.name] = relay.compute
        self._requester = relay.relay.open(self._caller, self._peer)
        self.up = True
        self._on_change()

    def lose(self, reason: str) -> None:
        """The session ends, at both sides; another one comes some time later."""
        del reason
        if not self.up:
            return
        self.up = False
        self._grants.clear()
        agenda, relay = self.relay.daemon.agenda, self.relay
        agenda.drop(f"{self._caller}>{self.name}")
        agenda.drop(f"{self.name}>{self._caller}")
        relay.daemon.wire.cut(relay.compute, self._network.transport)
        if relay.alive:
            relay.relay.close(self._requester)
        self._on_change()
        agenda.add(
            f"{self._caller} reaches {self.name}",
            f"{self._caller} reaches {self.name} again",
            self.rise,
        )

    def peer_id_at(self, daemon: str) -> str:
        """See RelayLink.peer_id_at."""
        del daemon
        return self.relay.link.peer_id if self.up and self.relay.link.up else ""

    def submit(
        self,
        daemon: str,
        ticket: bytes,
        grant: common_pb2.ChunkGrant,
        on_progress: OnProgress,
        known: agent_pb2.KnownChunks | None = None,
    ) -> int:
        """See RelayLink.submit."""
        if not self.peer_id_at(daemon):
            raise PathDown(f"relay {self.name} has no session at the daemon")
        grant.grant_id = self._next_grant
        self._next_grant += 1
        self._grants[grant.grant_id] = on_progress
        sent = common_pb2.ChunkGrant()
        sent.CopyFrom(grant)
        self.relay.daemon.agenda.add(
            f"{self._caller}>{self.name}",
            f"{self._caller} asks {self.name} for blocks {list(sent.block)}",
            lambda: self._asked(sent, ticket, known),
        )
        return grant.grant_id

    def cancel(self, grant_ids: Iterable[int]) -> None:
        """See RelayLink.cancel."""
        known = [each for each in grant_ids if self._grants.pop(each, None)]
        if known and self.up:
            self.relay.daemon.agenda.add(
                f"{self._caller}>{self.name}",
                f"{self._caller} cancels grants {known} at {self.name}",
                lambda: self.relay.relay.cancel(self._requester, known),
            )

    def _asked(
        self,
        grant: common_pb2.ChunkGrant,
        ticket: bytes,
        known: agent_pb2.KnownChunks | None,
    ) -> None:
        source = Source(cast(DaemonLink, self.relay.link), ticket=ticket)
        try:
            self.relay.relay.submit(self._requester, source, grant, self._tell, known)
        except DualPathError as error:
            failure = FAILURE_OF_REASON.get(error.reason, common_pb2.CHUNK_FAILURE_INVALID)
            self._tell(
                common_pb2.GrantProgress(
                    grant_id=grant.grant_id,
                    done=True,
                    failed_tag=grant.tag,
                    failure=[failure] * len(grant.tag),
                    detail=str(error),
                )
            )

    def _tell(self, progress: common_pb2.GrantProgress) -> None:
        if not self.up:
            return

        def heard() -> None:
            on_progress = self._grants.get(progress.grant_id)
            if on_progress is not None:
                if progress.done:
                    del self._grants[progress.grant_id]
                on_progress(progress)

        self.relay.daemon.agenda.add(
            f"{self.name}>{self._caller}",
            f"{self._caller} hears of grant {progress.grant_id} at {self.name}"
            + (f": {progress.detail}" if progress.failed_tag else ""),
            heard,
        )
