"""Hand-offs whose peers die, lie or lose bytes: a reason in time, right bytes, nothing left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, TypeAlias

import pytest
from dualpath.agent.agent import Agent
from dualpath.agent.hand_off_spec import HAND_OFF_CHUNKS_MAX
from dualpath.agent.outcome import MissReason
from dualpath.agent.places import Places
from dualpath.client.blocking import BlockingKVClient
from dualpath.client.embedded_session import EmbeddedSession
from dualpath.client.kv_client import KVClient
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    chain,
    embedded_agent,
    fill,
    kill,
    stored,
    until,
    wrong_blocks,
)
from dualpath.kvstore.namespace import Namespace
from dualpath.proto.v1 import agent_pb2
from dualpath.transfer.errors import DualPathError, InvalidRequest
from dualpath.transfer.fault_plan import FaultPlan
from dualpath.transfer.fault_transport import FaultTransport
from dualpath.transfer.tcp_transport import TcpConfig, TcpTransport
from dualpath.transfer.transport import OnPeerLost, Transport

Run: TypeAlias = Callable[..., None]

BLOCKS = 12
PLACES = Places.contiguous(LAYOUT, BLOCKS)
BYTES = BLOCKS * LAYOUT.block_bytes
ALL_LAYERS = LAYOUT.layers - 1
NAMESPACE = Namespace("model", LAYOUT)
HASHES = chain(BLOCKS, "prompt")
SLOW = 4e6
"""Bytes a second: slow enough to be in the middle when something is killed."""


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


def test_the_prefill_node_dies_in_the_middle(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = (await cluster.relay("decode-1", hold_s=1.0)).agent
        decode = KVClient(EmbeddedSession(agent))
        namespace_id = await decode.open_namespace(NAMESPACE)
        target = await decode.allocate(BYTES)
        prefill = await cluster.remote(compute_limit_bytes_per_s=SLOW)
        hand_off = await given(prefill)
        hand_off.layer_done(ALL_LAYERS)
        receive = await decode.receive("r", namespace_id, HASHES, target, PLACES, deadline_s=WAIT_S)
        await until(lambda: agent.compute.received_bytes > BYTES // 4, "the middle")
        kill(cluster.processes["prefill-1"])
        result = await receive.result()
        assert result.miss is MissReason.PEER_LOST
        assert result.blocks < BLOCKS
        assert result.elapsed_s < WAIT_S
        assert wrong_blocks(target, PLACES, HASHES[: result.blocks]) == []
        assert (await hand_off.result()).reason
        assert agent.events()["intake_peer_lost"] == 1
        await clean(agent)

    run_cluster(body)


def test_what_is_stored_completes_a_receive_whose_prefill_node_died(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = (await cluster.relay("decode-1", hold_s=1.0)).agent
        decode = KVClient(EmbeddedSession(agent))
        namespace_id = await decode.open_namespace(NAMESPACE)
        await stored(await cluster.embedded("filler"), BLOCKS, seed="prompt")
        target = await decode.allocate(BYTES)
        prefill = await cluster.remote(compute_limit_bytes_per_s=SLOW)
        hand_off = await given(prefill)
        hand_off.layer_done(ALL_LAYERS)
        receive = await decode.receive("r", namespace_id, HASHES, target, PLACES, deadline_s=WAIT_S)
        await until(lambda: agent.compute.received_bytes > BYTES // 4, "the middle")
        kill(cluster.processes["prefill-1"])
        result = await receive.result()
        assert (result.blocks, result.miss) == (BLOCKS, MissReason.NONE), result
        assert result.events["peer_lost"] == 1
        # What had come is not loaded again.
        assert result.shares.keys() == {"handed_off", "direct"}
        assert sum(result.shares.values()) == BYTES
        assert await receive.wait_layer(ALL_LAYERS) == BLOCKS
        assert wrong_blocks(target, PLACES, HASHES) == []
        assert (await hand_off.result()).reason
        await clean(agent)

    run_cluster(body)


def test_the_decode_node_dies_in_the_middle_and_loads_go_on(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        process = await cluster.relay_process("decode-1", compute_limit_bytes_per_s=SLOW)
        client = await cluster.embedded(compute_limit_bytes_per_s=SLOW)
        namespace_id, hashes = await stored(client, BLOCKS)
        memory = await client.allocate(BYTES)
        load = await client.load(
            namespace_id,
            hashes,
            memory,
            PLACES,
            deadline_s=WAIT_S,
            decode_peer="decode-1",
            request="r",
        )
        hand_off = await given(client)
        hand_off.layer_done(ALL_LAYERS)
        agent = embedded_agent(client)
        await until(lambda: agent.compute.sent_bytes > BYTES // 8, "the middle")
        kill(process)
        result = await hand_off.result()
        assert (result.reason, result.blocks) == ("peer_lost", 0)
        assert result.elapsed_s < WAIT_S
        assert (await load.result()).blocks == BLOCKS
        assert wrong_blocks(memory, PLACES, hashes) == []
        again = await given(client, deadline_s=1.0)
        assert (await again.result()).reason in ("peer_lost", "deadline")
        await clean(agent)

    run_cluster(body)


@pytest.mark.parametrize("end", ["abort", "deadline", "drop"])
def test_an_end_while_wrong_bytes_have_just_landed(run_cluster: Run, end: str) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = (await cluster.relay("decode-1", hold_s=0.2)).agent
        decode = KVClient(EmbeddedSession(agent))
        namespace_id = await decode.open_namespace(NAMESPACE)
        target = await decode.allocate(BYTES)
        prefill = await cluster.embedded()
        receive = await decode.receive("r", namespace_id, HASHES, target, PLACES, deadline_s=WAIT_S)
        await until(lambda: len(agent.receiver) == 1, "the receive began")
        (running,) = agent.receiver._running.values()
        hand_off = await given(prefill)
        await until(lambda: len(agent.intakes) == 1, "the hand-off began")
        (intake,) = agent.intakes._running
        landed = asyncio.Event()

        def end_it() -> None:
            if end == "abort":
                agent.abort([receive.load_id])
            elif end == "deadline":
                running.finish("deadline", "the deadline passed")
            else:
                agent.regions.drop(running.load.entry.handle)

        def end_first(items: list[tuple[int, bool]]) -> None:
            """What landed is looked at by the end itself, as when the loop was busy till then."""
            intake._landed._handle = intake._on_landed
            intake._landed._items.extendleft((tag, False) for tag, _ in reversed(items))
            try:
                end_it()
            finally:
                landed.set()

        intake._landed._handle = end_first
        hand_off.layer_done(ALL_LAYERS)
        await landed.wait()
        result = await asyncio.wait_for(receive.result(), WAIT_S)
        assert result.blocks == 0
        assert (await hand_off.result()).reason
        target.view[:] = bytes(BYTES)
        await clean(agent)
        assert bytes(target.view) == bytes(BYTES)

    run_cluster(body)


def test_a_whole_request_between_processes_and_blocking_clients(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        path = str(cluster.path / "decode-1.sock")
        await cluster.relay_process("decode-1", unix=path)
        prefill = await cluster.remote()
        decode = await KVClient.connect(f"unix:{path}")
        cluster.stack.push_async_callback(decode.close)
        namespace_id = await decode.open_namespace(NAMESPACE)
        target = await decode.allocate(BYTES)
        receive = await decode.receive("r", namespace_id, HASHES, target, PLACES, deadline_s=WAIT_S)
        hand_off = await given(prefill)
        for layer in range(LAYOUT.layers):
            hand_off.layer_done(layer)
        result = await hand_off.result()
        assert (result.reason, result.blocks, result.sent_bytes) == ("", BLOCKS, BYTES)
        received = await receive.result()
        assert received.blocks == BLOCKS
        assert received.shares == {"handed_off": BYTES}
        assert wrong_blocks(target, PLACES, HASHES) == []
        aborted = await given(prefill, request="r2")
        await aborted.abort()
        assert (await aborted.result()).reason == "aborted"
        stats = (await decode.stats()).holdings
        assert (stats.taken_bytes, stats.received_bytes, stats.pinned_bytes) == (BYTES, BYTES, 0)

    run_cluster(body)


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


HOSTILE: tuple[tuple[dict[str, Any], str], ...] = (
    ({"request": ""}, "characters"),
    ({"request": "x" * 129}, "characters"),
    ({"namespace_id": b"short"}, "namespace id"),
    ({"hash": []}, "hashes"),
    ({"hash": [b"x"]}, "hash"),
    ({"hash": HASHES[:1] * 2}, "same hash"),
    ({"chunk_bytes": []}, "chunks"),
    ({"chunk_bytes": [1] * 65}, "chunks"),
    ({"chunk_bytes": [0]}, "bytes"),
    ({"chunk_bytes": [(1 << 20) + 1]}, "bytes"),
    ({"hash": chain(HAND_OFF_CHUNKS_MAX // 64 + 1), "chunk_bytes": [1] * 64}, "at most"),
    ({"deadline_ms": 0}, "deadline"),
    ({"session": b"?" * 16}, "session"),
)


def test_hostile_hand_offs_are_refused(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = (await cluster.relay("decode-1", hold_s=0.2)).agent
        await cluster.embedded()
        await until(lambda: len(agent.attachments) == 1, "attached")
        (session,) = agent.attachments._by_session

        async def requests(*messages: agent_pb2.TakeRequest) -> AsyncIterator[Any]:
            for message in messages:
                yield message
            await asyncio.Event().wait()

        for changed, match in HOSTILE:
            hello = _hello(**{"session": session, **changed})
            with pytest.raises(DualPathError, match=match):
                await anext(agent.intakes.serve(requests(hello)))
        for chunks in (4097, 37):  # an offer that is too long; more chunks than there are
            offer = agent_pb2.TakeRequest(checksum=[1] * chunks)
            serving = agent.intakes.serve(requests(_hello(session=session), offer))
            answers = [answer async for answer in serving]
            assert (answers[-1].done, answers[-1].reason) == (True, "invalid")
        await clean(agent)
        assert not agent.compute.transport._windows._windows  # type: ignore[attr-defined]

    run_cluster(body)


def test_a_stream_that_ends_while_chunks_wait_for_room_says_so(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = (await cluster.relay("decode-1", hold_s=0.2, hold_bytes=1 << 20)).agent
        await cluster.embedded()
        await until(lambda: len(agent.attachments) == 1, "attached")
        (session,) = agent.attachments._by_session
        asked = asyncio.Event()

        async def requests() -> AsyncIterator[agent_pb2.TakeRequest]:
            yield _hello(session=session)
            yield agent_pb2.TakeRequest(checksum=range(36))
            await asked.wait()

        answers = []
        async for answer in agent.intakes.serve(requests()):
            answers.append(answer)
            if answer.tag:
                asked.set()
        assert (answers[-1].done, answers[-1].reason) == (True, "no_room")
        assert agent.events()["intake_no_room"] == 1
        await clean(agent)

    run_cluster(body)


def test_offers_of_bytes_that_never_come_are_given_up(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = (await cluster.relay("decode-1", hold_s=0.2)).agent
        await cluster.embedded()
        await until(lambda: len(agent.attachments) == 1, "attached")
        (session,) = agent.attachments._by_session

        async def requests() -> AsyncIterator[agent_pb2.TakeRequest]:
            yield _hello(session=session, deadline_ms=300)
            yield agent_pb2.TakeRequest(checksum=range(36))
            await asyncio.Event().wait()

        answers = [answer async for answer in agent.intakes.serve(requests())]
        assert len(answers[1].tag) == 36
        assert (answers[-1].done, answers[-1].reason) == (True, "deadline")
        await clean(agent)
        assert agent.holdings.used_bytes == 0

    run_cluster(body)


def faulty(plan: FaultPlan, name: str, on_peer_lost: OnPeerLost) -> Transport:
    return FaultTransport(TcpTransport(name, on_peer_lost, TcpConfig()), plan)


async def harmed(cluster: LoopbackCluster, seed: int) -> None:
    """Two requests at once while bytes flip, writes repeat, come late, or take their connection
    along."""
    broken = 0.02 if seed % 2 else 0.0
    plan = FaultPlan(
        seed, delay=0.1, duplicate=0.1, stale=0.1, flip=0.08, reset=broken, truncate=broken
    )
    name = f"prefill-{seed}"
    agent = cluster.servers["decode-1"].agent
    decode = KVClient(EmbeddedSession(agent))
    namespace_id = await decode.open_namespace(NAMESPACE)
    prefill = await cluster.embedded(name, make_compute=partial(faulty, plan))

    async def one(request: str) -> None:
        target = await decode.allocate(BYTES)
        receive = await decode.receive(
            request, namespace_id, HASHES, target, PLACES, deadline_s=5.0
        )
        hand_off = await given(prefill, request=request, deadline_s=3.0)
        for layer in range(LAYOUT.layers):
            hand_off.layer_done(layer)
            await asyncio.sleep(0)
        result = await hand_off.result()
        received = await receive.result()
        assert (result.reason == "") == (result.blocks == BLOCKS)
        assert (received.miss is MissReason.NONE) == (received.blocks == BLOCKS)
        assert wrong_blocks(target, PLACES, HASHES[: received.blocks]) == []
        assert received.elapsed_s < 6.0
        assert result.elapsed_s < 5.0
        if not result.reason:
            assert received.blocks == BLOCKS
        await target.aclose()
        target.close()

    await asyncio.gather(one(f"a{seed}"), one(f"b{seed}"))
    await clean(embedded_agent(prefill))
    await prefill.close()


def test_a_blocking_client_hands_off_and_receives(run_cluster: Run) -> None:
    def engines(prefill_at: str, decode_at: str) -> None:
        with (
            BlockingKVClient.connect(prefill_at) as prefill,
            BlockingKVClient.connect(decode_at) as decode,
        ):
            namespace_id = prefill.open_namespace(NAMESPACE)
            assert decode.open_namespace(NAMESPACE) == namespace_id
            source, target = prefill.allocate(BYTES), decode.allocate(BYTES)
            fill(source, PLACES, HASHES)
            receive = decode.receive("r", namespace_id, HASHES, target, PLACES, deadline_s=WAIT_S)
            hand_off = prefill.hand_off(
                "r", "decode-1", namespace_id, HASHES, source, PLACES, deadline_s=WAIT_S
            )
            hand_off.layer_done(0)
            with pytest.raises(InvalidRequest, match="from 0 on"):
                hand_off.layer_done(-1)
            hand_off.layer_done(ALL_LAYERS)
            assert receive.wait_layer(ALL_LAYERS) == BLOCKS
            assert hand_off.result().reason == ""
            assert receive.result().blocks == BLOCKS
            assert wrong_blocks(target, PLACES, HASHES) == []
            given_up = prefill.hand_off(
                "r2", "decode-1", namespace_id, HASHES, source, PLACES, deadline_s=WAIT_S
            )
            given_up.abort()
            assert given_up.done
            assert given_up.result().reason == "aborted"

    async def body(cluster: LoopbackCluster) -> None:
        paths = [str(cluster.path / name) for name in ("decode-1.sock", "prefill-1.sock")]
        await cluster.relay("decode-1", unix=paths[0], hold_s=0.5)
        relays = (f"decode-1={cluster.relays['decode-1']}",)
        await cluster.relay("prefill-1", unix=paths[1], relays=relays)
        await asyncio.to_thread(engines, f"unix:{paths[1]}", f"unix:{paths[0]}")
        for server in cluster.servers.values():
            await clean(server.agent)

    run_cluster(body)


@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 60), marks=pytest.mark.slow)])
def test_whatever_befalls_the_bytes_they_are_right_or_the_end_has_a_reason(
    run_cluster: Run, seeds: range
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = (await cluster.relay("decode-1", hold_s=0.2, hold_bytes=6 << 20)).agent
        for seed in seeds:
            await harmed(cluster, seed)
        await clean(agent)

    run_cluster(body)
