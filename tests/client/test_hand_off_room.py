"""Room in the holdings of a decode node: who stalls or comes late does not take it from others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import pytest
from dualpath.agent.agent import Agent
from dualpath.agent.places import Places
from dualpath.client.embedded_session import EmbeddedSession
from dualpath.client.kv_client import KVClient
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    chain,
    content,
    fill,
    until,
    wrong_blocks,
)
from dualpath.kvstore.checksum import xxh3_64
from dualpath.kvstore.namespace import Namespace
from dualpath.proto.v1 import agent_pb2

Run: TypeAlias = Callable[..., None]

BLOCKS = 12
PLACES = Places.contiguous(LAYOUT, BLOCKS)
BYTES = BLOCKS * LAYOUT.block_bytes
ALL_LAYERS = LAYOUT.layers - 1
NAMESPACE = Namespace("model", LAYOUT)
HASHES = chain(BLOCKS, "prompt")


async def clean(agent: Agent) -> None:
    """Nothing is under way and nothing is pinned; the windows of requests are closed."""
    parts = (agent.handed, agent.intakes, agent.hand_offs, agent.receiver)
    await until(lambda: not any(len(part) for part in parts), "nothing under way")
    holdings = agent.holdings
    await until(lambda: not holdings.in_use and not holdings.requests, "nothing pinned")
    assert holdings.pinned_bytes == 0
    if holdings.capacity_bytes:
        assert all(chunk.held for chunk in holdings._chunks.values())
        assert holdings.used_bytes >= sum(chunk.nbytes for chunk in holdings._cache)
    assert agent.relay.staging.used_bytes == 0


async def given(client: KVClient, **settings: Any) -> Any:
    """A hand-off of the whole prompt, computed."""
    namespace_id = await client.open_namespace(NAMESPACE)
    memory = await client.allocate(BYTES)
    fill(memory, PLACES, HASHES)
    arguments = {"deadline_s": WAIT_S, "request": "r", **settings}
    request = arguments.pop("request")
    return await client.hand_off(
        request, "decode-1", namespace_id, HASHES, memory, PLACES, **arguments
    )


def _hello(**changed: Any) -> agent_pb2.TakeRequest:
    fields = {
        "request": "r",
        "namespace_id": NAMESPACE.id,
        "hash": HASHES,
        "chunk_bytes": [1 << 18] * 3,
        "deadline_ms": 5000,
        **changed,
    }
    return agent_pb2.TakeRequest(**fields)


def _checksums() -> list[int]:
    """Of all chunks of the prompt, as they are offered."""
    blocks = [content(each) for each in HASHES]
    extents = [LAYOUT.chunk_extent(chunk) for chunk in range(LAYOUT.chunk_count)]
    return [
        xxh3_64(block[offset : offset + nbytes]) for offset, nbytes in extents for block in blocks
    ]


def _offering(session: bytes, **changed: Any) -> AsyncIterator[agent_pb2.TakeRequest]:
    """A hand-off that offers the whole prompt and never writes it."""

    async def requests() -> AsyncIterator[agent_pb2.TakeRequest]:
        sizes = [LAYOUT.chunk_extent(chunk)[1] for chunk in range(LAYOUT.chunk_count)]
        yield _hello(session=session, chunk_bytes=sizes, **changed)
        yield agent_pb2.TakeRequest(checksum=_checksums())
        await asyncio.Event().wait()

    return requests()


async def _answers(answers: AsyncIterator[agent_pb2.TakeResponse]) -> None:
    async for _ in answers:
        pass


def test_a_prefill_node_that_stalls_does_not_hold_up_others_of_the_same_prefix(
    run_cluster: Run,
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = (await cluster.relay("decode-1", stall_s=0.2, hold_s=0.5)).agent
        decode = KVClient(EmbeddedSession(agent))
        namespace_id = await decode.open_namespace(NAMESPACE)
        prefill = await cluster.embedded()
        await until(lambda: len(agent.attachments) == 1, "attached")
        (session,) = agent.attachments._by_session
        sick = asyncio.create_task(
            _answers(agent.intakes.serve(_offering(session, request="sick", deadline_ms=60_000)))
        )
        await until(lambda: agent.holdings.in_use == len(_checksums()), "all is under way")
        target = await decode.allocate(BYTES)
        receive = await decode.receive("r", namespace_id, HASHES, target, PLACES, deadline_s=WAIT_S)
        hand_off = await given(prefill)
        hand_off.layer_done(ALL_LAYERS)
        given_ = await hand_off.result()
        assert (given_.reason, given_.blocks, given_.sent_bytes) == ("", BLOCKS, BYTES)
        assert (await receive.result()).blocks == BLOCKS
        assert wrong_blocks(target, PLACES, HASHES) == []
        sick.cancel()
        await asyncio.gather(sick, return_exceptions=True)
        await clean(agent)
        assert agent.holdings.used_bytes == len(_checksums()) << 18

    run_cluster(body)


def test_a_request_that_nobody_receives_leaves_room_for_one_that_is_received(
    run_cluster: Run,
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = (await cluster.relay("decode-1", hold_bytes=4 << 20, hold_s=0.5)).agent
        decode = KVClient(EmbeddedSession(agent))
        namespace_id = await decode.open_namespace(NAMESPACE)
        prefill = await cluster.embedded()
        early = await given(prefill, request="early")
        early.layer_done(ALL_LAYERS)
        # It is verified and pinned, and has no engine to go to: nothing of it ever makes room.
        await until(lambda: agent.holdings.pinned_bytes > 3 << 19, "it has what it may have")
        target = await decode.allocate(BYTES)
        other = chain(BLOCKS, "other")
        memory = await prefill.allocate(BYTES)
        fill(memory, PLACES, other)
        receive = await decode.receive("r", namespace_id, other, target, PLACES, deadline_s=WAIT_S)
        hand_off = await prefill.hand_off(
            "r", "decode-1", namespace_id, other, memory, PLACES, deadline_s=WAIT_S
        )
        hand_off.layer_done(ALL_LAYERS)
        assert (await hand_off.result()).reason == ""
        assert (await receive.result()).blocks == BLOCKS
        assert wrong_blocks(target, PLACES, other) == []
        assert not early.done
        # With its engine it goes on.
        late = await decode.receive("early", namespace_id, HASHES, target, PLACES, deadline_s=5.0)
        assert (await late.result()).blocks == BLOCKS
        assert (await early.result()).reason == ""
        assert wrong_blocks(target, PLACES, HASHES) == []
        await clean(agent)
        assert agent.holdings.unclaimed_bytes == 0

    run_cluster(body)


@pytest.mark.parametrize("received", [True, False])
def test_offers_that_are_never_written_leave_room_for_others(
    run_cluster: Run, received: bool
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = (await cluster.relay("decode-1", hold_bytes=2 << 20, stall_s=0.2, hold_s=0.5)).agent
        decode = KVClient(EmbeddedSession(agent))
        namespace_id = await decode.open_namespace(NAMESPACE)
        prefill = await cluster.embedded()
        await until(lambda: len(agent.attachments) == 1, "attached")
        (session,) = agent.attachments._by_session
        other = chain(BLOCKS, "other")
        target = await decode.allocate(2 * BYTES)
        second = Places(
            PLACES.layer_stride_bytes, tuple(base + BYTES for base in PLACES.base_bytes)
        )
        if received:
            waits = await decode.receive(
                "squat", namespace_id, other, target, second, deadline_s=WAIT_S
            )
        squatting = [
            asyncio.create_task(
                _answers(
                    agent.intakes.serve(
                        _offering(session, request=name, hash=other, deadline_ms=60_000)
                    )
                )
            )
            for name in ("squat", "squat-2")
        ]
        await until(lambda: agent.holdings.used_bytes >= 1 << 20, "room is taken")
        receive = await decode.receive("r", namespace_id, HASHES, target, PLACES, deadline_s=WAIT_S)
        hand_off = await given(prefill)
        hand_off.layer_done(ALL_LAYERS)
        result = await hand_off.result()
        assert (result.reason, result.blocks) == ("", BLOCKS)
        assert (await receive.result()).blocks == BLOCKS
        assert wrong_blocks(target, PLACES, HASHES) == []
        for task in squatting:
            task.cancel()
        await asyncio.gather(*squatting, return_exceptions=True)
        if received:
            assert (await waits.result()).blocks == 0
        await clean(agent)
        assert agent.holdings.unclaimed_bytes == 0

    run_cluster(body)


def test_a_peer_with_many_sessions_has_no_more_coming_than_with_one(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = (await cluster.relay("decode-1", hold_bytes=16 << 20, stall_s=30.0)).agent
        for number in range(3):
            await cluster.embedded(f"bad-{number}")
        await until(lambda: len(agent.attachments) == 3, "attached")
        decode = KVClient(EmbeddedSession(agent))
        namespace_id = await decode.open_namespace(NAMESPACE)
        calls, receives = [], []
        for session in tuple(agent.attachments._by_session):
            name, hashes = session.hex(), chain(BLOCKS, session.hex())
            memory = await decode.allocate(BYTES)
            receives.append(
                await decode.receive(name, namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S)
            )
            offering = _offering(session, request=name, hash=hashes, deadline_ms=60_000)
            calls.append(asyncio.create_task(_answers(agent.intakes.serve(offering))))
        intakes = agent.intakes

        def settled() -> bool:
            running = tuple(intakes._running)
            looked = all(each.waits and each.claimed for each in running)
            return len(running) == 3 and not intakes._looking and looked

        try:
            await until(settled, "all wait for room")
            coming = [room.coming_bytes for room in intakes._peers.values()]
            assert len(coming) == 3
            assert min(coming) > 0
            # All three count as one: others could have as much.
            assert sum(coming) <= agent.holdings.capacity_bytes // 2
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        for receive in receives:
            assert (await receive.result()).blocks == 0
        await clean(agent)

    run_cluster(body)


def test_a_prefill_node_with_too_many_requests_is_told_so(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualpath.agent.handed_request.REQUESTS_MAX", 2)

    async def body(cluster: LoopbackCluster) -> None:
        await cluster.relay("decode-1")
        prefill = await cluster.embedded()
        reasons = []
        for name in ("first", "second"):
            hand_off = await given(prefill, request=name)
            hand_off.layer_done(ALL_LAYERS)
            reasons.append((await hand_off.result()).reason)
        assert reasons == ["", "quota"]

    run_cluster(body)
