"""The engine's library: save blocks, look prefixes up, load them layer by layer.

Owns the choice between an agent in another process (`connect`) and one inside of this process
(`embedded`), and the checks that need no agent. Belongs to one event loop. Whatever fails on the
way is a miss or a shorter prefix with a reason; only the caller's mistakes (InvalidRequest) and
the loss of the agent itself (Unavailable) are raised.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Self

from dualpath.agent.config import AgentConfig
from dualpath.agent.load_spec import LoadSpec, SaveSpec, check_hashes
from dualpath.agent.outcome import Lookup, SaveResult
from dualpath.agent.places import Places
from dualpath.client.agent_session import AgentSession
from dualpath.client.load import Load
from dualpath.client.memory import EngineMemory
from dualpath.kvstore.namespace import Namespace
from dualpath.proto.tls import NO_TLS, Tls
from dualpath.proto.v1 import agent_pb2


class KVClient:
    """A session of an engine with its agent. An async context manager that closes it."""

    def __init__(self, session: AgentSession) -> None:
        self._session = session

    @classmethod
    async def connect(cls, agent: str, *, token: str = "", tls: Tls = NO_TLS) -> KVClient:
        """Use the agent at `agent`: "unix:/path" (the usual case) or "host:port", with `tls` files
        over TLS.

        Only a Unix socket can share memory, so `allocate` needs one. Raises Unavailable.
        """
        from dualpath.client.remote_session import RemoteSession  # noqa: PLC0415 - gRPC is slow

        return cls(await RemoteSession.connect(agent, token=token, tls=tls))

    @classmethod
    async def embedded(cls, config: AgentConfig) -> KVClient:
        """Run an agent inside of this process; it serves nobody else."""
        from dualpath.client.embedded_session import EmbeddedSession  # noqa: PLC0415

        return cls(await EmbeddedSession.start(config))

    async def open_namespace(self, namespace: Namespace) -> bytes:
        """Make the namespace known; return its id for all other calls."""
        return await self._session.open_namespace(namespace)

    async def allocate(self, nbytes: int, *, behind_compute_link: bool = False) -> EngineMemory:
        """Memory for loads and saves. With `behind_compute_link` it stands for memory that only
        the compute network reaches (a GPU's): every loaded byte crosses that link."""
        return await self._session.allocate(nbytes, behind_compute_link=behind_compute_link)

    async def lookup(self, namespace_id: bytes, hashes: Sequence[bytes]) -> Lookup:
        """Longest stored prefix of the chain `hashes`; takes no lease."""
        check_hashes(tuple(hashes))
        return await self._session.lookup(namespace_id, hashes)

    async def load(
        self,
        namespace_id: bytes,
        hashes: Sequence[bytes],
        memory: EngineMemory,
        places: Places,
        *,
        deadline_s: float,
        policy: str = "",
        decode_peer: str = "",
        paths: Sequence[str] = (),
        load_id: str = "",
    ) -> Load:
        """Start to load the longest stored prefix into `memory`; see `Load`.

        `load_id` must be unique among the agent's running loads; "" makes one up.
        """
        spec = load_spec(
            namespace_id,
            hashes,
            memory,
            places,
            deadline_s=deadline_s,
            policy=policy,
            decode_peer=decode_peer,
            paths=paths,
            load_id=load_id,
        )
        return self.begin(spec)

    def begin(self, spec: LoadSpec, on_end: Callable[[Load], None] | None = None) -> Load:
        """Start a load that was checked by `load_spec`; `on_end` is called in the loop when it has
        ended."""
        return Load(spec.load_id, self._session.load(spec), self._session.abort, on_end)

    async def save(
        self,
        namespace_id: bytes,
        hashes: Sequence[bytes],
        parents: Sequence[bytes],
        memory: EngineMemory,
        places: Places,
        *,
        durable: bool = True,
        deadline_s: float,
    ) -> SaveResult:
        """Store blocks; `parents[i]` precedes `hashes[i]` in its chain (b"": it is the first).

        The memory must not change until this returns. With `durable`, sealed blocks survive a
        loss of power.
        """
        spec = SaveSpec(
            namespace_id=namespace_id,
            hashes=tuple(hashes),
            parents=tuple(parents),
            region=memory.handle,
            places=places,
            durable=durable,
            deadline_s=deadline_s,
        )
        return await self._session.save(spec)

    async def stats(self) -> agent_pb2.AgentStatsResponse:
        """Counters and gauges of the agent."""
        return await self._session.stats()

    async def close(self) -> None:
        """Abort running loads and end the session. Idempotent."""
        await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()


def load_spec(
    namespace_id: bytes,
    hashes: Sequence[bytes],
    memory: EngineMemory,
    places: Places,
    *,
    deadline_s: float,
    policy: str,
    decode_peer: str,
    paths: Sequence[str],
    load_id: str,
) -> LoadSpec:
    """The arguments of `KVClient.load`, checked; in any thread. Raises InvalidRequest."""
    return LoadSpec(
        load_id=load_id or secrets.token_hex(8),
        namespace_id=namespace_id,
        hashes=tuple(hashes),
        region=memory.handle,
        places=places,
        deadline_s=deadline_s,
        policy=policy,
        decode_peer=decode_peer,
        paths=tuple(paths),
    )
