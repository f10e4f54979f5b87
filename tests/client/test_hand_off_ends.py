"""How a hand-off ends, whatever its decode agent does: in time, with its reason, memory let go."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
from dualpath.agent.intake import Intake
from dualpath.agent.places import Places
from dualpath.client.hand_off import HandOff
from dualpath.client.kv_client import KVClient
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    chain,
    embedded_agent,
    fill,
    until,
)
from dualpath.kvstore.checksum import of_slices
from dualpath.kvstore.namespace import Namespace
from dualpath.proto.v1 import agent_pb2
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.slices import Slices
from dualpath.transfer.stream_sender import StreamSender

Run: TypeAlias = Callable[..., None]

BLOCKS = 12
MANY = 200
ALL_LAYERS = LAYOUT.layers - 1
NAMESPACE = Namespace("model", LAYOUT)


async def begun(client: KVClient, blocks: int = BLOCKS, **settings: Any) -> HandOff:
    """A hand-off of computed blocks, with all layers still to come."""
    namespace_id = await client.open_namespace(NAMESPACE)
    memory = await client.allocate(blocks * LAYOUT.block_bytes)
    places, hashes = Places.contiguous(LAYOUT, blocks), chain(blocks, "prompt")
    fill(memory, places, hashes)
    arguments = {"deadline_s": WAIT_S, **settings}
    return await client.hand_off("r", "decode-1", namespace_id, hashes, memory, places, **arguments)


@pytest.mark.parametrize("how", ["abort", "deadline"])
def test_a_decode_node_that_stands_still_does_not_keep_the_memory(
    run_cluster: Run, how: str
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        process = await cluster.relay_process("decode-1")
        client = await cluster.embedded(stall_s=0.5, compute_limit_bytes_per_s=2e7)
        agent = embedded_agent(client)
        deadline_s = 2.0 if how == "deadline" else 10 * WAIT_S
        hand_off = await begun(client, MANY, deadline_s=deadline_s)
        await until(lambda: agent.relays["decode-1"].link.up, "attached")
        hand_off.layer_done(ALL_LAYERS)
        await until(lambda: agent.compute.sent_bytes > 1 << 20, "the middle")
        os.kill(process.pid, signal.SIGSTOP)
        try:
            ended = hand_off.abort() if how == "abort" else hand_off.result()
            await asyncio.wait_for(ended, WAIT_S)  # far from the deadline of its writes
            result = await hand_off.result()
            assert result.blocks < MANY
            assert result.reason == ("aborted" if how == "abort" else "deadline")
            assert not agent.hand_offs
        finally:
            os.kill(process.pid, signal.SIGCONT)

    run_cluster(body)


def test_a_decode_node_that_acknowledges_nothing_is_left(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await cluster.relay("decode-1")
        client = await cluster.embedded(stall_s=0.5)
        agent = embedded_agent(client)
        await until(lambda: agent.relays["decode-1"].link.up, "attached")
        for name in ("acknowledge", "acknowledge_each"):
            monkeypatch.setattr(StreamSender, name, lambda *_arguments: None)
        hand_off = await begun(client, deadline_s=10 * WAIT_S)
        hand_off.layer_done(ALL_LAYERS)
        await until(lambda: agent.compute.sent_bytes > 1 << 20, "the middle")
        await asyncio.wait_for(hand_off.abort(), WAIT_S)
        assert (await hand_off.result()).reason == "aborted"
        assert not agent.hand_offs

    run_cluster(body)


def test_memory_is_not_read_once_a_hand_off_is_given_up(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading: list[bool] = []
    first = threading.Event()

    def slow(view: memoryview, slices: Slices) -> int:
        reading.append(True)
        first.set()
        time.sleep(0.05)  # of a chunk: whoever is told of the end meanwhile would notice
        checksum = of_slices(view, slices)
        reading.pop()
        return checksum

    async def body(cluster: LoopbackCluster) -> None:
        await cluster.relay("decode-1")
        hand_off = await begun(await cluster.embedded(), MANY)
        hand_off.layer_done(ALL_LAYERS)
        assert await asyncio.to_thread(first.wait, WAIT_S)
        await hand_off.abort()
        assert not reading
        assert (await hand_off.result()).reason == "aborted"

    monkeypatch.setattr("dualpath.agent.hand_off.of_slices", slow)
    run_cluster(body)


@pytest.mark.parametrize("agent_in", ["this process", "another process"])
def test_a_layer_that_is_not_there_is_refused(run_cluster: Run, agent_in: str) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await cluster.relay("decode-1")
        here = agent_in == "this process"
        client = await (cluster.embedded() if here else cluster.remote())
        early = await begun(client)
        early.layer_done(LAYOUT.layers)
        with pytest.raises(InvalidRequest, match=f"layer {LAYOUT.layers} is done, of layers 0 to"):
            await early.result()
        late = await begun(client)
        late.layer_done(0)
        if here:
            await until(lambda: len(embedded_agent(client).hand_offs) == 1, "accepted")
            with pytest.raises(InvalidRequest, match="of layers 0 to"):
                late.layer_done(1000)
            await late.abort()
        else:
            late.layer_done(1000)
            with pytest.raises(InvalidRequest, match="of layers 0 to"):
                await late.result()

    run_cluster(body)


LAST_WORDS: dict[str, dict[str, Any]] = {
    "more blocks than there are": {"blocks": 4_000_000},
    "all of fewer blocks": {"blocks": BLOCKS - 1},
    "a word that nobody knows": {"blocks": 0, "reason": "x" * 5000},
}


@pytest.mark.parametrize("lie", LAST_WORDS)
def test_an_agent_that_lies_about_the_end_is_not_believed(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    real = Intake.responses

    def responses(intake: Intake) -> Iterator[agent_pb2.TakeResponse]:
        if intake.over is not None:
            yield agent_pb2.TakeResponse(done=True, **LAST_WORDS[lie])
        else:
            yield from real(intake)

    async def body(cluster: LoopbackCluster) -> None:
        monkeypatch.setattr(Intake, "responses", responses)
        await cluster.relay("decode-1")
        client = await cluster.embedded()
        hand_off = await begun(client)
        hand_off.layer_done(ALL_LAYERS)
        result = await hand_off.result()
        assert result.blocks <= BLOCKS
        assert result.reason in ("invalid", "peer_lost")
        counted = [name for name in embedded_agent(client).events() if "hand_off" in name]
        assert counted == [f"hand_off_{result.reason}"]

    run_cluster(body)
