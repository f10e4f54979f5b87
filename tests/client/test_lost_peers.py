"""Daemons, relays and engines that vanish: every load ends in time, verified, with the reason."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import grpc.aio
import pytest
from dualpath.agent.outcome import LoadResult, MissReason
from dualpath.agent.places import Places
from dualpath.client.kv_client import KVClient
from dualpath.client.load import Load
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    chain,
    embedded_agent,
    end_process,
    kill,
    stored,
    until,
    wrong_blocks,
)
from dualpath.client.memory import EngineMemory
from dualpath.kvstore.namespace import Namespace
from dualpath.proto.v1 import store_pb2, store_pb2_grpc
from dualpath.transfer.fault_plan import FaultPlan
from dualpath.transfer.fault_transport import FaultTransport
from dualpath.transfer.tcp_transport import TcpConfig, TcpTransport
from dualpath.transfer.transport import OnPeerLost, Transport

Run: TypeAlias = Callable[..., None]

BLOCKS = 24
BYTES = BLOCKS * LAYOUT.block_bytes
PLACES = Places.contiguous(LAYOUT, BLOCKS)
SLOW = 8e6
"""Bytes a second: slow enough to be in the middle when something is killed."""


async def begin(
    client: KVClient, count: int, hashes: list[bytes], **settings: object
) -> list[tuple[Load, EngineMemory]]:
    namespace_id = await client.open_namespace(Namespace("model", LAYOUT))
    loads = []
    for _ in range(count):
        memory = await client.allocate(BYTES)
        arguments: dict[str, object] = {"deadline_s": WAIT_S, **settings}
        load = await client.load(namespace_id, hashes, memory, PLACES, **arguments)  # type: ignore[arg-type]
        loads.append((load, memory))
    return loads


async def moved(client: KVClient, path: str, nbytes: int) -> None:
    """Wait until so much was verified by a path."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + WAIT_S
    while True:
        stats = await client.stats()
        if sum(item.bytes for item in stats.path if item.path == path) >= nbytes:
            return
        assert loop.time() < deadline, stats
        await asyncio.sleep(0.005)


def check_all(
    results: list[LoadResult], loads: list[tuple[Load, EngineMemory]], hashes: list[bytes]
) -> None:
    for result, (_, memory) in zip(results, loads, strict=True):
        assert result.blocks == BLOCKS, result
        assert result.elapsed_s < WAIT_S
        assert wrong_blocks(memory, PLACES, hashes) == []


@pytest.mark.parametrize(
    "policy",
    ["split", "round-robin", pytest.param("shorter-queue", marks=pytest.mark.slow)],
)
def test_killing_a_relay_in_the_middle_costs_no_load(run_cluster: Run, policy: str) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        filler = await cluster.embedded("filler")
        _, hashes = await stored(filler, BLOCKS)
        victim = await cluster.relay_process("decode-1", storage_limit_bytes_per_s=SLOW)
        client = await cluster.embedded(storage_limit_bytes_per_s=4 * SLOW)
        loads = await begin(client, 4, hashes, policy=policy, decode_peer="decode-1")
        await moved(client, "relay:decode-1", LAYOUT.block_bytes)
        kill(victim)
        results = list(await asyncio.gather(*(load.result() for load, _ in loads)))
        check_all(results, loads, hashes)
        lost = [result for result in results if result.events.get("path_lost")]
        assert lost, results
        assert (await client.stats()).events["path_lost"] >= len(lost)

    run_cluster(body)


