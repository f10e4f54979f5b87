"""An agent that was killed and started again: its engines go on without being restarted."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from collections.abc import Callable
from typing import TypeAlias

import pytest
from dualpath.agent import steady_link
from dualpath.agent.config import AgentConfig
from dualpath.agent.hand_off_spec import HandOffResult
from dualpath.agent.places import Places
from dualpath.client.kv_client import KVClient
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    chain,
    embedded_agent,
    fill,
    kill,
    parents,
    stored,
    until,
    wrong_blocks,
)
from dualpath.client.memory import EngineMemory
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.errors import DualPathError, InvalidRequest, Unavailable

Run: TypeAlias = Callable[..., None]

BLOCKS = 8
PLACES = Places.contiguous(LAYOUT, BLOCKS)
BYTES = BLOCKS * LAYOUT.block_bytes
NAME = "engine-agent"


class Restartable:
    """An agent process that comes back at the same addresses."""

    def __init__(self, cluster: LoopbackCluster) -> None:
        self._cluster = cluster
        self._config = cluster.config(NAME, unix=str(cluster.path / "engine.sock"))

    @classmethod
    async def started(cls, cluster: LoopbackCluster, **settings: object) -> Restartable:
        agent = cls(cluster)
        agent._config = dataclasses.replace(agent._config, **settings)  # type: ignore[arg-type]
        where = await agent.start()
        agent._config = dataclasses.replace(agent._config, listen=str(where["listen"]))
        return agent

    @property
    def config(self) -> AgentConfig:
        return self._config

    async def start(self) -> dict[str, object]:
        fields = dataclasses.asdict(self._config)
        _, where = await self._cluster.spawn(fields.pop("name"), **fields)
        return where

    async def client(self) -> KVClient:
        client = await KVClient.connect(f"unix:{self._config.unix}")
        self._cluster.stack.push_async_callback(client.close)
        return client

    async def restart(self) -> None:
        kill(self._cluster.processes[NAME])
        await self.start()


async def when_back(client: KVClient, namespace_id: bytes, hashes: list[bytes]) -> int:
    """Look up as an engine would, again and again; only the agent's loss may be raised."""
    end_at = asyncio.get_running_loop().time() + WAIT_S
    while True:
        try:
            return (await client.lookup(namespace_id, hashes)).blocks
        except Unavailable:
            assert asyncio.get_running_loop().time() < end_at, "the agent is not reached again"
            await asyncio.sleep(0.02)


async def load(
    client: KVClient, namespace_id: bytes, hashes: list[bytes], memory: EngineMemory
) -> None:
    """Load all of it over what is there, and check every byte."""
    memory.view[:] = bytes(len(memory.view))
    running = await client.load(namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S)
    result = await running.result()
    assert result.blocks == len(hashes), result
    assert wrong_blocks(memory, PLACES, hashes) == []


async def handed_off(
    client: KVClient, peer: str, namespace_id: bytes, hashes: list[bytes], memory: EngineMemory
) -> HandOffResult:
    """Hand a prompt off, once."""
    hand_off = await client.hand_off(
        "r1", peer, namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S
    )
    hand_off.layer_done(LAYOUT.layers - 1)
    return await hand_off.result()


