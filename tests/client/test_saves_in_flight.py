"""Batches of one save that are on their way together: their order, their room, their end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
from dualpath.agent import save_batch
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
    wrong_blocks,
)
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.store_api import ReserveStatus, SealStatus

Run: TypeAlias = Callable[..., None]

BLOCKS = 24
PLACES = Places.contiguous(LAYOUT, BLOCKS)
LARGE = KVLayout(layers=4, block_tokens=64, layer_bytes=6 << 20, dtype="bf16")
"""One block a batch."""


def test_a_save_larger_than_the_memory_of_the_daemon_waits_for_its_own_batches(
    run_cluster: Run,
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, 6, layout=LARGE)
        places = Places.contiguous(LARGE, 6)
        memory = await client.allocate(6 * LARGE.block_bytes)
        load = await client.load(namespace_id, hashes, memory, places, deadline_s=WAIT_S)
        assert (await load.result()).blocks == 6
        assert wrong_blocks(memory, places, hashes, LARGE) == []

    run_cluster(body, disk_bytes=512 << 20, dram_bytes=60 << 20)


@pytest.mark.parametrize("durable", [False, True])
def test_a_chain_in_many_batches_is_sealed_in_its_order(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    monkeypatch.setattr(save_batch, "BATCH_BLOCKS", 2)

    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded()
        namespace_id, _ = await stored(client, 5)  # a part is there, and ends inside of a batch
        hashes = chain(BLOCKS)
        memory = await client.allocate(BLOCKS * LAYOUT.block_bytes)
        fill(memory, PLACES, hashes)
        saved = await client.save(
            namespace_id,
            hashes,
            parents(hashes),
            memory,
            PLACES,
            durable=durable,
            deadline_s=WAIT_S,
        )
        assert saved.reserved[:5] == (ReserveStatus.EXISTS,) * 5
        assert saved.sealed[5:] == (SealStatus.SEALED,) * (BLOCKS - 5), saved
        memory.view[:] = bytes(memory.nbytes)
        load = await client.load(namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S)
        assert (await load.result()).blocks == BLOCKS
        assert wrong_blocks(memory, PLACES, hashes) == []

    run_cluster(body)


def test_a_save_that_is_cancelled_leaves_the_memory_and_the_daemon_usable(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_batch, "BATCH_BLOCKS", 1)

    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded()
        namespace_id, _ = await stored(client, 1)
        memory = await client.allocate(BLOCKS * LAYOUT.block_bytes)
        for turns in (5, 20, 60):
            hashes = chain(BLOCKS, f"cancelled {turns}")
            fill(memory, PLACES, hashes)
            saving = asyncio.create_task(
                client.save(
                    namespace_id, hashes, parents(hashes), memory, PLACES, deadline_s=WAIT_S
                )
            )
            for _ in range(turns):
                await asyncio.sleep(0)  # let it come so far
            saving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await saving
            after = chain(BLOCKS, f"after {turns}")
            fill(memory, PLACES, after)
            saved = await client.save(
                namespace_id, after, parents(after), memory, PLACES, deadline_s=WAIT_S
            )
            assert saved.sealed_blocks == BLOCKS, saved

    run_cluster(body)


@pytest.mark.parametrize("wrong", ["short", "window", "sealed"])
def test_an_answer_that_is_none_is_the_daemons_mistake_and_costs_one_save(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded()
        namespace_id, _ = await stored(client, 1)
        memory = await client.allocate(BLOCKS * LAYOUT.block_bytes)
        (link,) = embedded_agent(client).daemons.values()
        reserve, seal = link.reserve, link.seal

        async def reserved(*arguments: Any, **named: Any) -> Any:
            answer = await reserve(*arguments, **named)
            if wrong == "short":
                del answer.first_tag[-1]
            elif wrong == "window":
                answer.window = b"none"
            return answer

        async def sealed(*arguments: Any, **named: Any) -> Any:
            statuses = await seal(*arguments, **named)
            return statuses[:-1] if wrong == "sealed" else statuses

        with monkeypatch.context() as patch:
            patch.setattr(link, "reserve", reserved)
            patch.setattr(link, "seal", sealed)
            hashes = chain(BLOCKS, "wrong")
            fill(memory, PLACES, hashes)
            saved = await client.save(
                namespace_id, hashes, parents(hashes), memory, PLACES, deadline_s=WAIT_S
            )
            assert (saved.reason, saved.sealed_blocks) == ("daemon_unavailable", 0), saved
        after = chain(BLOCKS, "after")
        fill(memory, PLACES, after)
        saved = await client.save(
            namespace_id, after, parents(after), memory, PLACES, deadline_s=WAIT_S
        )
        assert saved.sealed_blocks == BLOCKS, saved

    run_cluster(body)
