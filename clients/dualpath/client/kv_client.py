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
from dualpath.agent.hand_off_spec import HandOffSpec, check_request
from dualpath.agent.load_spec import LoadSpec, SaveSpec, check_hashes
from dualpath.agent.outcome import Lookup, SaveResult
from dualpath.agent.places import Places
from dualpath.client.agent_session import AgentSession
from dualpath.client.hand_off import HandOff
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
        request: str = "",
        recompute_tokens_per_s: float = 0.0,
        direct_share: float | None = None,
    ) -> Load:
        """Start to load the longest stored prefix into `memory`; see `Load`.

        With a `request` the agent `decode_peer` keeps what it relays, for a later `hand_off`.
        `load_id` must be unique among the agent's running loads; "" makes one up. Who says how many
        tokens a second it would compute (`recompute_tokens_per_s`) does not wait for a load that is
        slower: it is refused at once, or cut to the blocks that come sooner, miss `recompute`.

        Who has a scheduler's assignment gives its read shares instead of a `policy`: this node's
        storage links read `direct_share` of the bytes (0 to 1), those of `decode_peer` the rest, to
        the nearest chunk. If one of the two fails, or this agent has no path through that peer, the
        other reads all, and the result's events say why (`fallback:REASON`).
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
            request=request,
            recompute_tokens_per_s=recompute_tokens_per_s,
            direct_share=direct_share,
        )
        return self.begin(spec)

    async def hand_off(
        self,
        request: str,
        decode_peer: str,
        namespace_id: bytes,
        hashes: Sequence[bytes],
        memory: EngineMemory,
        places: Places,
        *,
        deadline_s: float,
    ) -> HandOff:
        """Give the KV of a prompt to the decode engine of `request`, whose agent is `decode_peer`;
        see `HandOff`.

        All blocks of the prompt, those that were loaded as well; the last one may be a partial
        block under a name of its own. Only what the decode side lacks is sent, layer by layer, as
        `HandOff.layer_done` says that they are final. The memory must not change in them until the
        end.
        """
        spec = hand_off_spec(
            request, decode_peer, namespace_id, hashes, memory, places, deadline_s=deadline_s
        )
        return self.begin_hand_off(spec)

    def begin_hand_off(
        self, spec: HandOffSpec, on_end: Callable[[HandOff], None] | None = None
    ) -> HandOff:
        """Start a hand-off that was checked by `hand_off_spec`; `on_end` as in `begin`."""
        return HandOff(spec, self._session.hand_off, on_end)

    async def receive(
        self,
        request: str,
        namespace_id: bytes,
        hashes: Sequence[bytes],
        memory: EngineMemory,
        places: Places,
        *,
        deadline_s: float,
    ) -> Load:
        """Bring what prefill hands off for `request` into this decode engine's `memory`.

        Before, while or after the hand-off runs; to be awaited as a load, layer by layer. Where the
        prefill side fails, what is lacking is loaded as far as it is stored; if that is not all,
        the prefix is shorter, with the reason. Afterwards this node keeps nothing for the request
        but as a cache.
        """
        spec = receive_spec(request, namespace_id, hashes, memory, places, deadline_s=deadline_s)
        return self.begin_receive(spec)

    def begin_receive(self, spec: LoadSpec, on_end: Callable[[Load], None] | None = None) -> Load:
        """Start a receive that was checked by `receive_spec`; `on_end` as in `begin`."""
        return Load(spec.load_id, self._session.receive(spec), self._session.abort, on_end)

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
    request: str = "",
    recompute_tokens_per_s: float = 0.0,
    direct_share: float | None = None,
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
        request=request,
        recompute_tokens_per_s=recompute_tokens_per_s,
        direct_share=direct_share,
    )


def hand_off_spec(
    request: str,
    decode_peer: str,
    namespace_id: bytes,
    hashes: Sequence[bytes],
    memory: EngineMemory,
    places: Places,
    *,
    deadline_s: float,
) -> HandOffSpec:
    """The arguments of `KVClient.hand_off`, checked; in any thread. Raises InvalidRequest."""
    return HandOffSpec(
        request=request,
        decode_peer=decode_peer,
        namespace_id=namespace_id,
        hashes=tuple(hashes),
        region=memory.handle,
        places=places,
        deadline_s=deadline_s,
    )


def receive_spec(
    request: str,
    namespace_id: bytes,
    hashes: Sequence[bytes],
    memory: EngineMemory,
    places: Places,
    *,
    deadline_s: float,
) -> LoadSpec:
    """The arguments of `KVClient.receive`, checked; in any thread. Raises InvalidRequest."""
    check_request(request)
    return LoadSpec(
        load_id=secrets.token_hex(8),
        namespace_id=namespace_id,
        hashes=tuple(hashes),
        region=memory.handle,
        places=places,
        deadline_s=deadline_s,
        request=request,
    )
