"""Tokens between agents, daemons and engines; what the metrics show."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Callable
from typing import TypeAlias

import pytest
from dualpath.agent.outcome import MissReason
from dualpath.agent.places import Places
from dualpath.client.kv_client import KVClient
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    chain,
    stored,
    until,
    wrong_blocks,
)
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.errors import PermissionDenied

Run: TypeAlias = Callable[..., None]

TOKEN = "correct horse battery"
WRONG = "staple staple staple"


def test_tokens_open_daemon_and_relay_and_wrong_ones_are_misses(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await cluster.relay("decode-1", token=TOKEN, tokens=(TOKEN,))
        client = await cluster.embedded(token=TOKEN)
        namespace_id, hashes = await stored(client, 4)
        memory = await client.allocate(4 * LAYOUT.block_bytes)
        places = Places.contiguous(LAYOUT, 4)
        load = await client.load(
            namespace_id, hashes, memory, places, deadline_s=WAIT_S, paths=("relay:decode-1",)
        )
        assert (await load.result()).blocks == 4
        assert wrong_blocks(memory, places, hashes) == []
        stranger = await cluster.embedded("stranger", token=WRONG)
        await stranger.open_namespace(Namespace("model", LAYOUT))
        lookup = await stranger.lookup(namespace_id, hashes)
        assert lookup.miss is MissReason.UNAVAILABLE
        assert "token" in lookup.detail
        bare = await KVClient.connect(cluster.relays["decode-1"])
        with pytest.raises(PermissionDenied, match="token"):
            await bare.stats()
        await bare.close()

    run_cluster(body, tokens=(TOKEN,))


def test_metrics_count_what_happened(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        server = await cluster.relay("decode-1", metrics_listen="127.0.0.1:0")
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, 4)
        memory = await client.allocate(4 * LAYOUT.block_bytes)
        places = Places.contiguous(LAYOUT, 4)
        load = await client.load(
            namespace_id, hashes, memory, places, deadline_s=WAIT_S, paths=("relay:decode-1",)
        )
        assert (await load.result()).blocks == 4
        await server.agent.loader.lookup(
            await server.agent.open_namespace(Namespace("model", LAYOUT)), chain(1, "absent")
        )

        def scrape() -> str:
            url = f"http://{server.metrics_address}/metrics"
            with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
                return str(answer.read().decode())

        # The relay hears of the last write after the loader has verified it.
        relay = server.agent.relay
        await until(lambda: relay.relayed_bytes == 4 * LAYOUT.block_bytes, "the relay's count")
        await until(lambda: relay.staging.used_bytes == 0, "an empty staging")
        text = await asyncio.to_thread(scrape)
        assert "dualpath_agent_relayed_bytes_total 2.56e+06" in text
        assert 'dualpath_agent_misses_total{reason="absent"} 1.0' in text
        assert 'dualpath_agent_path_up{path="direct"} 1.0' in text
        assert "dualpath_agent_load_seconds_bucket" in text
        assert "dualpath_agent_staging_used_bytes 0.0" in text

    run_cluster(body)
