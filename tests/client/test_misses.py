"""A lookup or a load that finds less says why, in bounded time, and never raises for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from dualpath.agent.outcome import MissReason
from dualpath.agent.places import Places
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    chain,
    embedded_agent,
    fill,
    parents,
    stored,
    until,
    wrong_blocks,
)
from dualpath.kvstore.namespace import Namespace

Run: TypeAlias = Callable[..., None]


def test_absent_blocks_and_foreign_namespaces_are_misses_with_their_reason(
    run_cluster: Run,
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, 3)
        other = chain(3, "other")
        lookup = await client.lookup(namespace_id, other)
        assert (lookup.blocks, lookup.miss) == (0, MissReason.ABSENT)
        for foreign in (
            Namespace("model", LAYOUT, salt="another"),
            Namespace("another model", LAYOUT),
            Namespace("model", replace(LAYOUT, dtype="fp8")),
        ):
            foreign_id = await client.open_namespace(foreign)
            lookup = await client.lookup(foreign_id, hashes)
            assert (lookup.blocks, lookup.miss) == (0, MissReason.NAMESPACE), foreign
            assert lookup.detail
            memory = await client.allocate(3 * LAYOUT.block_bytes)
            load = await client.load(
                foreign_id, hashes, memory, Places.contiguous(LAYOUT, 3), deadline_s=WAIT_S
            )
            result = await load.result()
            assert (result.blocks, result.miss) == (0, MissReason.NAMESPACE)
            assert (await load.started()).hit_blocks == 0
            assert await load.wait_layer(0) == 0

    run_cluster(body)


def test_an_absent_daemon_is_a_miss_at_once_and_its_return_is_noticed(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded(lookup_timeout_s=1.0)
        namespace_id, hashes = await stored(client, 3)
        await cluster.stop_daemon()
        memory = await client.allocate(3 * LAYOUT.block_bytes)
        places = Places.contiguous(LAYOUT, 3)
        fill(memory, places, hashes)
        # Who waited for these deadlines would outlast the test's own limit.
        deadline_s = 600.0
        lookup = await client.lookup(namespace_id, hashes)
        assert (lookup.blocks, lookup.miss) == (0, MissReason.UNAVAILABLE)
        load = await client.load(namespace_id, hashes, memory, places, deadline_s=deadline_s)
        result = await load.result()
        assert (result.blocks, result.miss) == (0, MissReason.UNAVAILABLE)
        assert result.events == {"daemon_unavailable": 1}
        saved = await client.save(
            namespace_id, hashes, parents(hashes), memory, places, deadline_s=deadline_s
        )
        assert saved.reason == "daemon_unavailable"
        assert saved.detail
        assert saved.sealed_blocks == 0
        await cluster.start_daemon()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WAIT_S
        while (await client.lookup(namespace_id, hashes)).blocks < 3:
            assert loop.time() < deadline
            await asyncio.sleep(0.02)
        memory.view[:] = bytes(memory.nbytes)
        load = await client.load(namespace_id, hashes, memory, places, deadline_s=WAIT_S)
        assert (await load.result()).blocks == 3
        assert wrong_blocks(memory, places, hashes) == []

    run_cluster(body)


def test_an_agent_that_starts_without_any_daemon_answers_misses(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await cluster.stop_daemon()
        client = await cluster.embedded()
        namespace_id = await client.open_namespace(Namespace("model", LAYOUT))
        lookup = await client.lookup(namespace_id, chain(2))
        assert lookup.miss is MissReason.UNAVAILABLE
        await cluster.start_daemon()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WAIT_S
        while True:
            lookup = await client.lookup(namespace_id, chain(2))
            if lookup.miss is not MissReason.UNAVAILABLE:
                break
            assert loop.time() < deadline
            await asyncio.sleep(0.02)
        assert lookup.miss in (MissReason.NAMESPACE, MissReason.ABSENT)
        await stored(client, 2)

    run_cluster(body)


def test_a_load_that_cannot_end_in_time_is_a_shorter_prefix(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded(storage_limit_bytes_per_s=6e6)
        fast = await cluster.embedded("filler")
        namespace_id, hashes = await stored(fast, 24)
        await client.open_namespace(Namespace("model", LAYOUT))
        memory = await client.allocate(24 * LAYOUT.block_bytes)
        places = Places.contiguous(LAYOUT, 24)
        load = await client.load(namespace_id, hashes, memory, places, deadline_s=1.0)
        result = await load.result()
        # Some blocks are whole, though layers come before blocks.
        assert 1 <= result.blocks < 24
        assert result.miss is MissReason.DEADLINE
        assert result.events["shortened"] >= 1
        good = Places(places.layer_stride_bytes, places.base_bytes[: result.blocks])
        assert wrong_blocks(memory, good, hashes[: result.blocks]) == []
        # Fenced: what follows is not touched by writes of the load that ended.
        memory.view[:] = b"\x5a" * memory.nbytes
        again = await client.allocate(LAYOUT.block_bytes)
        one = Places.contiguous(LAYOUT, 1)
        load = await client.load(namespace_id, hashes[:1], again, one, deadline_s=WAIT_S)
        assert (await load.result()).blocks == 1
        assert memory.view == b"\x5a" * memory.nbytes

    run_cluster(body)


def test_blocks_that_are_being_written_are_pending(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        writer = await cluster.embedded("writer", storage_limit_bytes_per_s=4e6)
        reader = await cluster.embedded("reader")
        namespace_id, hashes = await stored(reader, 2)
        hashes += chain(10, "more")
        await writer.open_namespace(Namespace("model", LAYOUT))
        memory = await writer.allocate(10 * LAYOUT.block_bytes)
        places = Places.contiguous(LAYOUT, 10)
        fill(memory, places, hashes[2:])
        saving = asyncio.ensure_future(
            writer.save(namespace_id, hashes[2:], hashes[1:-1], memory, places, deadline_s=WAIT_S)
        )
        storage = embedded_agent(writer).storage["tcp"]
        await until(lambda: storage.sent_bytes > 0 or saving.done(), "the first bytes of the save")
        lookup = await reader.lookup(namespace_id, hashes)
        assert (lookup.blocks, lookup.miss) == (2, MissReason.PENDING)
        assert lookup.detail
        target = await reader.allocate(12 * LAYOUT.block_bytes)
        whole = Places.contiguous(LAYOUT, 12)
        load = await reader.load(namespace_id, hashes, target, whole, deadline_s=WAIT_S)
        result = await load.result()
        assert (result.blocks, result.miss) == (2, MissReason.PENDING)
        assert embedded_agent(reader).loader.misses["pending"] == 2
        assert (await saving).sealed_blocks == 10
        load = await reader.load(namespace_id, hashes, target, whole, deadline_s=WAIT_S)
        assert (await load.result()).blocks == 12
        assert wrong_blocks(target, whole, hashes) == []

    run_cluster(body)


def test_blocks_that_made_room_for_others_are_evicted(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded()
        namespace_id, old = await stored(client, 24)
        _, new = await stored(client, 40, seed="new")
        assert (await client.lookup(namespace_id, new)).blocks == 40
        lookup = await client.lookup(namespace_id, old)
        assert lookup.blocks < 24
        assert lookup.miss is MissReason.EVICTED
        assert lookup.detail
        memory = await client.allocate(24 * LAYOUT.block_bytes)
        places = Places.contiguous(LAYOUT, 24)
        load = await client.load(namespace_id, old, memory, places, deadline_s=WAIT_S)
        result = await load.result()
        assert (result.blocks, result.miss) == (lookup.blocks, MissReason.EVICTED)
        assert result.detail
        kept = Places.contiguous(LAYOUT, max(1, result.blocks))
        assert wrong_blocks(memory, kept, old[: result.blocks]) == []

    run_cluster(body, disk_bytes=32 << 20, segment_bytes=8 << 20)


def test_a_load_too_many_is_overloaded_and_the_running_one_completes(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        filler = await cluster.embedded("filler")
        namespace_id, hashes = await stored(filler, 12)
        client = await cluster.embedded(storage_limit_bytes_per_s=4e6, loads_max=1)
        await client.open_namespace(Namespace("model", LAYOUT))
        memory = await client.allocate(12 * LAYOUT.block_bytes)
        places = Places.contiguous(LAYOUT, 12)
        running = await client.load(namespace_id, hashes, memory, places, deadline_s=WAIT_S)
        assert (await running.started()).hit_blocks == 12
        other = await client.allocate(12 * LAYOUT.block_bytes)
        refused = await client.load(namespace_id, hashes, other, places, deadline_s=WAIT_S)
        result = await refused.result()
        assert (result.blocks, result.miss) == (0, MissReason.OVERLOADED)
        assert result.events == {"overloaded": 1}
        assert "running" in result.detail
        assert not running.done
        assert other.view == bytes(other.nbytes)
        assert (await running.result()).blocks == 12
        assert wrong_blocks(memory, places, hashes) == []
        again = await client.load(namespace_id, hashes, other, places, deadline_s=WAIT_S)
        assert (await again.result()).blocks == 12

    run_cluster(body)


def test_chains_of_an_absent_daemon_are_misses_while_those_of_another_load(
    run_cluster: Run,
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded(daemons=(cluster.address, "127.0.0.1:1"))
        namespace_id = await client.open_namespace(Namespace("model", LAYOUT))
        reasons = set()
        for number in range(12):
            hashes = chain(1, f"root {number}")
            lookup = await client.lookup(namespace_id, hashes)
            reasons.add(lookup.miss)
        assert MissReason.UNAVAILABLE in reasons
        assert len(reasons) == 2

    run_cluster(body)
