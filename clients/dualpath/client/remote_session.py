"""A session with the node's agent in another process, over gRPC.

Owns the channel and the mapping of messages to values. The agent's loss is Unavailable; one that
was restarted is told again what it has to know, namespaces and memory, once it misses that.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import grpc
import grpc.aio
from dualpath.agent.hand_off_spec import HandOffResult, HandOffSpec, LayerGate
from dualpath.agent.load_spec import LoadSpec, LoadUpdate, SaveSpec
from dualpath.agent.outcome import LoadResult, LoadStarted, Lookup, MissReason, SaveResult, tiers_of
from dualpath.agent.places import Places
from dualpath.client.memory import EngineMemory
from dualpath.client.shared_memories import SharedMemories
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.packed_hashes import PackedHashes
from dualpath.kvstore.service.namespace_message import namespace_message
from dualpath.kvstore.store_api import ReserveStatus, SealStatus
from dualpath.proto.dial import open_channel
from dualpath.proto.status import translated
from dualpath.proto.tls import NO_TLS, Tls
from dualpath.proto.v1 import agent_pb2, agent_pb2_grpc, store_pb2
from dualpath.transfer.errors import DualPathError, InvalidRequest, Unavailable
from dualpath.transfer.region import Region

CALL_S_MAX = 30.0
"""Longest wait for the answer to a short call."""
GRACE_S = 10.0
"""How long after a deadline the agent may take to say how it ended."""
CONNECT_S_MAX = 5.0
_LACKS_MAX = 2
"""What a restarted agent may lack for a call: the namespace, then the memory."""
_LEFT_S_MIN = 0.001
Answer = TypeVar("Answer")


class RemoteSession:
    """Implements AgentSession."""

    def __init__(self, address: str, channel: grpc.aio.Channel, token: str) -> None:
        self._address = address
        self._channel = channel
        # The generated stub does not say that its calls are awaitable.
        self._stub: Any = agent_pb2_grpc.AgentStub(channel)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._namespaces: dict[bytes, Namespace] = {}
        self._memories: SharedMemories | None = None
        if address.startswith("unix:"):
            path = address.removeprefix("unix:").removeprefix("//")
            self._memories = SharedMemories(f"{path}.regions")

    @classmethod
    async def connect(cls, address: str, *, token: str, tls: Tls = NO_TLS) -> RemoteSession:
        """Reach the agent. Raises Unavailable within CONNECT_S_MAX."""
        channel = open_channel(address, tls)
        try:
            ready = await asyncio.wait_for(_connected(channel), CONNECT_S_MAX)
        except TimeoutError:
            ready = False
        if not ready:
            await channel.close()
            raise Unavailable(
                f"no agent answers at {address}: start `dualpath agent`, or correct the address"
            )
        return cls(address, channel, token)

    async def open_namespace(self, namespace: Namespace) -> bytes:
        """See AgentSession."""
        namespace_id = await self._say_namespace(namespace, CALL_S_MAX)
        self._namespaces[namespace_id] = namespace
        return namespace_id

    async def _say_namespace(self, namespace: Namespace, timeout_s: float) -> bytes:
        request = store_pb2.OpenNamespaceRequest(namespace=namespace_message(namespace))
        with translated("OpenNamespace at the agent"):
            answer = await self._stub.OpenNamespace(
                request, timeout=timeout_s, metadata=self._metadata
            )
        return bytes(answer.namespace_id)

    async def allocate(self, nbytes: int, *, behind_compute_link: bool) -> EngineMemory:
        """See AgentSession."""
        memories = self._memories
        if memories is None:
            raise InvalidRequest(
                f"memory can be shared over the agent's Unix socket only, not over "
                f"{self._address}; connect to unix:/path"
            )
        region = Region.memfd("dualpath-engine", nbytes)
        try:
            region.prefault()
            handle = await asyncio.get_running_loop().run_in_executor(
                None, lambda: memories.add(region, behind_compute_link=behind_compute_link)
            )
        except BaseException:
            region.close()
            raise
        return EngineMemory(region, handle, memories.drop, waits=True)

    async def _remind(
        self, error: InvalidRequest, namespace_id: bytes, region: int, current: int, left_s: float
    ) -> None:
        """Tell a restarted agent what it lacks. Raises `error` if that is not known here either,
        Unavailable if it cannot be told in `left_s` seconds."""
        namespace, memories = self._namespaces.get(namespace_id), self._memories
        try:
            async with asyncio.timeout(left_s):
                if error.reason == "namespace" and namespace is not None:
                    await self._say_namespace(namespace, left_s)
                    return
                if error.reason == "unknown_region" and memories is not None:
                    again = partial(memories.again, region, current)
                    if await asyncio.get_running_loop().run_in_executor(None, again):
                        return
        except TimeoutError:
            text = "the agent was restarted and could not be told of our memory in time"
            raise Unavailable(text) from error
        raise error

    async def _told(
        self,
        namespace_id: bytes,
        region: int,
        within_s: float,
        call: Callable[[int, float], Awaitable[Answer]],
    ) -> Answer:
        """What `call(region, seconds left)` answers, again if a restarted agent lacked something.
        `call` raises InvalidRequest before it does anything."""
        loop = asyncio.get_running_loop()
        end_at = loop.time() + within_s
        for lacks in range(_LACKS_MAX + 1):
            current = region if self._memories is None else self._memories.current(region)
            left_s = max(_LEFT_S_MIN, end_at - loop.time())
            try:
                return await call(current, left_s)
            except InvalidRequest as error:
                if lacks == _LACKS_MAX:
                    raise
                await self._remind(error, namespace_id, region, current, left_s)
        raise AssertionError("unreachable")

    async def lookup(self, namespace_id: bytes, hashes: Sequence[bytes]) -> Lookup:
        """See AgentSession."""
        packed = PackedHashes.of(hashes)
        request = store_pb2.LookupRequest(
            namespace_id=namespace_id, hashes=bytes(packed.data), hash_bytes=packed.hash_bytes
        )

        async def ask(_region: int, left_s: float) -> store_pb2.LookupResponse:
            with translated("Lookup at the agent"):
                answer = await self._stub.Lookup(request, timeout=left_s, metadata=self._metadata)
            assert isinstance(answer, store_pb2.LookupResponse)
            return answer

        answer = await self._told(namespace_id, 0, CALL_S_MAX, ask)
        return Lookup(
            answer.blocks, tiers_of(answer), MissReason.of_proto(answer.miss), answer.detail
        )

    async def load(self, spec: LoadSpec) -> AsyncIterator[LoadUpdate]:
        """See AgentSession."""
        async for update in self._updates("Load at the agent", self._stub.Load, spec):
            yield update

    async def receive(self, spec: LoadSpec) -> AsyncIterator[LoadUpdate]:
        """See AgentSession."""
        async for update in self._updates("Receive at the agent", self._stub.Receive, spec):
            yield update

    async def _updates(self, what: str, method: Any, spec: LoadSpec) -> AsyncIterator[LoadUpdate]:
        async def begin(region: int, left_s: float) -> tuple[Any, Any]:
            request = _load_request(replace(spec, region=region, deadline_s=left_s))
            with translated(what):
                call = method(request, timeout=left_s + GRACE_S, metadata=self._metadata)
                return call, await call.read()

        call, event = await self._told(spec.namespace_id, spec.region, spec.deadline_s, begin)
        try:
            while event is not grpc.aio.EOF:
                yield _update(event, len(spec.hashes))
                with translated(what):
                    event = await call.read()
        finally:
            call.cancel()  # of no effect once it has ended

    async def hand_off(self, spec: HandOffSpec, gate: LayerGate) -> HandOffResult:
        """See AgentSession. An agent that is gone, or too old, is a reason as any other."""

        async def ask(region: int, left_s: float) -> agent_pb2.HandOffResponse:
            requests = _hand_off_requests(replace(spec, region=region, deadline_s=left_s), gate)
            with translated("HandOff at the agent"):
                answer = await self._stub.HandOff(
                    requests, timeout=left_s + GRACE_S, metadata=self._metadata
                )
            assert isinstance(answer, agent_pb2.HandOffResponse)
            return answer

        try:
            answer = await self._told(spec.namespace_id, spec.region, spec.deadline_s, ask)
        except InvalidRequest:
            raise
        except DualPathError as error:
            return HandOffResult(0, 0, 0, error.reason, str(error))
        finally:
            gate.close()  # so that nobody waits for more to say
        return HandOffResult(
            blocks=answer.blocks,
            sent_bytes=answer.sent_bytes,
            held_bytes=answer.held_bytes,
            reason=answer.reason,
            detail=answer.detail,
            elapsed_s=answer.elapsed_s,
        )

    async def abort(self, load_id: str) -> None:
        """See AgentSession."""
        with translated("Abort at the agent"):
            await self._stub.Abort(
                agent_pb2.AbortRequest(load_id=[load_id]),
                timeout=CALL_S_MAX,
                metadata=self._metadata,
            )

    async def save(self, spec: SaveSpec) -> SaveResult:
        """See AgentSession."""

        async def ask(region: int, left_s: float) -> agent_pb2.SaveResponse:
            request = agent_pb2.SaveRequest(
                namespace_id=spec.namespace_id,
                hash=spec.hashes,
                parent=spec.parents,
                places=_places(region, spec.places),
                durable=spec.durable,
                deadline_ms=max(1, round(left_s * 1000)),
            )
            with translated("Save at the agent"):
                answer = await self._stub.Save(
                    request, timeout=left_s + GRACE_S, metadata=self._metadata
                )
            assert isinstance(answer, agent_pb2.SaveResponse)
            return answer

        answer = await self._told(spec.namespace_id, spec.region, spec.deadline_s, ask)
        return SaveResult(
            reserved=tuple(_RESERVE.get(status) for status in answer.reserved),
            sealed=tuple(_SEAL.get(status) for status in answer.status),
            reason=answer.reason,
            detail=answer.detail,
            events=dict(answer.events),
        )

    async def stats(self) -> agent_pb2.AgentStatsResponse:
        """See AgentSession."""
        with translated("Stats at the agent"):
            answer = await self._stub.Stats(
                agent_pb2.AgentStatsRequest(), timeout=CALL_S_MAX, metadata=self._metadata
            )
        assert isinstance(answer, agent_pb2.AgentStatsResponse)
        return answer

    async def close(self) -> None:
        """See AgentSession."""
        if self._memories is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._memories.close)
        await self._channel.close()


async def _connected(channel: grpc.aio.Channel) -> bool:
    """Whether the first attempt to connect succeeds."""
    state = channel.get_state(try_to_connect=True)
    while state is not grpc.ChannelConnectivity.READY:
        if state in (
            grpc.ChannelConnectivity.TRANSIENT_FAILURE,
            grpc.ChannelConnectivity.SHUTDOWN,
        ):
            return False
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)
    return True


_RESERVE = {
    int(store_pb2.ReserveStatus.Value(f"RESERVE_STATUS_{status.name}")): status
    for status in ReserveStatus
}
_SEAL = {
    int(store_pb2.SealStatus.Value(f"SEAL_STATUS_{status.name}")): status for status in SealStatus
}


def _load_request(spec: LoadSpec) -> agent_pb2.LoadRequest:
    return agent_pb2.LoadRequest(
        load_id=spec.load_id,
        namespace_id=spec.namespace_id,
        hash=spec.hashes,
        places=_places(spec.region, spec.places),
        deadline_ms=max(1, round(spec.deadline_s * 1000)),
        policy=spec.policy,
        decode_peer=spec.decode_peer,
        path=spec.paths,
        request=spec.request,
        recompute_tokens_per_s=spec.recompute_tokens_per_s,
        direct_share=spec.direct_share,
    )


async def _hand_off_requests(
    spec: HandOffSpec, gate: LayerGate
) -> AsyncIterator[agent_pb2.HandOffRequest]:
    """What is handed off, then how far the engine is, until it is over."""
    layers = gate.layers
    yield agent_pb2.HandOffRequest(
        request=spec.request,
        decode_peer=spec.decode_peer,
        namespace_id=spec.namespace_id,
        hash=spec.hashes,
        places=_places(spec.region, spec.places),
        deadline_ms=max(1, round(spec.deadline_s * 1000)),
        layers_done=layers,
    )
    while not gate.closed:
        await gate.more(layers)
        if gate.layers > layers:
            layers = gate.layers
            yield agent_pb2.HandOffRequest(layers_done=layers)
    if gate.aborted:
        yield agent_pb2.HandOffRequest(abort=True)


def _places(region: int, places: Places) -> agent_pb2.BlockPlaces:
    return agent_pb2.BlockPlaces(
        region=region,
        layer_stride_bytes=places.layer_stride_bytes,
        base_bytes=places.base_bytes,
    )


def _update(event: agent_pb2.LoadEvent, requested: int) -> LoadUpdate:
    miss = MissReason.of_proto(event.miss)
    started = LoadStarted(event.hit_blocks, miss, event.detail) if event.started else None
    result = None
    if event.done:
        shares = {share.path: share.bytes for share in event.share}
        result = LoadResult(
            blocks=event.blocks_valid,
            requested_blocks=requested,
            miss=miss,
            detail=event.detail,
            shares=shares,
            events=dict(event.events),
            elapsed_s=event.elapsed_s,
            lookup_s=event.lookup_s,
            nbytes=event.nbytes,
            held_bytes={share.path: share.held_bytes for share in event.share if share.held_bytes},
        )
    return LoadUpdate(event.layers_ready, event.blocks_valid, started, result)
