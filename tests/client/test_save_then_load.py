"""What was saved is loaded back, byte for byte, by every path and policy."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeAlias

import pytest
from dualpath.agent.outcome import MissReason
from dualpath.agent.places import Places
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    chain,
    fill,
    parents,
    stored,
    wrong_blocks,
)
from dualpath.kvstore.fd_file import FdFile
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.store_api import ReserveStatus, SealStatus

Run: TypeAlias = Callable[..., None]

BLOCKS = 24
BYTES = BLOCKS * LAYOUT.block_bytes
PLACES = Places.contiguous(LAYOUT, BLOCKS)

TINY = KVLayout(layers=2, block_tokens=4, layer_bytes=3000, dtype="bf16")
"""One chunk a block, nothing aligned."""
LARGE = KVLayout(layers=4, block_tokens=64, layer_bytes=6 << 20, dtype="bf16")
"""64 chunks of 384 KiB a block."""


@pytest.mark.parametrize("behind_compute_link", [False, True])
@pytest.mark.parametrize("remote", [False, True], ids=["embedded", "remote"])
def test_every_path_and_policy_loads_what_was_saved(
    run_cluster: Run, remote: bool, behind_compute_link: bool
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await cluster.relay("decode-1")
        client = await (cluster.remote() if remote else cluster.embedded())
        namespace_id, hashes = await stored(client, BLOCKS)
        memory = await client.allocate(BYTES, behind_compute_link=behind_compute_link)
        for policy, paths, used in (
            ("direct", (), {"direct"}),
            ("round-robin", (), None),
            ("shorter-queue", (), None),
            ("split", ("direct",), {"direct"}),
            ("split", ("relay:decode-1",), {"relay:decode-1"}),
            ("split", (), None),
        ):
            memory.view[:] = bytes(BYTES)
            load = await client.load(
                namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S, policy=policy, paths=paths
            )
            started = await load.started()
            assert (started.hit_blocks, started.miss) == (BLOCKS, MissReason.NONE)
            for layer in range(LAYOUT.layers):
                assert await load.wait_layer(layer) == BLOCKS
            result = await load.result()
            assert (result.blocks, result.miss, result.nbytes) == (BLOCKS, MissReason.NONE, BYTES)
            assert sum(result.shares.values()) == BYTES
            assert used is None or set(result.shares) == used
            # A busy machine may look like a slow path.
            assert set(result.events) <= {"overtaken", "stalled"}, result
            assert wrong_blocks(memory, PLACES, hashes) == []
        stats = await client.stats()
        assert stats.loads_done == 6
        while stats.staging_used_bytes:  # the relay hears of its last write after the loader
            await asyncio.sleep(0.005)
            stats = await client.stats()
        if behind_compute_link:
            inward = next(link for link in stats.link if link.link == "compute_in")
            assert inward.bytes >= 6 * BYTES

    run_cluster(body)


def test_a_split_load_uses_every_relay(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        rate = 40e6
        await cluster.relay("decode-1", storage_limit_bytes_per_s=rate)
        await cluster.relay("decode-2", storage_limit_bytes_per_s=rate)
        client = await cluster.embedded(storage_limit_bytes_per_s=rate)
        namespace_id, hashes = await stored(client, BLOCKS)
        memory = await client.allocate(BYTES)
        load = await client.load(namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S)
        result = await load.result()
        assert result.blocks == BLOCKS
        assert set(result.shares) == {"direct", "relay:decode-1", "relay:decode-2"}
        assert min(result.shares.values()) > BYTES / 6, result
        assert wrong_blocks(memory, PLACES, hashes) == []

    run_cluster(body)


@pytest.mark.parametrize("layout", [TINY, LARGE], ids=["tiny", "large"])
def test_layouts_of_any_size_pass_all_paths(run_cluster: Run, layout: KVLayout) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await cluster.relay("decode-1")
        client = await cluster.embedded()
        count = 3 if layout is LARGE else 300
        namespace_id, hashes = await stored(client, count, layout=layout)
        places = Places.contiguous(layout, count)
        memory = await client.allocate(layout.block_bytes * count)
        for paths in ((), ("relay:decode-1",)):
            memory.view[:] = bytes(memory.nbytes)
            load = await client.load(
                namespace_id, hashes, memory, places, deadline_s=WAIT_S, paths=paths
            )
            assert (await load.result()).blocks == count
            assert wrong_blocks(memory, places, hashes, layout) == []

    run_cluster(body, disk_bytes=512 << 20, dram_bytes=192 << 20)


def test_paged_memory_is_filled_layer_by_layer_where_the_pages_are(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await cluster.relay("decode-1")
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, 8)
        pages_max = 16
        places = Places.paged(LAYOUT, (3, 1, 15, 0, 7, 8, 2, 11), pages_max)
        memory = await client.allocate(LAYOUT.layers * LAYOUT.layer_bytes * pages_max)
        memory.view[:] = b"\xee" * memory.nbytes
        load = await client.load(namespace_id, hashes, memory, places, deadline_s=WAIT_S)
        assert (await load.result()).blocks == 8
        assert wrong_blocks(memory, places, hashes) == []
        for page in set(range(pages_max)) - {3, 1, 15, 0, 7, 8, 2, 11}:
            for layer in range(LAYOUT.layers):
                offset = (layer * pages_max + page) * LAYOUT.layer_bytes
                piece = bytes(memory.view[offset : offset + LAYOUT.layer_bytes])
                assert piece == b"\xee" * LAYOUT.layer_bytes
        # And from there back into the store, under another salt.
        other = await client.open_namespace(Namespace("model", LAYOUT, salt="other"))
        saved = await client.save(other, hashes, parents(hashes), memory, places, deadline_s=WAIT_S)
        assert saved.sealed_blocks == 8
        assert saved.present_blocks == 8

    run_cluster(body)


def test_many_loads_at_once_all_complete(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await cluster.relay("decode-1")
        await cluster.relay("decode-2")
        client = await cluster.remote()
        namespace_id, hashes = await stored(client, BLOCKS)
        loads = []
        for number in range(12):
            count = BLOCKS - number
            memory = await client.allocate(
                count * LAYOUT.block_bytes, behind_compute_link=number % 3 == 0
            )
            places = Places.contiguous(LAYOUT, count)
            policy = ("split", "round-robin", "shorter-queue", "direct")[number % 4]
            load = await client.load(
                namespace_id, hashes[:count], memory, places, deadline_s=WAIT_S, policy=policy
            )
            loads.append((load, memory, places, count))
        results = await asyncio.gather(*(load.result() for load, _, _, _ in loads))
        for result, (_, memory, places, count) in zip(results, loads, strict=True):
            assert result.blocks == count, result
            assert wrong_blocks(memory, places, hashes[:count]) == []

    run_cluster(body)


def test_saving_twice_stores_once_and_a_gap_in_the_chain_is_refused(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, 4)
        more = chain(8)
        assert more[:4] == hashes
        memory = await client.allocate(8 * LAYOUT.block_bytes)
        places = Places.contiguous(LAYOUT, 8)
        fill(memory, places, more)
        again = await client.save(
            namespace_id, more, parents(more), memory, places, deadline_s=WAIT_S
        )
        assert again.reserved[:4] == (ReserveStatus.EXISTS,) * 4
        assert again.sealed == (None,) * 4 + (SealStatus.SEALED,) * 4
        assert again.present_blocks == 8
        orphan = chain(3, "elsewhere")
        gap = await client.save(
            namespace_id,
            orphan[1:],
            orphan[:2],
            memory,
            Places.contiguous(LAYOUT, 2),
            deadline_s=WAIT_S,
        )
        assert gap.reserved == (ReserveStatus.NO_PARENT,) * 2
        assert gap.reason == "no_parent"
        assert gap.present_blocks == 0

    run_cluster(body)


def test_a_daemon_on_this_host_is_reached_over_shared_memory(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        unix = f"unix:{cluster.unix}"
        await cluster.relay("decode-1", daemons=(unix,))
        client = await cluster.embedded(daemons=(unix,))
        namespace_id, hashes = await stored(client, BLOCKS)
        for behind in (False, True):
            memory = await client.allocate(BYTES, behind_compute_link=behind)
            for paths in (("direct",), ("relay:decode-1",), ()):
                memory.view[:] = bytes(BYTES)
                load = await client.load(
                    namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S, paths=paths
                )
                result = await load.result()
                assert result.blocks == BLOCKS, result
                assert wrong_blocks(memory, PLACES, hashes) == []

    run_cluster(body)


def test_a_longer_chain_loads_the_prefix_that_is_stored(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await cluster.relay("decode-1")
        client = await cluster.remote()
        namespace_id, hashes = await stored(client, 5)
        longer = [*hashes, *chain(3, "not there")]
        lookup = await client.lookup(namespace_id, longer)
        assert (lookup.blocks, lookup.miss) == (5, MissReason.ABSENT)
        assert len(lookup.tiers) == 5
        memory = await client.allocate(8 * LAYOUT.block_bytes)
        memory.view[:] = b"\xaa" * memory.nbytes
        places = Places.contiguous(LAYOUT, 8)
        load = await client.load(namespace_id, longer, memory, places, deadline_s=WAIT_S)
        result = await load.result()
        assert (result.blocks, result.requested_blocks) == (5, 8)
        assert result.miss is MissReason.ABSENT
        assert wrong_blocks(memory, Places.contiguous(LAYOUT, 5), hashes) == []
        rest = memory.view[5 * LAYOUT.block_bytes :]
        assert bytes(rest) == b"\xaa" * rest.nbytes

    run_cluster(body)


def test_a_durable_save_waits_for_blocks_that_exist_but_are_not_written_back(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    sync = FdFile.sync

    def slow_sync(file: FdFile) -> None:
        assert gate.wait(WAIT_S)
        sync(file)

    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded()
        namespace_id, _ = await stored(client, 1, seed="other")  # so that there is a segment
        monkeypatch.setattr(FdFile, "sync", slow_sync)
        hashes = chain(2)
        memory = await client.allocate(2 * LAYOUT.block_bytes)
        places = Places.contiguous(LAYOUT, 2)
        fill(memory, places, hashes)
        args = (namespace_id, hashes, parents(hashes), memory, places)
        try:
            await client.save(*args, durable=False, deadline_s=WAIT_S)
            waiting = asyncio.ensure_future(client.save(*args, durable=True, deadline_s=WAIT_S))
            _, still = await asyncio.wait([waiting], timeout=0.2)
            assert still, "acknowledged as durable while it was not"
        finally:
            gate.set()
        result = await waiting
        assert set(result.reserved) == {ReserveStatus.EXISTS}
        assert not result.reason

    run_cluster(body)
