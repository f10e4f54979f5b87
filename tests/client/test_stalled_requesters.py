"""Peers that take nothing of what a relay sends them leave room for others, and are hung up on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
from dualpath.agent.agent import Agent
from dualpath.agent.places import Places
from dualpath.client.loopback_cluster import (
    LAYOUT,
    LoopbackCluster,
    embedded_agent,
    stored,
    until,
    wrong_blocks,
)
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.stream_sender import StreamSender

Run: TypeAlias = Callable[..., None]

BLOCKS = 90
PLACES = Places.contiguous(LAYOUT, BLOCKS)
RELAYED = ("relay:decode-1",)
STAGING = 8 << 20


class Muted(StreamSender):
    """Acknowledges nothing."""

    __slots__ = ()

    def acknowledge(self, *_: Any) -> None:
        """Keep it to itself."""

    def acknowledge_each(self, *_: Any) -> None:
        """Keep it to itself."""


def mute(agent: Agent) -> None:
    """Its peers get no acknowledgement any more."""
    transport: Any = agent.compute.transport
    for connection in transport._connections.values():
        for stream in connection._streams:
            stream.sender.__class__ = Muted


async def stall(cluster: LoopbackCluster, name: str, namespace_id: bytes, hashes: Any) -> None:
    """A peer that asks for much, takes it, and says nothing."""
    client = await cluster.embedded(name)
    await client.open_namespace(Namespace("model", LAYOUT))
    peer = embedded_agent(client)
    await until(lambda: bool(peer.relays["decode-1"].peer_id_at(cluster.address)), "attached")
    mute(peer)
    memory = await client.allocate(BLOCKS * LAYOUT.block_bytes)
    load = await client.load(namespace_id, hashes, memory, PLACES, deadline_s=60, paths=RELAYED)
    relay = cluster.servers["decode-1"].agent.relay

    def forwarding() -> bool:
        return any(
            each.name == name and each.forwarding and not each.reading_bytes
            for each in relay._requesters.values()
        )

    await until(forwarding, "chunks are on their way")
    await load.abort()


@pytest.mark.parametrize("held", [False, True], ids=["staged", "held"])
def test_a_healthy_load_gets_its_blocks_beside_peers_that_take_nothing(
    run_cluster: Run, held: bool
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = (
            await cluster.relay(
                "decode-1", staging_bytes=STAGING, hold_bytes=(64 << 20) * held, stall_s=10.0
            )
        ).agent
        client = await cluster.embedded("saver")
        namespace_id, hashes = await stored(client, BLOCKS)
        if held:
            memory = await client.allocate(BLOCKS * LAYOUT.block_bytes)
            load = await client.load(
                namespace_id,
                hashes,
                memory,
                PLACES,
                deadline_s=30,
                paths=RELAYED,
                decode_peer="decode-1",
                request="r",
            )
            assert (await load.result()).blocks == BLOCKS
            await memory.aclose()
        for index in range(3):
            await stall(cluster, f"stalled-{index}", namespace_id, hashes)
        assert sum(each.forwarding > 0 for each in agent.relay._requesters.values()) == 3
        good = await cluster.embedded("good")
        await good.open_namespace(Namespace("model", LAYOUT))
        places = Places.contiguous(LAYOUT, 12)
        memory = await good.allocate(12 * LAYOUT.block_bytes)
        load = await good.load(
            namespace_id, hashes[:12], memory, places, deadline_s=30, paths=RELAYED
        )
        assert (await load.result()).blocks == 12
        assert wrong_blocks(memory, places, hashes[:12]) == []
        assert agent.relay.events["relay_stalled"] == 0  # it had room beside them

    run_cluster(body)


def test_who_takes_nothing_is_hung_up_on_and_loses_what_it_held(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = (
            await cluster.relay("decode-1", staging_bytes=STAGING, hold_bytes=0, stall_s=0.2)
        ).agent
        client = await cluster.embedded("saver")
        namespace_id, hashes = await stored(client, BLOCKS)
        await stall(cluster, "stalled", namespace_id, hashes)
        await until(lambda: agent.relay.events["relay_stalled"] > 0, "it is hung up on")
        await until(lambda: not agent.relay.staging.used_bytes, "its staging is free")

    run_cluster(body)


def test_a_grant_waits_no_longer_than_any_load_may(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = (await cluster.relay("decode-1", deadline_s_max=5.0, stall_s=10.0)).agent
        client = await cluster.embedded("saver")
        namespace_id, hashes = await stored(client, BLOCKS)
        await stall(cluster, "stalled", namespace_id, hashes)
        loop_time = agent.relay._loop.time()
        grants = [
            grant for each in agent.relay._requesters.values() for grant in each.grants.values()
        ]
        assert grants
        assert max(grant.deadline_at for grant in grants) <= loop_time + 5.0

    run_cluster(body)