def test_engines_look_up_load_and_save_again_by_themselves(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = await Restartable.started(cluster)
        first, second = await agent.client(), await agent.client()
        namespace_id, hashes = await stored(first, BLOCKS)
        await second.open_namespace(Namespace("model", LAYOUT))
        memories = [await client.allocate(BYTES) for client in (first, first, second)]
        for _ in range(2):
            await agent.restart()
            assert await when_back(first, namespace_id, hashes) == BLOCKS
            await when_back(second, namespace_id, hashes)
            # All at once: each is told once, and everybody gets his own bytes.
            clients = (first, first, second)
            await asyncio.gather(
                *(
                    load(client, namespace_id, hashes, memory)
                    for client, memory in zip(clients, memories, strict=True)
                )
            )
        await agent.restart()
        await when_back(second, namespace_id, hashes)
        more = chain(BLOCKS, "more")
        fill(memories[2], PLACES, more)
        saved = await second.save(
            namespace_id, more, parents(more), memories[2], PLACES, deadline_s=WAIT_S
        )
        assert saved.sealed_blocks == BLOCKS
        await load(first, namespace_id, more, memories[0])
        for memory in memories:
            await memory.aclose()

    run_cluster(body)


def test_a_prompt_is_handed_off_to_an_agent_that_came_back(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = await Restartable.started(cluster)
        cluster.relays[NAME] = agent.config.listen
        prefill, decode = await cluster.remote(), await agent.client()
        namespace_id, hashes = await stored(prefill, BLOCKS)
        await decode.open_namespace(Namespace("model", LAYOUT))
        source, target = await prefill.allocate(BYTES), await decode.allocate(BYTES)
        fill(source, PLACES, hashes)
        await agent.restart()
        await when_back(decode, namespace_id, hashes)
        receive = await decode.receive(
            "r1", namespace_id, hashes, target, PLACES, deadline_s=WAIT_S
        )
        handed = await handed_off(prefill, NAME, namespace_id, hashes, source)
        received = await receive.result()
        assert (handed.blocks, handed.reason) == (BLOCKS, "")
        assert received.blocks == BLOCKS
        assert wrong_blocks(target, PLACES, hashes) == []

    run_cluster(body)


def test_a_hand_off_does_not_wait_for_the_next_attempt_by_itself(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without anybody who asks, the link would rest far longer than the test may take."""

    async def body(cluster: LoopbackCluster) -> None:
        agent = await Restartable.started(cluster)
        cluster.relays[NAME] = agent.config.listen
        prefill = await cluster.embedded(reconnect_s_max=100 * WAIT_S)
        namespace_id, hashes = await stored(prefill, BLOCKS)
        source = await prefill.allocate(BYTES)
        fill(source, PLACES, hashes)
        link = embedded_agent(prefill).relays[NAME].link
        monkeypatch.setattr(steady_link, "PAUSE_S_MIN", 100 * WAIT_S)
        kill(cluster.processes[NAME])
        await until(lambda: not link.up, "the loss")
        gone = await handed_off(prefill, NAME, namespace_id, hashes, source)
        assert gone.reason == "peer_lost"
        await agent.start()
        decode = await agent.client()
        await decode.open_namespace(Namespace("model", LAYOUT))
        handed = await handed_off(prefill, NAME, namespace_id, hashes, source)
        assert (handed.blocks, handed.reason) == (BLOCKS, ""), handed

    run_cluster(body)


def test_a_restarted_prefill_agent_hands_off_again(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await cluster.relay_process("decode-1")
        agent = await Restartable.started(cluster)
        prefill = await agent.client()
        namespace_id, hashes = await stored(prefill, BLOCKS)
        source = await prefill.allocate(BYTES)
        fill(source, PLACES, hashes)
        await agent.restart()
        await when_back(prefill, namespace_id, hashes)
        handed = await handed_off(prefill, "decode-1", namespace_id, hashes, source)
        assert (handed.blocks, handed.reason) == (BLOCKS, ""), handed

    run_cluster(body)


def test_what_is_not_known_here_either_is_still_refused(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = await Restartable.started(cluster)
        client, other = await agent.client(), await agent.client()
        namespace_id, hashes = await stored(client, BLOCKS)
        theirs = await other.allocate(BYTES)
        mine = await client.allocate(BYTES)
        await mine.aclose()
        await agent.restart()
        await when_back(client, namespace_id, hashes)
        with pytest.raises(InvalidRequest, match="unknown namespace"):
            await client.lookup(bytes(16), hashes)
        for memory in (mine, theirs):  # given back, or of somebody else
            running = await client.load(namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S)
            with pytest.raises(InvalidRequest, match="unknown region"):
                await running.result()

    run_cluster(body)


def test_memory_that_is_given_back_while_the_agent_is_gone_stays_so(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = await Restartable.started(cluster)
        client = await agent.client()
        namespace_id, hashes = await stored(client, BLOCKS)
        gone, kept = await client.allocate(BYTES), await client.allocate(BYTES)
        kill(cluster.processes[NAME])
        with pytest.raises(Unavailable):
            await client.lookup(namespace_id, hashes)
        await gone.aclose()
        await agent.start()
        await when_back(client, namespace_id, hashes)
        await load(client, namespace_id, hashes, kept)
        running = await client.load(namespace_id, hashes, gone, PLACES, deadline_s=WAIT_S)
        with pytest.raises(InvalidRequest, match="unknown region"):
            await running.result()

    run_cluster(body)


def test_memory_of_an_agent_that_stood_still_is_free_once_an_abort_returned(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualpath.client.remote_session.GRACE_S", 0.2)
    monkeypatch.setattr("dualpath.client.remote_session.CALL_S_MAX", 0.5)

    async def body(cluster: LoopbackCluster) -> None:
        filler = await cluster.embedded("filler")
        _, hashes = await stored(filler, BLOCKS)
        agent = await Restartable.started(cluster, storage_limit_bytes_per_s=1e6)
        client = await agent.client()
        namespace_id = await client.open_namespace(Namespace("model", LAYOUT))
        memory = await client.allocate(BYTES)
        running = await client.load(namespace_id, hashes, memory, PLACES, deadline_s=1.0)
        assert (await running.started()).hit_blocks == BLOCKS
        process = cluster.processes[NAME]
        process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(DualPathError):
                await running.result()
            with pytest.raises(DualPathError):
                await running.abort()
        finally:
            process.send_signal(signal.SIGCONT)
        end_at = asyncio.get_running_loop().time() + WAIT_S
        while True:
            try:
                await running.abort()
                break
            except DualPathError:
                assert asyncio.get_running_loop().time() < end_at, "no answer after it goes on"
        memory.view[:] = poison = b"\xa5" * BYTES
        # Whatever was on its way to the agent has arrived when a whole load after it has.
        other = await client.allocate(BYTES)
        again = await client.load(namespace_id, hashes, other, PLACES, deadline_s=WAIT_S)
        assert (await again.result()).blocks == BLOCKS
        assert memory.view == poison

    run_cluster(body)
