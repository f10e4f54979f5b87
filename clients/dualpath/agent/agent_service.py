"""The agent's gRPC service: messages <-> values, nothing else.

Every handler checks its request here or in the value that it makes; errors become statuses in
`dualpath.proto.status`, for all calls alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from dualpath.agent.agent import Agent
from dualpath.agent.hand_off_spec import HandOffSpec, LayerGate
from dualpath.agent.load_spec import LoadSpec, LoadUpdate, SaveSpec
from dualpath.agent.outcome import LoadResult, SaveResult
from dualpath.agent.places import Places
from dualpath.kvstore.packed_hashes import PackedHashes
from dualpath.kvstore.service.auth import Caller, caller_of_call
from dualpath.kvstore.service.namespace_message import namespace_of
from dualpath.kvstore.store_api import TIERS
from dualpath.proto.first_message import first_message
from dualpath.proto.v1 import agent_pb2, agent_pb2_grpc, common_pb2, store_pb2
from dualpath.transfer.errors import InvalidRequest, PermissionDenied


class AgentService(agent_pb2_grpc.AgentServicer):
    """See the module docstring."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def _check_engine(self) -> None:
        """Engines share this node, and memory with it: whoever dials in over the network is none.
        Raises PermissionDenied."""
        if not (self._agent.config.engine_tcp or caller_of_call().local_socket):
            raise PermissionDenied(
                "engines are served on this agent's Unix socket only: connect to unix:/path, or "
                "set engine-tcp on a network where every peer may do what an engine may",
                reason="engine_socket",
            )

    # The handlers are coroutines; the stubs allow for both kinds and say neither.

    async def OpenNamespace(
        self, request: store_pb2.OpenNamespaceRequest, context: Any
    ) -> store_pb2.OpenNamespaceResponse:
        """Make a namespace known."""
        self._check_engine()
        namespace_id = await self._agent.open_namespace(namespace_of(request.namespace))
        return store_pb2.OpenNamespaceResponse(namespace_id=namespace_id)

    async def Lookup(
        self, request: store_pb2.LookupRequest, context: Any
    ) -> store_pb2.LookupResponse:
        """Longest stored prefix, without a lease."""
        self._check_engine()
        hashes = PackedHashes.checked(request.hashes, request.hash_bytes)
        hit = await self._agent.loader.lookup(request.namespace_id, tuple(hashes))
        return store_pb2.LookupResponse(
            blocks=hit.blocks,
            tiers=bytes(TIERS.index(tier) for tier in hit.tiers),
            miss=hit.miss.proto,
            detail=hit.detail,
        )

    async def Load(
        self, request: agent_pb2.LoadRequest, context: Any
    ) -> AsyncIterator[agent_pb2.LoadEvent]:
        """Run a load; the stream's end is the load's."""
        self._check_engine()
        updates = self._agent.loader.load(_load_spec(request))
        try:
            async for update in updates:
                yield event_of(update)
        finally:
            await updates.aclose()

    async def HandOff(
        self, request_iterator: AsyncIterator[agent_pb2.HandOffRequest], context: Any
    ) -> agent_pb2.HandOffResponse:
        """Give the KV of a request to its decode agent."""
        self._check_engine()
        first = await first_message(request_iterator)
        if first is None:
            raise InvalidRequest("a hand-off begins with what is handed off")
        spec = HandOffSpec(
            request=first.request,
            decode_peer=first.decode_peer,
            namespace_id=first.namespace_id,
            hashes=tuple(first.hash),
            region=first.places.region,
            places=_places_of(first.places),
            deadline_s=first.deadline_ms / 1000,
        )
        gate = LayerGate()
        reader = asyncio.create_task(_follow(first, request_iterator, gate))
        try:
            result = await self._agent.hand_offs.run(spec, gate)
        finally:
            reader.cancel()
            (wrong,) = await asyncio.gather(reader, return_exceptions=True)
        if isinstance(wrong, InvalidRequest):
            raise wrong
        return agent_pb2.HandOffResponse(
            blocks=result.blocks,
            sent_bytes=result.sent_bytes,
            held_bytes=result.held_bytes,
            reason=result.reason,
            detail=result.detail,
            elapsed_s=result.elapsed_s,
        )

    async def Receive(
        self, request: agent_pb2.LoadRequest, context: Any
    ) -> AsyncIterator[agent_pb2.LoadEvent]:
        """Run a receive; the stream's end is its own."""
        self._check_engine()
        updates = self._agent.receiver.receive(_load_spec(request))
        try:
            async for update in updates:
                yield event_of(update)
        finally:
            await updates.aclose()

    async def Save(self, request: agent_pb2.SaveRequest, context: Any) -> agent_pb2.SaveResponse:
        """Store blocks."""
        self._check_engine()
        spec = SaveSpec(
            namespace_id=request.namespace_id,
            hashes=tuple(request.hash),
            parents=tuple(request.parent),
            region=request.places.region,
            places=_places_of(request.places),
            durable=request.durable,
            deadline_s=request.deadline_ms / 1000,
        )
        return _save_response(await self._agent.saver.save(spec))

    async def Abort(self, request: agent_pb2.AbortRequest, context: Any) -> agent_pb2.AbortResponse:
        """End loads; their writes are fenced."""
        self._check_engine()
        return agent_pb2.AbortResponse(aborted=self._agent.abort(request.load_id))

    async def Attach(
        self, request: common_pb2.AttachRequest, context: Any
    ) -> common_pb2.AttachResponse:
        """Invite an agent to the compute network."""
        return self._agent.attachments.attach(request, _sharer(caller_of_call()))

    async def Relay(
        self, request_iterator: AsyncIterator[agent_pb2.RelayRequest], context: Any
    ) -> AsyncIterator[agent_pb2.RelayResponse]:
        """Serve an attached agent."""
        responses = self._agent.attachments.serve(request_iterator)
        try:
            async for response in responses:
                yield response
        finally:
            await responses.aclose()

    async def Take(
        self, request_iterator: AsyncIterator[agent_pb2.TakeRequest], context: Any
    ) -> AsyncIterator[agent_pb2.TakeResponse]:
        """Take a hand-off of an attached agent in."""
        responses = self._agent.intakes.serve(request_iterator)
        try:
            async for response in responses:
                yield response
        finally:
            await responses.aclose()

    async def Stats(
        self, request: agent_pb2.AgentStatsRequest, context: Any
    ) -> agent_pb2.AgentStatsResponse:
        """Counters and gauges."""
        return self._agent.stats()


