"""A load with a scheduler's read shares: both sides read theirs, and one all if the other fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
from dualpath.agent.outcome import LoadResult
from dualpath.agent.places import Places
from dualpath.client.kv_client import KVClient
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    kill,
    stored,
    wrong_blocks,
)
from dualpath.transfer.errors import InvalidRequest

Run: TypeAlias = Callable[..., None]

BLOCKS = 64
PLACES = Places.contiguous(LAYOUT, BLOCKS)
BYTES = BLOCKS * LAYOUT.block_bytes


async def loaded(
    client: KVClient, namespace_id: bytes, hashes: list[bytes], **settings: Any
) -> LoadResult:
    memory = await client.allocate(BYTES)
    load = await client.load(namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S, **settings)
    result = await load.result()
    assert result.blocks == BLOCKS
    assert wrong_blocks(memory, PLACES, hashes) == []
    await memory.aclose()
    return result


@pytest.mark.parametrize("remote", [False, True], ids=["embedded", "remote"])
def test_both_sides_read_their_shares(run_cluster: Run, remote: bool) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        for name in ("decode-1", "decode-2"):
            await cluster.relay(name)
        client = await (cluster.remote() if remote else cluster.embedded())
        namespace_id, hashes = await stored(client, BLOCKS)
        for share in (0.0, 0.25, 1.0):
            result = await loaded(
                client, namespace_id, hashes, decode_peer="decode-2", direct_share=share
            )
            direct, relayed = (result.shares.get(path, 0) for path in ("direct", "relay:decode-2"))
            assert direct + relayed == BYTES
            nearest = LAYOUT.block_bytes if 0 < share < 1 else 0
            assert abs(direct - share * BYTES) <= nearest
            assert not [name for name in result.events if name.startswith("fallback")]

    run_cluster(body)


def test_a_dead_decode_node_leaves_its_share_to_the_direct_path_with_a_reason(
    run_cluster: Run,
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        process = await cluster.relay_process("decode-1")
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, BLOCKS)
        assigned: dict[str, Any] = {"decode_peer": "decode-1", "direct_share": 0.25}
        assert (await loaded(client, namespace_id, hashes, **assigned)).shares["direct"] < BYTES
        kill(process)
        result = await loaded(client, namespace_id, hashes, **assigned)
        assert result.shares["direct"] == BYTES
        assert sum(n for name, n in result.events.items() if name.startswith("fallback:")) == 1

    run_cluster(body)


def test_shares_that_mean_nothing_are_refused_by_name(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, BLOCKS)
        for settings, match in (
            ({"direct_share": 1.5}, r"0\.\.1, not 1.5"),
            ({"direct_share": 0.5}, "name it as decode_peer"),
            ({"direct_share": 1.0, "policy": "split"}, "do not name 'split'"),
        ):
            with pytest.raises(InvalidRequest, match=match):
                await loaded(client, namespace_id, hashes, **settings)
        result = await loaded(client, namespace_id, hashes, decode_peer="no", direct_share=0.5)
        assert result.events["fallback:no_relay"] == 1

    run_cluster(body)
