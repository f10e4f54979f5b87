"""What a decode node relays for its own requests it keeps, and serves again without a read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
from dualpath.agent.agent import Agent
from dualpath.agent.outcome import LoadResult
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

Run: TypeAlias = Callable[..., None]

BLOCKS = 8
PLACES = Places.contiguous(LAYOUT, BLOCKS)
BYTES = BLOCKS * LAYOUT.block_bytes
RELAYED = ("relay:decode-1",)


async def loaded(
    client: KVClient, namespace_id: bytes, hashes: list[bytes], **settings: object
) -> LoadResult:
    memory = await client.allocate(BYTES)
    arguments: dict[str, object] = {"deadline_s": WAIT_S, **settings}
    load = await client.load(namespace_id, hashes, memory, PLACES, **arguments)  # type: ignore[arg-type]
    result = await load.result()
    assert wrong_blocks(memory, PLACES, hashes[: result.blocks]) == []
    await memory.aclose()
    return result


async def idle(agent: Agent) -> None:
    await until(
        lambda: not (agent.relay.staging.used_bytes or agent.holdings.in_use), "nothing in flight"
    )


def test_a_second_turn_is_served_without_a_storage_read(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = (await cluster.relay("decode-1")).agent
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, BLOCKS)
        first = await loaded(
            client, namespace_id, hashes, paths=RELAYED, decode_peer="decode-1", request="r1"
        )
        assert first.blocks == BLOCKS
        assert first.held_bytes == {}
        await idle(agent)
        assert agent.relay.retained_bytes == agent.holdings.pinned_bytes == BYTES
        read = agent.storage["tcp"].received_bytes
        assert read == BYTES

        # Another prefill engine, a request of its own, nothing retained for it.
        other = await cluster.embedded("prefill-2")
        await other.open_namespace(embedded_agent(client).namespaces[namespace_id])
        second = await loaded(other, namespace_id, hashes, paths=RELAYED)
        assert second.blocks == BLOCKS
        await idle(agent)
        assert agent.storage["tcp"].received_bytes == read
        assert agent.relay.served_bytes == BYTES
        assert agent.relay.relayed_bytes == 2 * BYTES
        agent.holdings.release((namespace_id, "r1"))
        assert (agent.holdings.pinned_bytes, agent.holdings.requests) == (0, 0)

    run_cluster(body)


def test_nothing_is_kept_without_a_request_or_at_another_node(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agents = [(await cluster.relay(name)).agent for name in ("decode-1", "decode-2")]
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, BLOCKS)
        relays = ("relay:decode-1", "relay:decode-2")
        await loaded(client, namespace_id, hashes, paths=relays, decode_peer="decode-1")
        assert [agent.relay.retained_bytes for agent in agents] == [0, 0]
        await loaded(
            client, namespace_id, hashes, paths=relays, decode_peer="decode-2", request="r"
        )
        for agent in agents:
            await idle(agent)
        assert agents[0].relay.retained_bytes == 0
        assert agents[1].relay.retained_bytes == agents[1].holdings.pinned_bytes
        assert agents[1].relay.retained_bytes + agents[0].relay.relayed_bytes >= BYTES

    run_cluster(body)


@pytest.mark.parametrize("hold_bytes", [0, 1 << 20])
def test_without_room_chunks_are_only_passed_on(run_cluster: Run, hold_bytes: int) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = (await cluster.relay("decode-1", hold_bytes=hold_bytes)).agent
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, BLOCKS)
        for turn in range(2):
            result = await loaded(
                client,
                namespace_id,
                hashes,
                paths=RELAYED,
                decode_peer="decode-1",
                request=f"r{turn}",
            )
            assert result.blocks == BLOCKS
        await idle(agent)
        assert agent.holdings.used_bytes <= hold_bytes
        assert agent.relay.retained_bytes <= hold_bytes
        assert (agent.events()["retain_no_room"] > 0) == (hold_bytes > 0)

    run_cluster(body)


def test_a_held_chunk_with_wrong_bytes_never_reaches_an_engine(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = (await cluster.relay("decode-1")).agent
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, BLOCKS)
        await loaded(
            client, namespace_id, hashes, paths=RELAYED, decode_peer="decode-1", request="r"
        )
        await idle(agent)
        view = agent.holdings.region.view
        for chunk in tuple(agent.holdings._chunks.values())[::5]:
            view[chunk.slot.offset + 1000] ^= 0x10
        result = await loaded(client, namespace_id, hashes, paths=RELAYED)
        assert result.blocks == BLOCKS
        # The relay also looks at what else is asked for in one grant with a chunk that came wrong.
        assert 1 <= result.events["corrupt"] <= agent.events()["hold_corrupt"] == 5
        # What was found wrong is there no more; the rest still is.
        again = await loaded(client, namespace_id, hashes, paths=RELAYED)
        assert "corrupt" not in again.events

    run_cluster(body)


def test_pins_of_a_request_that_nobody_asks_for_expire(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = (await cluster.relay("decode-1", hold_s=0.2)).agent
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, BLOCKS)
        await loaded(
            client, namespace_id, hashes, paths=RELAYED, decode_peer="decode-1", request="r"
        )
        await until(lambda: agent.holdings.requests == 0, "pins expired")
        assert agent.events()["hold_expired"] == 1
        assert agent.holdings.pinned_bytes == 0

    run_cluster(body)
