"""Who says how fast it computes does not wait for loads that are slower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
from dualpath.agent.outcome import MissReason
from dualpath.agent.places import Places
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    embedded_agent,
    stored,
    wrong_blocks,
)
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.errors import InvalidRequest

Run: TypeAlias = Callable[..., None]

BLOCKS = 24
LIMIT_BYTES_PER_S = 6e6
LOAD_TOKENS_PER_S = LIMIT_BYTES_PER_S / LAYOUT.block_bytes * LAYOUT.block_tokens
FAST, SLOW = 20 * LOAD_TOKENS_PER_S, LOAD_TOKENS_PER_S / 20


@pytest.mark.parametrize("remote", [False, True], ids=["embedded", "remote"])
def test_a_load_is_refused_at_once_where_computing_is_faster(
    run_cluster: Run, remote: bool
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        filler = await cluster.embedded("filler")
        namespace_id, hashes = await stored(filler, BLOCKS)
        limited: dict[str, Any] = {"storage_limit_bytes_per_s": LIMIT_BYTES_PER_S}
        if remote:
            client = await cluster.remote(**limited)
        else:
            client = await cluster.embedded(**limited)
        await client.open_namespace(Namespace("model", LAYOUT))
        memory = await client.allocate(BLOCKS * LAYOUT.block_bytes)
        places = Places.contiguous(LAYOUT, BLOCKS)

        async def load(rate: float) -> tuple[int, MissReason, int]:
            load = await client.load(
                namespace_id, hashes, memory, places, deadline_s=WAIT_S, recompute_tokens_per_s=rate
            )
            result = await load.result()
            assert (await load.started()).hit_blocks == BLOCKS
            assert "computing" in result.detail or not result.detail
            return result.blocks, result.miss, sum(result.shares.values())

        # Until rates are known a load begins.
        assert (await load(SLOW))[:2] == (BLOCKS, MissReason.NONE)
        assert await load(FAST) == (0, MissReason.RECOMPUTE, 0)
        assert (await load(SLOW))[:2] == (BLOCKS, MissReason.NONE)
        assert wrong_blocks(memory, places, hashes) == []

    run_cluster(body)


def test_a_load_that_turns_out_slower_than_computing_is_cut_while_it_runs(
    run_cluster: Run,
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        filler = await cluster.embedded("filler")
        namespace_id, hashes = await stored(filler, 3 * BLOCKS)
        client = await cluster.embedded(storage_limit_bytes_per_s=LIMIT_BYTES_PER_S)
        await client.open_namespace(Namespace("model", LAYOUT))
        memory = await client.allocate(3 * BLOCKS * LAYOUT.block_bytes)
        places = Places.contiguous(LAYOUT, 3 * BLOCKS)
        load = await client.load(
            namespace_id, hashes, memory, places, deadline_s=WAIT_S, recompute_tokens_per_s=FAST
        )
        result = await load.result()
        assert result.miss is MissReason.RECOMPUTE
        assert result.blocks < 3 * BLOCKS
        assert result.events["shortened"] >= 1
        assert embedded_agent(client).loader.misses["recompute"] == 1
        assert all(at >= result.blocks for at in wrong_blocks(memory, places, hashes))

    run_cluster(body)


@pytest.mark.parametrize("rate", [-1.0, float("inf"), float("nan")])
def test_a_rate_that_is_none_is_refused_by_name(run_cluster: Run, rate: float) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, 1)
        memory = await client.allocate(LAYOUT.block_bytes)
        with pytest.raises(InvalidRequest, match="recompute_tokens_per_s"):
            await client.load(
                namespace_id,
                hashes,
                memory,
                Places.contiguous(LAYOUT, 1),
                deadline_s=WAIT_S,
                recompute_tokens_per_s=rate,
            )

    run_cluster(body)
