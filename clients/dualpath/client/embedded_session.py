"""An agent inside of the engine's own process, for programs without one on their node.

Owns the agent and the memory that it may use: regions are passed by reference, gRPC goes only to
daemons and relays. It serves nobody else, so it cannot relay for others.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from dualpath.agent.agent import Agent
from dualpath.agent.config import AgentConfig
from dualpath.agent.hand_off_spec import HandOffResult, HandOffSpec, LayerGate
from dualpath.agent.load_spec import LoadSpec, LoadUpdate, SaveSpec
from dualpath.agent.network import MakeTransport
from dualpath.agent.outcome import Lookup, SaveResult
from dualpath.client.memory import EngineMemory
from dualpath.kvstore.namespace import Namespace
from dualpath.proto.v1 import agent_pb2
from dualpath.transfer.region import Region

SETTLE_S_MAX = 3.0
"""How long a start waits for daemons and relays; absent ones are tried again later."""


class EmbeddedSession:
    """Implements AgentSession."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self._namespaces: dict[bytes, Namespace] = {}
        self._closed = False

    @classmethod
    async def start(
        cls,
        config: AgentConfig,
        *,
        make_storage: MakeTransport | None = None,
        make_compute: MakeTransport | None = None,
    ) -> EmbeddedSession:
        """Start an agent. The transports can be replaced (tests put faults there)."""
        agent = Agent(config, make_storage=make_storage, make_compute=make_compute)
        await agent.start(relaying=False)
        await agent.settled(SETTLE_S_MAX)
        return cls(agent)

    async def open_namespace(self, namespace: Namespace) -> bytes:
        """See AgentSession."""
        namespace_id = await self.agent.open_namespace(namespace)
        self._namespaces[namespace_id] = namespace
        return namespace_id

    def _remind(self, namespace_id: bytes) -> None:
        """Tell the agent again of a namespace that made way for others."""
        namespace = self._namespaces.get(namespace_id)
        if namespace is not None and namespace_id not in self.agent.namespaces:
            self.agent.namespaces.add(namespace)

    async def allocate(self, nbytes: int, *, behind_compute_link: bool) -> EngineMemory:
        """See AgentSession."""
        if "shm" in self.agent.storage:
            region = Region.memfd("dualpath-engine", nbytes)
        else:
            # Nobody else maps it, so it may have pages that shared memory does not get.
            region = Region.anonymous(nbytes)
        region.prefault()
        entry = self.agent.regions.add(region, behind_compute_link=behind_compute_link, owned=False)
        return EngineMemory(region, entry.handle, self.agent.regions.drop)

    async def lookup(self, namespace_id: bytes, hashes: Sequence[bytes]) -> Lookup:
        """See AgentSession."""
        self._remind(namespace_id)
        return await self.agent.loader.lookup(namespace_id, hashes)

    def load(self, spec: LoadSpec) -> AsyncIterator[LoadUpdate]:
        """See AgentSession."""
        self._remind(spec.namespace_id)
        return self.agent.loader.load(spec)

    async def abort(self, load_id: str) -> None:
        """See AgentSession."""
        self.agent.abort((load_id,))

    def receive(self, spec: LoadSpec) -> AsyncIterator[LoadUpdate]:
        """See AgentSession."""
        self._remind(spec.namespace_id)
        return self.agent.receiver.receive(spec)

    async def hand_off(self, spec: HandOffSpec, gate: LayerGate) -> HandOffResult:
        """See AgentSession."""
        self._remind(spec.namespace_id)
        return await self.agent.hand_offs.run(spec, gate)

    async def save(self, spec: SaveSpec) -> SaveResult:
        """See AgentSession."""
        self._remind(spec.namespace_id)
        return await self.agent.saver.save(spec)

    async def stats(self) -> agent_pb2.AgentStatsResponse:
        """See AgentSession."""
        return self.agent.stats()

    async def close(self) -> None:
        """See AgentSession."""
        if not self._closed:
            self._closed = True
            await self.agent.stop()
