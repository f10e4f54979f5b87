"""Several storage links a node: chunks go by each at its rate, and a link that dies is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
from dualpath.agent.agent import Agent
from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.places import Places
from dualpath.client.kv_client import KVClient
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    embedded_agent,
    stored,
    until,
    wrong_blocks,
)
from dualpath.transfer.tcp_transport import TcpConfig, TcpTransport
from dualpath.transfer.transport import OnPeerLost, Transport

Run: TypeAlias = Callable[..., None]
BLOCKS = 48
PLACES = Places.contiguous(LAYOUT, BLOCKS)
BYTES = BLOCKS * LAYOUT.block_bytes
ADDRESSES = ("127.0.0.1", "127.0.0.2")
SECOND = "direct:127.0.0.2"
RAILS = {"data_rails": ("127.0.0.2:0",)}
SLOW = 8e6


def paced(*rates: float) -> Callable[[str, OnPeerLost], Transport]:
    """Makes the transports of a node's storage links, one after another, each with its limit."""
    left = list(rates)

    def make(name: str, on_peer_lost: OnPeerLost) -> Transport:
        return TcpTransport(name, on_peer_lost, TcpConfig(receive_bytes_per_s=left.pop(0)))

    return make


def links(agent: Agent) -> list[DaemonLink]:
    (rails,) = agent.rails.values()
    return list(rails.links)


async def all_up(agent: Agent, count: int) -> None:
    await until(
        lambda: len(links(agent)) == count and all(link.up for link in links(agent)),
        f"{count} links",
    )


async def loaded(client: KVClient, namespace_id: bytes, hashes: list[bytes]) -> dict[str, int]:
    """Load the blocks, check every byte, and return who brought how many."""
    memory = await client.allocate(BYTES)
    load = await client.load(namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S)
    result = await load.result()
    assert result.blocks == BLOCKS, result
    assert wrong_blocks(memory, PLACES, hashes) == []
    await memory.aclose()
    return dict(result.shares)


def test_chunks_go_by_each_link_at_its_rate(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded(
            make_storage=paced(4 * SLOW, SLOW), storage_addresses=ADDRESSES
        )
        await all_up(embedded_agent(client), 2)
        namespace_id, hashes = await stored(client, BLOCKS)
        await loaded(client, namespace_id, hashes)  # the rates are known from here on
        shares = await loaded(client, namespace_id, hashes)
        assert set(shares) == {"direct", SECOND}
        assert 0.15 <= shares[SECOND] / BYTES <= 0.25, shares

    run_cluster(body, **RAILS)


def test_memory_behind_the_compute_link_is_loaded_by_each_link(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded(
            storage_addresses=ADDRESSES, storage_limit_bytes_per_s=2 * SLOW
        )
        await all_up(embedded_agent(client), 2)
        namespace_id, hashes = await stored(client, BLOCKS)
        memory = await client.allocate(BYTES, behind_compute_link=True)
        load = await client.load(namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S)
        result = await load.result()
        assert result.blocks == BLOCKS, result
        assert wrong_blocks(memory, PLACES, hashes) == []
        assert min(result.shares["direct"], result.shares[SECOND]) > BYTES // 4, result.shares

    run_cluster(body, **RAILS)


def test_a_relay_reads_by_each_of_its_links(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        settings: dict[str, Any] = {
            "storage_addresses": ADDRESSES,
            "storage_limit_bytes_per_s": SLOW,
        }
        relay = await cluster.relay("decode-1", **settings)
        await all_up(relay.agent, 2)
        client = await cluster.embedded(**settings)
        await all_up(embedded_agent(client), 2)
        (loads,) = embedded_agent(client).loads.values()
        await until(lambda: len([v for v in loads.views() if v.up]) == 4, "four paths")
        namespace_id, hashes = await stored(client, BLOCKS)
        shares = await loaded(client, namespace_id, hashes)
        assert set(shares) == {"direct", SECOND, "relay:decode-1", "relay:decode-1:1"}
        assert min(shares.values()) > BYTES // 8, shares
        relaying = relay.agent.relay  # its slots are free once the writes are acknowledged
        await until(lambda: not relaying.read_bytes, "nothing to read")
        await until(lambda: not relaying.staging.used_bytes, "nothing staged")

    run_cluster(body, **RAILS)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_link_that_dies_in_the_middle_is_left_and_taken_up_again(
    run_cluster: Run, lost: int
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded(storage_addresses=ADDRESSES, storage_limit_bytes_per_s=SLOW)
        agent = embedded_agent(client)
        await all_up(agent, 2)
        namespace_id, hashes = await stored(client, BLOCKS)
        memory = await client.allocate(BYTES)
        load = await client.load(namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S)
        (loads,) = agent.loads.values()
        await until(lambda: loads.counts.bytes[SECOND] >= BYTES // 8, "a part of the load")
        link = links(agent)[lost].link
        assert link.network is not None
        link.network.transport.disconnect(link.peer)
        result = await load.result()
        assert result.blocks == BLOCKS, result
        assert wrong_blocks(memory, PLACES, hashes) == []
        # Of the path, not of the load: nothing of it may have been under way there just then.
        assert any(what.startswith("path_lost") for what in loads.dispatcher.counters)
        # Whichever link has the leases now, both devices carry bytes again.
        await until(lambda: sum(view.up for view in loads.views()) >= 2, "two paths")
        before = [
            network.received_bytes
            for network in agent.storage_networks
            if network.transport.name == "tcp"
        ]
        await loaded(client, namespace_id, hashes)
        after = [
            network.received_bytes
            for network in agent.storage_networks
            if network.transport.name == "tcp"
        ]
        parts = [now - then for then, now in zip(before, after, strict=True)]
        assert min(parts) > BYTES // 4, parts

    run_cluster(body, **RAILS)


def test_one_address_is_one_link(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded()
        agent = embedded_agent(client)
        await agent.settled(WAIT_S)
        assert len(links(agent)) == 1
        namespace_id, hashes = await stored(client, BLOCKS)
        assert set(await loaded(client, namespace_id, hashes)) == {"direct"}

    run_cluster(body)
