"""kill -9 of the daemon under loads and saves: each ends in time, says why, and the next works."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import TypeAlias

import pytest
from dualpath.agent.outcome import MissReason, SaveResult
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
from dualpath.transfer.errors import Unavailable

Run: TypeAlias = Callable[..., None]

BLOCKS = 24
PLACES = Places.contiguous(LAYOUT, BLOCKS)
SLOW = 6e6
"""Bytes a second: slow enough to be in the middle when the daemon is killed."""


async def slow_client(cluster: LoopbackCluster, timeout_s: float) -> tuple[KVClient, EngineMemory]:
    client = await cluster.embedded(
        storage_limit_bytes_per_s=SLOW, lookup_timeout_s=timeout_s, reconnect_s_max=0.2
    )
    await client.open_namespace(Namespace("model", LAYOUT))
    return client, await client.allocate(PLACES.span(LAYOUT, BLOCKS)[1])


async def back(client: KVClient, namespace_id: bytes, hashes: list[bytes]) -> int:
    """Wait until the daemon is asked again, without any help; how many blocks it has."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + WAIT_S
    while True:
        lookup = await client.lookup(namespace_id, hashes)
        if lookup.miss is not MissReason.UNAVAILABLE:
            return lookup.blocks
        assert loop.time() < deadline, lookup
        await asyncio.sleep(0.02)


async def loads_all(
    client: KVClient, namespace_id: bytes, hashes: list[bytes], memory: EngineMemory
) -> None:
    memory.view[:] = bytes(memory.nbytes)
    load = await client.load(namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S)
    result = await load.result()
    assert (result.blocks, result.miss) == (BLOCKS, MissReason.NONE), result
    assert wrong_blocks(memory, PLACES, hashes) == []


def test_a_load_whose_daemon_is_killed_ends_with_what_is_verified(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        namespace_id, hashes = await stored(await cluster.embedded("filler"), BLOCKS)
        await cluster.stop_daemon()
        victim = await cluster.daemon_process()
        client, memory = await slow_client(cluster, 0.5)
        load = await client.load(namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S)
        counts = embedded_agent(client).loads[cluster.address].counts
        await until(lambda: counts.bytes["direct"] > 2 * LAYOUT.block_bytes, "some chunks")
        kill(victim)
        result = await load.result()
        assert (result.blocks < BLOCKS, result.miss) == (True, MissReason.UNAVAILABLE)
        assert result.elapsed_s < WAIT_S / 2
        assert result.events["daemon_unavailable"] == 1
        assert result.events["path_lost"] >= 1
        part = Places.contiguous(LAYOUT, max(1, result.blocks))
        assert wrong_blocks(memory, part, hashes[: result.blocks]) == []
        agent = embedded_agent(client)
        assert agent.loader.misses["unavailable"] == 1
        assert agent.events()["daemon_unavailable"] == 1
        await cluster.daemon_process()
        assert await back(client, namespace_id, hashes) == BLOCKS
        await loads_all(client, namespace_id, hashes, memory)

    run_cluster(body)


def test_a_load_goes_on_when_its_killed_daemon_comes_back_in_time(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        namespace_id, hashes = await stored(await cluster.embedded("filler"), BLOCKS)
        await cluster.stop_daemon()
        victim = await cluster.daemon_process()
        client, memory = await slow_client(cluster, WAIT_S)
        load = await client.load(namespace_id, hashes, memory, PLACES, deadline_s=2 * WAIT_S)
        counts = embedded_agent(client).loads[cluster.address].counts
        await until(lambda: counts.bytes["direct"] > 2 * LAYOUT.block_bytes, "some chunks")
        kill(victim)
        await cluster.daemon_process()
        result = await load.result()
        assert (result.blocks, result.miss) == (BLOCKS, MissReason.NONE), result
        assert result.events["path_lost"] >= 1
        assert result.events["lease_expired"] >= 1
        assert wrong_blocks(memory, PLACES, hashes) == []

    run_cluster(body)


def test_an_agent_stops_in_time_though_a_save_waits_for_a_silent_daemon(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await cluster.stop_daemon()
        silent = await cluster.daemon_process()
        unix = str(cluster.path / "agent.sock")
        server = await cluster.relay("prefill-1", unix=unix, storage_limit_bytes_per_s=SLOW)
        client = await KVClient.connect(f"unix:{unix}")
        cluster.stack.push_async_callback(client.close)
        namespace_id = await client.open_namespace(Namespace("model", LAYOUT))
        memory = await client.allocate(PLACES.span(LAYOUT, BLOCKS)[1])
        hashes = chain(BLOCKS)
        saving = asyncio.ensure_future(
            client.save(
                namespace_id, hashes, parents(hashes), memory, PLACES, deadline_s=6 * WAIT_S
            )
        )
        storage = server.agent.storage["tcp"]
        await until(lambda: storage.sent_bytes > LAYOUT.block_bytes, "some chunks")
        silent.send_signal(signal.SIGSTOP)
        try:
            await asyncio.wait_for(server.stop(), 2 * WAIT_S)
            with pytest.raises(Unavailable):
                await asyncio.wait_for(saving, WAIT_S)
        finally:
            silent.send_signal(signal.SIGCONT)

    run_cluster(body)


def test_a_save_whose_daemon_is_killed_says_so_and_can_be_repeated(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await cluster.stop_daemon()
        victim = await cluster.daemon_process()
        client, memory = await slow_client(cluster, 0.5)
        namespace_id = await client.open_namespace(Namespace("model", LAYOUT))
        hashes = chain(BLOCKS)
        fill(memory, PLACES, hashes)
        loop = asyncio.get_running_loop()
        began = loop.time()

        def save() -> asyncio.Future[SaveResult]:
            return asyncio.ensure_future(
                client.save(
                    namespace_id, hashes, parents(hashes), memory, PLACES, deadline_s=WAIT_S
                )
            )

        saving = save()
        storage = embedded_agent(client).storage["tcp"]
        await until(lambda: storage.sent_bytes > 2 * LAYOUT.block_bytes, "some chunks")
        assert not saving.done()
        kill(victim)
        result = await saving
        assert loop.time() - began < WAIT_S
        assert result.reason in ("peer_lost", "daemon_unavailable")
        assert result.detail
        assert result.sealed_blocks < BLOCKS
        assert embedded_agent(client).saver.events[result.reason] >= 1
        await cluster.daemon_process()
        served = await back(client, namespace_id, hashes)
        # Acknowledged blocks are there, and nothing torn: what is there is checked below.
        assert result.sealed_blocks <= served <= BLOCKS
        again = await save()
        assert (again.present_blocks, again.reason) == (BLOCKS, "")
        await loads_all(client, namespace_id, hashes, memory)

    run_cluster(body)
