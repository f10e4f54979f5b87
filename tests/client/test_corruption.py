"""Damaged bytes are never used: fetched again by another path, or the prefix ends before them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from dualpath.agent.outcome import MissReason
from dualpath.agent.places import Places
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    content,
    stored,
    wrong_blocks,
)
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.fault_plan import FaultPlan
from dualpath.transfer.fault_transport import FaultTransport
from dualpath.transfer.tcp_transport import TcpConfig, TcpTransport
from dualpath.transfer.transport import OnPeerLost, Transport

Run: TypeAlias = Callable[..., None]

BLOCKS = 16
PLACES = Places.contiguous(LAYOUT, BLOCKS)


def faulty(plan: FaultPlan) -> Callable[[str, OnPeerLost], Transport]:
    def make(name: str, on_peer_lost: OnPeerLost) -> Transport:
        return FaultTransport(TcpTransport(name, on_peer_lost), plan)

    return make


def test_chunks_damaged_at_a_relay_are_fetched_again_directly(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await cluster.relay("decode-1", make_compute=faulty(FaultPlan(seed=1, flip=1.0)))
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, BLOCKS)
        memory = await client.allocate(BLOCKS * LAYOUT.block_bytes)
        for policy in ("round-robin", "split"):
            load = await client.load(
                namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S, policy=policy
            )
            result = await load.result()
            assert result.blocks == BLOCKS, result
            assert set(result.shares) == {"direct"}
            assert wrong_blocks(memory, PLACES, hashes) == []
        assert (await client.stats()).events["corrupt"] > 0
        # The daemon's copy is good, so nobody lost it.
        assert (await client.lookup(namespace_id, hashes)).blocks == BLOCKS

    run_cluster(body)


def test_with_no_other_path_a_damaging_relay_ends_the_prefix(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await cluster.relay("decode-1", make_compute=faulty(FaultPlan(seed=1, flip=1.0)))
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, BLOCKS)
        memory = await client.allocate(BLOCKS * LAYOUT.block_bytes)
        load = await client.load(
            namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S, paths=("relay:decode-1",)
        )
        result = await load.result()
        assert (result.blocks, result.miss) == (0, MissReason.CORRUPT)
        assert result.events["corrupt"] >= 2

    run_cluster(body)


def test_bytes_flipped_on_the_wire_from_the_daemon_are_fetched_again(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(name: str, on_peer_lost: OnPeerLost, config: TcpConfig) -> Transport:
        return FaultTransport(TcpTransport(name, on_peer_lost, config), FaultPlan(seed=7, flip=0.2))

    monkeypatch.setattr("dualpath.kvstore.service.process.TcpTransport", make)

    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded()
        await cluster.relay("decode-1")
        both = await cluster.embedded("prefill-2")
        namespace_id, hashes = await stored(client, BLOCKS)
        await both.open_namespace(Namespace("model", LAYOUT))
        corrupt = 0
        for loader in (client, both):
            memory = await loader.allocate(BLOCKS * LAYOUT.block_bytes)
            load = await loader.load(namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S)
            result = await load.result()
            corrupt += result.events.get("corrupt", 0)
            # A chunk that is flipped twice in a row ends the prefix; what is said to be there is.
            assert result.blocks == BLOCKS or result.miss is MissReason.CORRUPT
            good = Places(PLACES.layer_stride_bytes, PLACES.base_bytes[: result.blocks or 1])
            assert wrong_blocks(memory, good, hashes[: result.blocks]) == []
        assert corrupt > 0

    run_cluster(body)


def test_a_block_damaged_on_the_medium_ends_the_prefix_and_is_dropped(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await cluster.relay("decode-1")
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, BLOCKS)
        await cluster.stop_daemon()
        flip(cluster.path / "data", content(hashes[9])[300_000:300_064])
        await cluster.start_daemon()
        await client_sees(client, namespace_id, hashes, BLOCKS)
        memory = await client.allocate(BLOCKS * LAYOUT.block_bytes)
        load = await client.load(namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S)
        result = await load.result()
        assert (result.blocks, result.miss) == (9, MissReason.CORRUPT), result
        assert result.events["corrupt"] >= 1
        good = Places.contiguous(LAYOUT, 9)
        assert wrong_blocks(memory, good, hashes[:9]) == []
        await client_sees(client, namespace_id, hashes, 9)
        lookup = await client.lookup(namespace_id, hashes)
        assert (lookup.blocks, lookup.miss) == (9, MissReason.CORRUPT)

    run_cluster(body)


async def client_sees(client: object, namespace_id: bytes, hashes: list[bytes], n: int) -> None:
    """Wait until a lookup finds `n` blocks."""
    import asyncio

    from dualpath.client.kv_client import KVClient

    assert isinstance(client, KVClient)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + WAIT_S
    while (found := await client.lookup(namespace_id, hashes)).blocks != n:
        assert loop.time() < deadline, found
        await asyncio.sleep(0.02)


def flip(data: Path, pattern: bytes) -> None:
    """Flip one byte of `pattern`, wherever the daemon's files hold it."""
    found = 0
    for file in data.rglob("*"):
        if not file.is_file():
            continue
        where = file.read_bytes().find(pattern)
        if where >= 0:
            with file.open("r+b") as handle:
                handle.seek(where)
                handle.write(bytes([pattern[0] ^ 1]))
            found += 1
    assert found, "the block is in no file"
