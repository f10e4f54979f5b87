"""Our session at one agent that relays for us.

Owns the attachment (the relay will write into our windows over the compute network) and the
Relay stream with its grants. Guarantees that every grant handed to `submit` ends: by progress
with `done`, or by the loss of the link. Knows, for each daemon, the relay's own attachment there,
which tickets must name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import grpc.aio
from dualpath.agent.config import RelayAddress
from dualpath.agent.network import Network
from dualpath.agent.open_grants import OnProgress, OpenGrants
from dualpath.agent.steady_link import Metadata, SteadyLink
from dualpath.proto.tls import NO_TLS, Tls
from dualpath.proto.v1 import agent_pb2, agent_pb2_grpc, common_pb2
from dualpath.transfer.errors import InvalidRequest, PathDown


class RelayLink:
    """See the module docstring. `on_change(link)` follows each rise, each loss and each change
    of a daemon's state at the relay; `on_queue(link, bytes)` what waits there for others."""

    def __init__(
        self,
        relay: RelayAddress,
        daemons: Sequence[str],
        networks: Mapping[str, Network],
        on_change: Callable[[RelayLink], None],
        on_queue: Callable[[RelayLink, int], None],
        *,
        name: str,
        token: str,
        tls: Tls = NO_TLS,
        timeout_s: float,
        pause_s_max: float,
        rail: int = 0,
    ) -> None:
        if not daemons:
            raise InvalidRequest("a relay needs a daemon to read from: configure one")
        self.name = relay.name
        self.address = relay
        self.rail = rail
        """By which of the relay's storage links it reads for us here."""
        self.rails = 1
        """How many it has, as far as it has said."""
        self.holds = False
        """Whether it keeps chunks, and is to be told what those of a grant are."""
        self._daemons = tuple(daemons)
        self._on_change = on_change
        self._on_queue = on_queue
        self._grants = OpenGrants()
        self._peer_ids: dict[str, str] = {}
        self._stub: Any = None
        self.link: SteadyLink[agent_pb2.RelayRequest, agent_pb2.RelayResponse] = SteadyLink(
            f"relay {relay.name}:{rail}" if rail else f"relay {relay.name}",
            relay.address,
            self,
            networks,
            name=name,
            token=token,
            tls=tls,
            timeout_s=timeout_s,
            pause_s_max=pause_s_max,
            rail=rail,
        )

    def peer_id_at(self, daemon: str) -> str:
        """The relay's attachment at a daemon, "" while it or the link is away."""
        return self._peer_ids.get(daemon, "") if self.link.up else ""

    # The dialect of SteadyLink.

    def bind(self, channel: grpc.aio.Channel) -> None:
        """Make the stub."""
        self._stub = agent_pb2_grpc.AgentStub(channel)

    async def attach(
        self, request: common_pb2.AttachRequest, *, timeout: float, metadata: Metadata
    ) -> common_pb2.AttachResponse:
        """Call Attach."""
        answer = await self._stub.Attach(request, timeout=timeout, metadata=metadata)
        assert isinstance(answer, common_pb2.AttachResponse)
        return answer

    def open_stream(self, *, metadata: Metadata) -> Any:
        """Open Relay."""
        return self._stub.Relay(metadata=metadata)

    def hello(self, attached: common_pb2.AttachResponse) -> agent_pb2.RelayRequest:
        """The first message names our attachment and a daemon."""
        return agent_pb2.RelayRequest(session=attached.session, daemon=self._daemons[0])

    async def prepare(
        self, attached: common_pb2.AttachResponse, first: agent_pb2.RelayResponse
    ) -> None:
        """Note the relay's attachment at the first daemon."""
        self._peer_ids = {first.daemon or self._daemons[0]: first.daemon_peer_id}
        self.holds = first.holds
        self.rails = max(self.rails, first.rails)

    def on_up(self) -> None:
        """Ask for the other daemons and tell the owner."""
        for daemon in self._daemons[1:]:
            self.link.send(agent_pb2.RelayRequest(daemon=daemon))
        self._on_change(self)

    def on_response(self, response: agent_pb2.RelayResponse) -> None:
        """Progress of grants, or news of a daemon."""
        if response.daemon:
            self._peer_ids[response.daemon] = response.daemon_peer_id
            self.rails = max(self.rails, response.rails)
            self._on_change(self)
        for progress in response.progress:
            self._on_queue(self, progress.queue_bytes)
            self._grants.tell(progress)

    def on_down(self, reason: str) -> None:
        """All grants are over."""
        del reason
        self._peer_ids.clear()
        self._grants.clear()
        self._on_change(self)

    def take(self) -> Any:
        """Open a Take stream for a hand-off; only while the link is up."""
        return self._stub.Take(metadata=self.link.metadata)

    # Grants.

    def submit(
        self,
        daemon: str,
        ticket: bytes,
        grant: common_pb2.ChunkGrant,
        on_progress: OnProgress,
        known: agent_pb2.KnownChunks | None = None,
    ) -> int:
        """Ask the relay for chunks, `known` if it `holds`; returns the grant's id. Raises
        PathDown."""
        if not self.peer_id_at(daemon):
            raise PathDown(f"relay {self.name} has no session at daemon {daemon}")
        grant.grant_id = self._grants.next_id
        self.link.send(
            agent_pb2.RelayRequest(daemon=daemon, ticket=ticket, grant=grant, known=known)
        )
        return self._grants.add(on_progress)

    def cancel(self, grant_ids: Iterable[int]) -> None:
        """Spare the relay work that nobody wants any more; no answer is awaited."""
        known = self._grants.forget(grant_ids)
        if known and self.link.up:
            self.link.send(agent_pb2.RelayRequest(cancel_grant_id=known))
