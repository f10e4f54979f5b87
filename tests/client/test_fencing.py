"""When a load is over, however it ended, nothing more is written into its memory."""

from __future__ import annotations

import asyncio
import os
import signal
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
    stored,
    wrong_blocks,
)
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.fault_plan import FaultPlan
from dualpath.transfer.fault_transport import FaultTransport
from dualpath.transfer.tcp_transport import TcpTransport
from dualpath.transfer.transport import OnPeerLost, Transport

Run: TypeAlias = Callable[..., None]

BLOCKS = 24
BYTES = BLOCKS * LAYOUT.block_bytes
PLACES = Places.contiguous(LAYOUT, BLOCKS)
SLOW = 10e6
CANARY = b"\xc3"


def stale(name: str, on_peer_lost: OnPeerLost) -> Transport:
    """Every write comes twice, and once more long after it was answered."""
    plan = FaultPlan(seed=3, duplicate=1.0, stale=1.0, delay=0.5, stale_s_max=0.5)
    return FaultTransport(TcpTransport(name, on_peer_lost), plan)


async def begun(client: KVClient, hashes: list[bytes], behind: bool):  # type: ignore[no-untyped-def]
    namespace_id = await client.open_namespace(Namespace("model", LAYOUT))
    memory = await client.allocate(BYTES, behind_compute_link=behind)
    load = await client.load(namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S)
    await load.wait_layer(0)
    return load, memory


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("remote", [False, True], ids=["embedded", "remote"])
def test_an_aborted_load_leaves_reused_memory_alone(
    run_cluster: Run, remote: bool, behind: bool
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        filler = await cluster.embedded("filler")
        _, hashes = await stored(filler, BLOCKS)
        await cluster.relay("decode-1", storage_limit_bytes_per_s=SLOW, make_compute=stale)
        make = cluster.remote if remote else cluster.embedded
        client = await make(storage_limit_bytes_per_s=SLOW)
        for _ in range(3):
            load, memory = await begun(client, hashes, behind)
            await load.abort()
            memory.view[:] = CANARY * BYTES
            result = await load.result()
            assert result.miss is MissReason.UNAVAILABLE
            assert result.events["aborted"] == 1
            # Give what is still under way the time to arrive: another load passes it.
            other = await client.allocate(LAYOUT.block_bytes * 4)
            namespace_id = await client.open_namespace(Namespace("model", LAYOUT))
            four = Places.contiguous(LAYOUT, 4)
            again = await client.load(namespace_id, hashes[:4], other, four, deadline_s=WAIT_S)
            assert (await again.result()).blocks == 4
            assert wrong_blocks(other, four, hashes[:4]) == []
            assert memory.view == CANARY * BYTES
            await memory.aclose()

    run_cluster(body)


def test_stale_and_duplicate_writes_never_land_after_their_load(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        relay = await cluster.relay("decode-1", make_compute=stale)
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, BLOCKS)
        memory = await client.allocate(BYTES)
        for _ in range(4):
            load = await client.load(
                namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S, paths=("relay:decode-1",)
            )
            assert (await load.result()).blocks == BLOCKS
            assert wrong_blocks(memory, PLACES, hashes) == []
            memory.view[:] = CANARY * BYTES
        transport = relay.agent.compute.transport
        assert isinstance(transport, FaultTransport)
        # All stale copies have been sent (and refused) once it has closed.
        await relay.stop()
        assert memory.view == CANARY * BYTES

    run_cluster(body)


def test_memory_can_be_closed_in_the_middle_of_its_loads(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        filler = await cluster.embedded("filler")
        _, hashes = await stored(filler, BLOCKS)
        await cluster.relay("decode-1", storage_limit_bytes_per_s=SLOW)
        for client in (
            await cluster.embedded(storage_limit_bytes_per_s=SLOW),
            await cluster.remote("prefill-2", storage_limit_bytes_per_s=SLOW),
        ):
            load, memory = await begun(client, hashes, False)
            await memory.aclose()
            result = await load.result()
            assert result.blocks < BLOCKS
            assert result.events["aborted"] == 1

    run_cluster(body)


def test_closing_the_client_ends_its_loads(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        filler = await cluster.embedded("filler")
        _, hashes = await stored(filler, BLOCKS)
        client = await cluster.embedded(storage_limit_bytes_per_s=SLOW)
        load, _ = await begun(client, hashes, False)
        await client.close()
        result = await load.result()
        assert result.events["aborted"] == 1

    run_cluster(body)


def test_closing_memory_of_an_agent_that_does_not_answer_leaves_the_loop_free(
    run_cluster: Run,
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.remote()
        memory = await client.allocate(LAYOUT.block_bytes)
        agent = cluster.processes["prefill-1"]
        agent.send_signal(signal.SIGSTOP)
        try:
            os.waitid(os.P_PID, agent.pid, os.WSTOPPED | os.WNOWAIT)
            closing = asyncio.ensure_future(memory.aclose())
            # The loop goes round while the agent is stopped; a blocked one could not wake it.
            await asyncio.wait_for(asyncio.to_thread(int), WAIT_S)
            assert not closing.done()
        finally:
            agent.send_signal(signal.SIGCONT)
        await asyncio.wait_for(closing, WAIT_S)
        await memory.aclose()

    run_cluster(body)