def _sharer(caller: Caller) -> str:
    """As whom a caller takes its share of attachments: agents of one cluster often show the same
    token, so those of one host count together, however many connections they make."""
    return f"{caller.principal}@{caller.peer.rpartition(':')[0]}"


async def _follow(
    first: agent_pb2.HandOffRequest,
    requests: AsyncIterator[agent_pb2.HandOffRequest],
    gate: LayerGate,
) -> None:
    """Open the gate as the engine says."""

    def follow(request: agent_pb2.HandOffRequest) -> None:
        if request.layers_done:
            gate.done(request.layers_done - 1)
        if request.abort:
            gate.abort()

    try:
        follow(first)
        async for request in requests:
            follow(request)
    finally:
        gate.close()


def _load_spec(request: agent_pb2.LoadRequest) -> LoadSpec:
    return LoadSpec(
        load_id=request.load_id,
        namespace_id=request.namespace_id,
        hashes=tuple(request.hash),
        region=request.places.region,
        places=_places_of(request.places),
        deadline_s=request.deadline_ms / 1000,
        policy=request.policy,
        decode_peer=request.decode_peer,
        paths=tuple(request.path),
        request=request.request,
        recompute_tokens_per_s=request.recompute_tokens_per_s,
        direct_share=request.direct_share if request.HasField("direct_share") else None,
    )


def event_of(update: LoadUpdate) -> agent_pb2.LoadEvent:
    """The protocol's form of an update."""
    event = agent_pb2.LoadEvent(layers_ready=update.layers_ready, blocks_valid=update.blocks_valid)
    if update.started is not None:
        event.started = True
        event.hit_blocks = update.started.hit_blocks
        event.miss = update.started.miss.proto
        event.detail = update.started.detail
    if update.result is not None:
        _add_result(event, update.result)
    return event


def _add_result(event: agent_pb2.LoadEvent, result: LoadResult) -> None:
    event.done = True
    event.blocks_valid = result.blocks
    event.miss = result.miss.proto
    event.detail = result.detail
    event.share.extend(
        agent_pb2.PathShare(path=path, bytes=nbytes, held_bytes=result.held_bytes.get(path, 0))
        for path, nbytes in result.shares.items()
    )
    event.events.update(result.events)
    event.elapsed_s = result.elapsed_s
    event.lookup_s = result.lookup_s
    event.nbytes = result.nbytes


def _save_response(result: SaveResult) -> agent_pb2.SaveResponse:
    return agent_pb2.SaveResponse(
        status=[
            store_pb2.SealStatus.Value(f"SEAL_STATUS_{status.name if status else 'UNSPECIFIED'}")
            for status in result.sealed
        ],
        reserved=[
            store_pb2.ReserveStatus.Value(
                f"RESERVE_STATUS_{status.name if status else 'UNSPECIFIED'}"
            )
            for status in result.reserved
        ],
        reason=result.reason,
        detail=result.detail,
        events=dict(result.events),
    )


def _places_of(places: agent_pb2.BlockPlaces) -> Places:
    return Places(places.layer_stride_bytes, tuple(places.base_bytes))
