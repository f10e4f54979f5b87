"""The port between `KVClient` and an agent, in another process or in this one.

Contract: every method belongs to the event loop in which the session was made. Failures of the
network, of daemons or of peers are values (a miss with its reason, a shorter prefix); only
InvalidRequest, and Unavailable when the agent itself is gone, are raised.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from dualpath.agent.hand_off_spec import HandOffResult, HandOffSpec, LayerGate
from dualpath.agent.load_spec import LoadSpec, LoadUpdate, SaveSpec
from dualpath.agent.outcome import Lookup, SaveResult
from dualpath.client.memory import EngineMemory
from dualpath.kvstore.namespace import Namespace
from dualpath.proto.v1 import agent_pb2


class AgentSession(Protocol):
    """See the module docstring."""

    async def open_namespace(self, namespace: Namespace) -> bytes:
        """Make the namespace known; return its id."""

    async def allocate(self, nbytes: int, *, behind_compute_link: bool) -> EngineMemory:
        """Memory that the agent may write loads into and read saves from."""

    async def lookup(self, namespace_id: bytes, hashes: Sequence[bytes]) -> Lookup:
        """Longest stored prefix, without a lease."""

    def load(self, spec: LoadSpec) -> AsyncIterator[LoadUpdate]:
        """Run a load; the first update has `started`, the last `result`."""

    def receive(self, spec: LoadSpec) -> AsyncIterator[LoadUpdate]:
        """Run a receive; as `load`."""

    async def hand_off(self, spec: HandOffSpec, gate: LayerGate) -> HandOffResult:
        """Hand blocks over as the gate opens. Nothing reads the memory any more when it returns."""

    async def abort(self, load_id: str) -> None:
        """End a load or a receive; when it returns, nothing more is written into its memory."""

    async def save(self, spec: SaveSpec) -> SaveResult:
        """Store blocks; the memory must not change until it returns."""

    async def stats(self) -> agent_pb2.AgentStatsResponse:
        """Counters of the agent."""

    async def close(self) -> None:
        """End the session: loads are aborted, memory is given back. Idempotent."""
