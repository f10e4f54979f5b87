"""Tokens between agents, daemons and engines; what the metrics show."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Callable
from typing import Any, TypeAlias

import grpc
import pytest
from dualpath.agent import attachments
from dualpath.agent.outcome import MissReason
from dualpath.agent.places import Places
from dualpath.agent.process import AgentServer
from dualpath.client.embedded_session import EmbeddedSession
from dualpath.client.kv_client import KVClient
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    chain,
    embedded_agent,
    stored,
    until,
    wrong_blocks,
)
from dualpath.kvstore.namespace import Namespace
from dualpath.proto.v1 import agent_pb2_grpc, common_pb2
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


def test_a_peer_under_a_name_that_could_forge_logs_and_paths_is_refused(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await cluster.relay("decode-1")
        async with grpc.aio.insecure_channel(cluster.relays["decode-1"]) as channel:
            stub: Any = agent_pb2_grpc.AgentStub(channel)
            for name in ("", "a" * 65, "a\nb", "relay:x", "a/b"):
                request = common_pb2.AttachRequest(name=name, transports=["tcp"])
                with pytest.raises(grpc.RpcError, match=r"1\.\.64 characters") as refused:
                    await stub.Attach(request, timeout=WAIT_S)
                assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            request = common_pb2.AttachRequest(name="prefill-1", transports=["tcp"])
            assert (await stub.Attach(request, timeout=WAIT_S)).session

    run_cluster(body)


def test_an_agent_attaches_after_another_caller_took_what_it_may(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attachments, "ATTACHMENTS_MAX", 16)
    monkeypatch.setattr(attachments, "UNPROVEN_S", 1.0)

    async def body(cluster: LoopbackCluster) -> None:
        await cluster.relay("decode-1")
        async with grpc.aio.insecure_channel(cluster.relays["decode-1"]) as channel:
            stub: Any = agent_pb2_grpc.AgentStub(channel)
            request = common_pb2.AttachRequest(name="bad", transports=["tcp"])
            answers = await asyncio.gather(
                *(stub.Attach(request, timeout=WAIT_S) for _ in range(16)), return_exceptions=True
            )
            assert sum(isinstance(each, grpc.RpcError) for each in answers) == 8
            client = await cluster.embedded("good", reconnect_s_max=0.2)
            link = embedded_agent(client).relays["decode-1"].link
            await until(lambda: link.up, "the good one is attached")

    run_cluster(body)


def test_metrics_count_what_happened(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        relaying = await cluster.relay("decode-1", metrics_listen="127.0.0.1:0")
        loading = await cluster.relay(
            "prefill-1",
            metrics_listen="127.0.0.1:0",
            relays=(f"decode-1={cluster.relays['decode-1']}",),
        )
        client = KVClient(EmbeddedSession(loading.agent))
        namespace_id, hashes = await stored(client, 4)
        memory = await client.allocate(4 * LAYOUT.block_bytes)
        places = Places.contiguous(LAYOUT, 4)
        for path in ("direct", "relay:decode-1"):
            load = await client.load(
                namespace_id, hashes, memory, places, deadline_s=WAIT_S, paths=(path,)
            )
            assert (await load.result()).blocks == 4
        load = await client.load(
            namespace_id,
            chain(1, "absent"),
            memory,
            Places.contiguous(LAYOUT, 1),
            deadline_s=WAIT_S,
        )
        assert (await load.result()).miss is MissReason.ABSENT

        def scrape(server: AgentServer) -> str:
            url = f"http://{server.metrics_address}/metrics"
            with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
                return str(answer.read().decode())

        # The relay hears of the last write after the loader has verified it.
        relay = relaying.agent.relay
        await until(lambda: relay.relayed_bytes == 4 * LAYOUT.block_bytes, "the relay's count")
        await until(lambda: relay.staging.used_bytes == 0, "an empty staging")
        text = await asyncio.to_thread(scrape, loading)
        daemon = f"daemon {cluster.address}"
        for line in (
            'dualpath_agent_misses_total{reason="absent"} 1.0',
            'dualpath_agent_path_up{path="direct"} 1.0',
            'dualpath_agent_path_bytes_total{path="direct"} 2.56e+06',
            'dualpath_agent_path_chunks_total{path="relay:decode-1"} 12.0',
            'dualpath_agent_chunk_seconds_bucket{le="+Inf",path="direct"} 12.0',
            'dualpath_agent_chunk_seconds_count{path="relay:decode-1"} 12.0',
            "dualpath_agent_load_seconds_count 3.0",
            'dualpath_agent_tier_blocks_total{tier="dram"} 8.0',
            'dualpath_agent_link_bytes_total{link="storage"} 2.56e+06',
            'dualpath_agent_link_chunks_total{link="storage"} 12.0',
            'dualpath_agent_link_chunks_total{link="compute_in"} 12.0',
            f'dualpath_agent_peer_bytes_total{{link="storage",peer="{daemon}"}} 2.56e+06',
            f'dualpath_agent_peer_bytes_total{{link="storage_out",peer="{daemon}"}} 2.56e+06',
            'dualpath_agent_peer_bytes_total{link="compute_in",peer="relay decode-1"} 2.56e+06',
        ):
            assert line in text, line
        text = await asyncio.to_thread(scrape, relaying)
        for line in (
            "dualpath_agent_relayed_bytes_total 2.56e+06",
            "dualpath_agent_staging_used_bytes 0.0",
            'dualpath_agent_link_chunks_total{link="compute_out"} 12.0',
            'dualpath_agent_peer_bytes_total{link="compute_out",peer="prefill-1"} 2.56e+06',
        ):
            assert line in text, line

    run_cluster(body)
