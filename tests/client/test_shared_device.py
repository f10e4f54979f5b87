"""A relay whose bytes would come by the device of the direct path stands by for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
from dualpath.agent import load_routes
from dualpath.agent.places import Places
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    embedded_agent,
    stored,
    wrong_blocks,
)

Run: TypeAlias = Callable[..., None]
BLOCKS = 24


@pytest.mark.parametrize("shared", [True, False])
def test_a_split_goes_direct_where_both_paths_share_the_device(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        relay = await cluster.relay("decode-1")
        relaying_at = relay.agent.compute.transport.address

        def devices(address: str) -> frozenset[str]:
            return frozenset({"eth1" if address == relaying_at and not shared else "eth0"})

        monkeypatch.setattr(load_routes, "devices_towards", devices)
        client = await cluster.embedded(storage_limit_bytes_per_s=20e6)
        await embedded_agent(client).settled(WAIT_S)
        namespace_id, hashes = await stored(client, BLOCKS)
        memory = await client.allocate(BLOCKS * LAYOUT.block_bytes)
        places = Places.contiguous(LAYOUT, BLOCKS)
        load = await client.load(namespace_id, hashes, memory, places, deadline_s=WAIT_S)
        result = await load.result()
        assert result.blocks == BLOCKS
        assert set(result.shares) == {"direct"} | (set() if shared else {"relay:decode-1"})
        # It can still be asked for by name.
        by_name = await client.load(
            namespace_id,
            hashes,
            memory,
            places,
            deadline_s=WAIT_S,
            paths=("relay:decode-1",),
        )
        result = await by_name.result()
        assert set(result.shares) == {"relay:decode-1"}
        assert wrong_blocks(memory, places, hashes) == []

    run_cluster(body)