def test_a_relay_that_stops_moving_is_given_up_and_its_chunks_go_directly(
    run_cluster: Run,
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        filler = await cluster.embedded("filler")
        _, hashes = await stored(filler, BLOCKS)
        victim = await cluster.relay_process("decode-1", storage_limit_bytes_per_s=SLOW)
        client = await cluster.embedded(storage_limit_bytes_per_s=4 * SLOW, stall_s=0.3)
        loads = await begin(client, 2, hashes)
        await moved(client, "relay:decode-1", LAYOUT.block_bytes)
        victim.send_signal(signal.SIGSTOP)
        try:
            results = list(await asyncio.gather(*(load.result() for load, _ in loads)))
        finally:
            victim.send_signal(signal.SIGCONT)
        check_all(results, loads, hashes)
        assert any(result.events.get("stalled") for result in results), results

    run_cluster(body)


def test_loads_do_not_wait_for_a_silent_relay_that_is_tried_again(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        filler = await cluster.embedded("filler")
        _, hashes = await stored(filler, BLOCKS)
        victim = await cluster.relay_process("decode-1", storage_limit_bytes_per_s=SLOW)
        client = await cluster.embedded(storage_limit_bytes_per_s=4 * SLOW, stall_s=0.2)
        dispatcher = embedded_agent(client).loads[cluster.address].dispatcher
        loads = await begin(client, 1, hashes)
        await moved(client, "relay:decode-1", LAYOUT.block_bytes)
        victim.send_signal(signal.SIGSTOP)
        try:
            check_all([await loads[0][0].result()], loads, hashes)
            loop = asyncio.get_running_loop()
            until_s = loop.time() + WAIT_S
            while dispatcher.counters["path_lost:stalled"] < 2:
                assert loop.time() < until_s, dispatcher.counters
                ((load, memory),) = await begin(client, 1, hashes)
                result = await load.result()
                check_all([result], [(load, memory)], hashes)
                assert set(result.shares) == {"direct"}, result
                assert not result.events, result
                await memory.aclose()
        finally:
            victim.send_signal(signal.SIGCONT)
        until_s = loop.time() + WAIT_S
        while "relay:decode-1" not in result.shares:
            assert loop.time() < until_s, dispatcher.views(loop.time())
            ((load, memory),) = await begin(client, 1, hashes)
            result = await load.result()
            check_all([result], [(load, memory)], hashes)
            await memory.aclose()

    run_cluster(body)


def test_a_relay_that_comes_back_is_used_again(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        filler = await cluster.embedded("filler")
        _, hashes = await stored(filler, BLOCKS)
        first = await cluster.relay("decode-1")
        client = await cluster.embedded()
        await first.stop()
        agent = embedded_agent(client)
        relay = agent.relays["decode-1"]
        await until(lambda: not relay.link.up, "the relay's loss")
        ((load, _),) = await begin(client, 1, hashes, policy="round-robin")
        assert set((await load.result()).shares) == {"direct"}
        await cluster.relay("decode-1", listen=cluster.relays["decode-1"])
        await until(lambda: bool(relay.peer_id_at(cluster.address)), "the relay's return")
        ((load, memory),) = await begin(client, 1, hashes, paths=("relay:decode-1",))
        result = await load.result()
        assert set(result.shares) == {"relay:decode-1"}
        check_all([result], [(load, memory)], hashes)

    run_cluster(body)


def test_a_load_goes_on_after_the_session_at_its_daemon_broke(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        filler = await cluster.embedded("filler")
        _, hashes = await stored(filler, BLOCKS)
        await cluster.relay("decode-1", storage_limit_bytes_per_s=SLOW)
        client = await cluster.embedded(storage_limit_bytes_per_s=SLOW)
        loads = await begin(client, 2, hashes)
        await moved(client, "direct", LAYOUT.block_bytes)
        embedded_agent(client).daemons[cluster.address].link.lose("cut by the test")
        results = list(await asyncio.gather(*(load.result() for load, _ in loads)))
        check_all(results, loads, hashes)
        assert any(result.events.get("path_lost") for result in results), results
        assert all(result.events.get("lease_expired") for result in results), results

    run_cluster(body)


@pytest.mark.parametrize("wanted", [0, 5])
def test_blocks_invalidated_in_the_middle_end_the_load_before_them_and_it_says_so(
    run_cluster: Run, wanted: int
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        filler = await cluster.embedded("filler")
        _, hashes = await stored(filler, BLOCKS)
        client = await cluster.embedded(storage_limit_bytes_per_s=SLOW)
        ((load, memory),) = await begin(client, 1, hashes)
        await moved(client, "direct", LAYOUT.block_bytes)
        request = store_pb2.InvalidateRequest(
            namespace_id=Namespace("model", LAYOUT).id, hash=hashes[wanted] if wanted else b""
        )
        async with grpc.aio.insecure_channel(cluster.address) as channel:
            stub: Any = store_pb2_grpc.StoreStub(channel)
            assert (await stub.Invalidate(request, timeout=WAIT_S)).blocks == BLOCKS - wanted
        result = await load.result()
        # What was verified before, or was on its way, stays whole.
        assert wanted <= result.blocks < BLOCKS, result
        assert result.miss is MissReason.INVALIDATED, result
        assert not result.events.get("corrupt"), result
        assert wrong_blocks(memory, PLACES, hashes[: result.blocks]) == []

    run_cluster(body)


def test_a_daemon_that_stays_away_ends_its_loads_with_what_is_verified(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        filler = await cluster.embedded("filler")
        _, hashes = await stored(filler, BLOCKS)
        client = await cluster.embedded(storage_limit_bytes_per_s=SLOW, lookup_timeout_s=0.5)
        loads = await begin(client, 2, hashes)
        await moved(client, "direct", 3 * LAYOUT.block_bytes)
        await cluster.stop_daemon()
        for load, memory in loads:
            result = await load.result()
            assert result.miss is MissReason.UNAVAILABLE
            assert result.events["daemon_unavailable"] == 1
            assert result.elapsed_s < WAIT_S / 2
            part = Places.contiguous(LAYOUT, max(1, result.blocks))
            assert wrong_blocks(memory, part, hashes[: result.blocks]) == []

    run_cluster(body)


ENGINE = """
import json, sys
from dualpath.agent.places import Places
from dualpath.client.blocking import BlockingKVClient
from dualpath.client.loopback_cluster import LAYOUT, chain
from dualpath.kvstore.namespace import Namespace
client = BlockingKVClient.connect(sys.argv[1])
namespace_id = client.open_namespace(Namespace("model", LAYOUT))
hashes = chain(24)
memory = client.allocate(24 * LAYOUT.block_bytes)
load = client.load(namespace_id, hashes, memory, Places.contiguous(LAYOUT, 24), deadline_s=60)
print(json.dumps({"hit": load.started().hit_blocks}), flush=True)
load.result()
"""


def test_an_engine_that_dies_in_the_middle_is_fenced_and_forgotten(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        filler = await cluster.embedded("filler")
        _, hashes = await stored(filler, BLOCKS)
        await cluster.relay("decode-1", storage_limit_bytes_per_s=SLOW / 8)
        client = await cluster.remote(storage_limit_bytes_per_s=SLOW / 8)
        address = f"unix:{cluster.path}/prefill-1.sock"
        engine = subprocess.Popen([sys.executable, "-c", ENGINE, address], stdout=subprocess.PIPE)
        cluster.stack.callback(end_process, engine)
        assert engine.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(engine.stdout.readline), WAIT_S)
        assert json.loads(line)["hit"] == len(chain(24)) == len(hashes)
        assert (await client.stats()).loads_active == 1
        kill(engine)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WAIT_S
        while (stats := await client.stats()).loads_active or not stats.events["aborted"]:
            assert loop.time() < deadline
            await asyncio.sleep(0.01)

    run_cluster(body)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))]
)
def test_faults_of_every_kind_cost_time_but_no_byte(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    plan = FaultPlan(
        seed=seed,
        delay=0.05,
        reset=0.004,
        truncate=0.004,
        duplicate=0.05,
        stale=0.05,
        flip=0.01,
    )

    def daemon_transport(name: str, on_peer_lost: OnPeerLost, config: TcpConfig) -> Transport:
        return FaultTransport(TcpTransport(name, on_peer_lost, config), plan)

    def relay_transport(name: str, on_peer_lost: OnPeerLost) -> Transport:
        return FaultTransport(TcpTransport(name, on_peer_lost), plan)

    async def body(cluster: LoopbackCluster) -> None:
        filler = await cluster.embedded("filler", daemons=(f"unix:{cluster.unix}",))
        _, hashes = await stored(filler, BLOCKS)
        await cluster.relay("decode-1", make_compute=relay_transport)
        await cluster.relay("decode-2", make_compute=relay_transport)
        client = await cluster.embedded(stall_s=0.5)
        short = []
        for _ in range(3):
            loads = await begin(client, 3, hashes)
            for load, memory in loads:
                result = await load.result()
                # A chunk may fail as often as is tried; what is said to be there is there.
                part = Places.contiguous(LAYOUT, max(1, result.blocks))
                assert wrong_blocks(memory, part, hashes[: result.blocks]) == []
                assert result.elapsed_s < WAIT_S
                await memory.aclose()
                if result.blocks < BLOCKS:
                    assert result.miss is not MissReason.NONE, result
                    assert result.detail, result
                    short.append(result)
        assert len(short) <= 4, [(each.blocks, each.miss, each.detail) for each in short]

    monkeypatch.setattr("dualpath.kvstore.service.process.TcpTransport", daemon_transport)
    run_cluster(body)
