"""The KV of a request goes to its decode node: what it lacks, layer by layer, verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import pytest
from dualpath.agent.agent import Agent
from dualpath.agent.outcome import LoadResult, MissReason
from dualpath.agent.places import Places
from dualpath.client.embedded_session import EmbeddedSession
from dualpath.client.kv_client import KVClient
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    chain,
    embedded_agent,
    fill,
    stored,
    until,
    wrong_blocks,
)
from dualpath.client.memory import EngineMemory
from dualpath.kvstore.namespace import Namespace

Run: TypeAlias = Callable[..., None]

HITS = 6
BLOCKS = 8
"""Six that are stored, one new, one that is partial and has a name of its own."""
PLACES = Places.contiguous(LAYOUT, BLOCKS)
BYTES = BLOCKS * LAYOUT.block_bytes
HIT_BYTES = HITS * LAYOUT.block_bytes
ALL_LAYERS = LAYOUT.layers - 1


class Prompt:
    """One prompt: a prefill engine, the agent of its decode node, and an engine there."""

    def __init__(self, prefill: KVClient, decode: Agent, namespace_id: bytes) -> None:
        self.prefill = prefill
        self.agent = decode
        self.decode = KVClient(EmbeddedSession(decode))
        self.namespace_id = namespace_id
        self.hashes: list[bytes] = []

    async def load(self, memory: EngineMemory, paths: Sequence[str] = ()) -> LoadResult:
        load = await self.prefill.load(
            self.namespace_id,
            self.hashes[:HITS],
            memory,
            Places.contiguous(LAYOUT, HITS),
            deadline_s=WAIT_S,
            decode_peer=self.agent.config.name,
            request="r17",
            paths=paths,
        )
        return await load.result()

    async def computed(self) -> EngineMemory:
        """Memory with the KV of the whole prompt."""
        memory = await self.prefill.allocate(BYTES)
        fill(memory, PLACES, self.hashes)
        return memory

    async def idle(self) -> None:
        """Nothing is left of the request, but for the cache."""
        agent = self.agent
        await until(lambda: not (len(agent.intakes) or agent.holdings.in_use), "no intake")
        assert (agent.holdings.pinned_bytes, agent.holdings.requests) == (0, 0)
        assert (len(agent.handed), len(agent.receiver)) == (0, 0)
        mine = embedded_agent(self.prefill)
        await until(lambda: not len(mine.hand_offs), "no hand-off")
        for each in (agent, mine):
            await until(
                lambda each=each: not len(each.compute.transport._windows._windows),  # type: ignore[misc]
                "no window on memory",
            )


async def prompt(cluster: LoopbackCluster, *, relays: int = 1, **settings: Any) -> Prompt:
    agents = [
        (await cluster.relay(f"decode-{number}", **settings)).agent
        for number in range(1, relays + 1)
    ]
    prefill = await cluster.embedded()
    namespace_id, hashes = await stored(prefill, HITS)
    for agent in agents:
        await agent.open_namespace(embedded_agent(prefill).namespaces[namespace_id])
    made = Prompt(prefill, agents[0], namespace_id)
    made.hashes = [*hashes, *chain(BLOCKS - HITS, "new")]
    return made


@pytest.mark.parametrize("relays", [1, 2])
def test_a_request_from_its_hits_to_its_decode_engine(run_cluster: Run, relays: int) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        made = await prompt(cluster, relays=relays)
        source = await made.prefill.allocate(BYTES)
        target = await made.decode.allocate(BYTES)
        loaded = await made.load(source)
        assert loaded.blocks == HITS
        receive = await made.decode.receive(
            "r17", made.namespace_id, made.hashes, target, PLACES, deadline_s=WAIT_S
        )
        hand_off = await made.prefill.hand_off(
            "r17", "decode-1", made.namespace_id, made.hashes, source, PLACES, deadline_s=WAIT_S
        )
        # Prefill computes the rest, layer after layer; nothing is given before its layer is done.
        data = await made.computed()
        for layer in range(LAYOUT.layers):
            for block in range(HITS, BLOCKS):
                at = block * LAYOUT.block_bytes + layer * LAYOUT.layer_bytes
                source.view[at : at + LAYOUT.layer_bytes] = data.view[at : at + LAYOUT.layer_bytes]
            hand_off.layer_done(layer)
            chunks = sum(
                sum(LAYOUT.chunk_extent(chunk)) <= (layer + 1) * LAYOUT.layer_bytes
                for chunk in range(LAYOUT.chunk_count)
            )
            if chunks:
                reach = LAYOUT.layers_complete_after(chunks - 1)
                assert await receive.wait_layer(reach - 1) == BLOCKS
        given = await hand_off.result()
        result = await receive.result()
        assert (given.blocks, given.reason) == (BLOCKS, "")
        assert (result.blocks, result.miss) == (BLOCKS, MissReason.NONE)
        assert wrong_blocks(target, PLACES, made.hashes) == []

        # What the decode node relayed for the request was not sent again.
        retained = made.agent.relay.retained_bytes
        assert given.held_bytes == retained
        assert given.sent_bytes == BYTES - retained
        assert made.agent.compute.received_bytes == BYTES - retained
        assert sum(result.shares.values()) == BYTES
        assert result.shares.get("retained", 0) == retained
        await made.idle()

    run_cluster(body)


@pytest.mark.parametrize("first", ["receive", "hand_off"])
def test_either_side_may_come_first(run_cluster: Run, first: str) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        made = await prompt(cluster)
        source = await made.computed()
        target = await made.decode.allocate(BYTES)

        async def give() -> None:
            hand_off = await made.prefill.hand_off(
                "r17", "decode-1", made.namespace_id, made.hashes, source, PLACES, deadline_s=WAIT_S
            )
            hand_off.layer_done(ALL_LAYERS)
            assert (await hand_off.result()).reason == ""

        if first == "hand_off":
            await give()
        receive = await made.decode.receive(
            "r17", made.namespace_id, made.hashes, target, PLACES, deadline_s=WAIT_S
        )
        if first == "receive":
            await give()
        assert (await receive.result()).blocks == BLOCKS
        assert wrong_blocks(target, PLACES, made.hashes) == []
        await made.idle()

    run_cluster(body)


def test_a_budget_smaller_than_the_request_is_passed_through(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        made = await prompt(cluster, hold_bytes=2 << 20)
        source = await made.computed()
        target = await made.decode.allocate(BYTES)
        assert (await made.load(source, ("relay:decode-1",))).blocks == HITS
        assert made.agent.events()["retain_no_room"] > 0
        receive = await made.decode.receive(
            "r17", made.namespace_id, made.hashes, target, PLACES, deadline_s=WAIT_S
        )
        hand_off = await made.prefill.hand_off(
            "r17", "decode-1", made.namespace_id, made.hashes, source, PLACES, deadline_s=WAIT_S
        )
        hand_off.layer_done(ALL_LAYERS)
        given = await hand_off.result()
        assert given.reason == ""
        assert (await receive.result()).blocks == BLOCKS
        assert wrong_blocks(target, PLACES, made.hashes) == []
        assert made.agent.holdings.used_bytes <= 2 << 20
        await made.idle()

    run_cluster(body)


def test_without_room_or_a_receiver_a_hand_off_ends_at_its_deadline(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        made = await prompt(cluster, hold_bytes=2 << 20, hold_s=0.2)
        source = await made.computed()
        hand_off = await made.prefill.hand_off(
            "r17", "decode-1", made.namespace_id, made.hashes, source, PLACES, deadline_s=4.0
        )
        hand_off.layer_done(ALL_LAYERS)
        given = await hand_off.result()
        assert given.reason == "no_room"
        assert given.blocks < BLOCKS
        assert given.elapsed_s < WAIT_S
        await until(lambda: not len(made.agent.handed), "the request expired")
        await made.idle()

    run_cluster(body)


def test_memory_behind_a_compute_link_is_written_through_it(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        made = await prompt(cluster)
        source = await made.computed()
        target = await made.decode.allocate(BYTES, behind_compute_link=True)
        receive = await made.decode.receive(
            "r17", made.namespace_id, made.hashes, target, PLACES, deadline_s=WAIT_S
        )
        hand_off = await made.prefill.hand_off(
            "r17", "decode-1", made.namespace_id, made.hashes, source, PLACES, deadline_s=WAIT_S
        )
        hand_off.layer_done(ALL_LAYERS)
        assert (await receive.result()).blocks == BLOCKS
        assert wrong_blocks(target, PLACES, made.hashes) == []
        compute = made.agent.compute  # it counts bytes once they have landed
        await until(lambda: compute.received_bytes == 2 * BYTES, "all of it, twice")
        await made.idle()

    run_cluster(body)


def test_a_hand_off_that_is_given_up_ends_both_sides(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        made = await prompt(cluster)
        source = await made.computed()
        target = await made.decode.allocate(BYTES)
        receive = await made.decode.receive(
            "r17", made.namespace_id, made.hashes, target, PLACES, deadline_s=WAIT_S
        )
        hand_off = await made.prefill.hand_off(
            "r17", "decode-1", made.namespace_id, made.hashes, source, PLACES, deadline_s=WAIT_S
        )
        hand_off.layer_done(ALL_LAYERS - 1)
        await receive.wait_layer(2)
        await hand_off.abort()
        assert (await hand_off.result()).reason == "aborted"
        result = await receive.result()
        assert (result.blocks, result.miss) == (0, MissReason.UNAVAILABLE)
        assert result.events["aborted"] == 1
        assert result.elapsed_s < WAIT_S
        await made.idle()

    run_cluster(body)


def test_a_hand_off_that_failed_before_may_be_followed_by_another(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        made = await prompt(cluster)
        source = await made.computed()
        target = await made.decode.allocate(BYTES)

        async def given() -> Any:
            return await made.prefill.hand_off(
                "r17", "decode-1", made.namespace_id, made.hashes, source, PLACES, deadline_s=WAIT_S
            )

        async def received() -> Any:
            return await made.decode.receive(
                "r17", made.namespace_id, made.hashes, target, PLACES, deadline_s=WAIT_S
            )

        async def given_up() -> None:
            hand_off = await given()
            await until(lambda: len(made.agent.intakes) == 1, "the hand-off began")
            await hand_off.abort()
            await until(lambda: not len(made.agent.intakes), "it ended")

        monkeypatch.setattr("dualpath.agent.receive.GRACE_S", WAIT_S)
        await given_up()
        receive = await received()
        await until(lambda: len(made.agent.receiver) == 1, "the receive began")
        again = await given()
        again.layer_done(ALL_LAYERS)
        assert (await again.result()).reason == ""
        assert (await receive.result()).blocks == BLOCKS
        assert wrong_blocks(target, PLACES, made.hashes) == []
        # Without another its reason is told when the grace is over.
        monkeypatch.setattr("dualpath.agent.receive.GRACE_S", 0.1)
        await given_up()
        result = await (await received()).result()
        assert (result.blocks, result.events["aborted"]) == (0, 1)
        await made.idle()

    run_cluster(body)


def test_a_receive_that_is_given_up_ends_the_hand_off(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        made = await prompt(cluster)
        source = await made.computed()
        target = await made.decode.allocate(BYTES)
        receive = await made.decode.receive(
            "r17", made.namespace_id, made.hashes, target, PLACES, deadline_s=WAIT_S
        )
        hand_off = await made.prefill.hand_off(
            "r17", "decode-1", made.namespace_id, made.hashes, source, PLACES, deadline_s=WAIT_S
        )
        hand_off.layer_done(0)
        await until(lambda: len(made.agent.intakes) == 1, "the hand-off began")
        await receive.abort()
        before = bytes(target.view)
        hand_off.layer_done(ALL_LAYERS)
        given = await hand_off.result()
        assert given.reason == "aborted"
        assert (await receive.result()).events["aborted"] == 1
        assert bytes(target.view) == before
        await made.idle()

    run_cluster(body)


def _spoil(made: Prompt, block: int) -> None:
    """Change a byte of what is held of the request."""
    place = (made.namespace_id, made.hashes[block], 1)
    chunk, _ = made.agent.handed.of(made.namespace_id, "r17").final[place]
    made.agent.holdings.region.view[chunk.slot.offset + 7] ^= 1


@pytest.mark.parametrize(("block", "blocks"), [(3, BLOCKS), (HITS, HITS)])
def test_a_chunk_that_lost_its_bytes_comes_from_storage_or_not_at_all(
    run_cluster: Run, block: int, blocks: int
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        made = await prompt(cluster)
        source = await made.computed()
        hand_off = await made.prefill.hand_off(
            "r17", "decode-1", made.namespace_id, made.hashes, source, PLACES, deadline_s=WAIT_S
        )
        hand_off.layer_done(ALL_LAYERS)
        assert (await hand_off.result()).reason == ""
        _spoil(made, block)
        target = await made.decode.allocate(BYTES)
        receive = await made.decode.receive(
            "r17", made.namespace_id, made.hashes, target, PLACES, deadline_s=WAIT_S
        )
        result = await receive.result()
        assert result.blocks == blocks, result
        assert result.miss is (MissReason.NONE if blocks == BLOCKS else MissReason.CORRUPT), result
        assert result.events["corrupt"] >= 1
        # All the rest came from the holdings.
        lacking = LAYOUT.chunk_extent(1)[1]
        shares = dict(result.shares)
        assert shares.pop("direct", 0) == (lacking if block < HITS else 0)
        assert sum(shares.values()) == BYTES - lacking
        assert wrong_blocks(target, PLACES, made.hashes[:blocks]) == []
        assert made.agent.events()["hold_corrupt"] == 1
        await made.idle()

    run_cluster(body)


def test_a_chunk_that_lost_its_bytes_comes_again_while_its_hand_off_goes_on(
    run_cluster: Run,
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        made = await prompt(cluster)
        source = await made.computed()
        hand_off = await made.prefill.hand_off(
            "r17", "decode-1", made.namespace_id, made.hashes, source, PLACES, deadline_s=WAIT_S
        )
        hand_off.layer_done(ALL_LAYERS - 1)
        record = made.agent.handed.of(made.namespace_id, "r17")
        final = (LAYOUT.chunk_count - 1) * BLOCKS
        await until(lambda: len(record.final) == final, "all but the last layer is held")
        _spoil(made, HITS)
        target = await made.decode.allocate(BYTES)
        receive = await made.decode.receive(
            "r17", made.namespace_id, made.hashes, target, PLACES, deadline_s=WAIT_S
        )
        await until(lambda: len(record.copied) == final, "all of it is with the engine")
        hand_off.layer_done(ALL_LAYERS)
        result = await receive.result()
        assert (result.blocks, result.miss) == (BLOCKS, MissReason.NONE), result
        assert set(result.shares) == {"handed_off"}
        assert wrong_blocks(target, PLACES, made.hashes) == []
        given = await hand_off.result()
        assert given.reason == ""
        assert given.sent_bytes == BYTES + LAYOUT.chunk_extent(1)[1]
        await made.idle()

    run_cluster(body)


def test_another_request_or_namespace_gets_nothing(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        made = await prompt(cluster)
        other_id = await made.decode.open_namespace(Namespace("other", LAYOUT))
        source = await made.computed()
        hand_off = await made.prefill.hand_off(
            "r17", "decode-1", made.namespace_id, made.hashes, source, PLACES, deadline_s=WAIT_S
        )
        hand_off.layer_done(ALL_LAYERS)
        assert (await hand_off.result()).reason == ""
        target = await made.decode.allocate(BYTES)
        empty = bytes(BYTES)
        target.view[:] = empty
        stranger = await made.decode.receive(
            "r18", made.namespace_id, made.hashes, target, PLACES, deadline_s=0.2
        )
        result = await stranger.result()
        assert (result.blocks, result.miss) == (0, MissReason.DEADLINE)
        foreign = await made.decode.receive(
            "r17", other_id, made.hashes, target, PLACES, deadline_s=0.2
        )
        result = await foreign.result()
        assert (result.blocks, result.miss) == (0, MissReason.DEADLINE)
        assert bytes(target.view) == empty
        receive = await made.decode.receive(
            "r17", made.namespace_id, made.hashes, target, PLACES, deadline_s=WAIT_S
        )
        assert (await receive.result()).blocks == BLOCKS
        await made.idle()

    run_cluster(body)


def test_a_name_means_another_request_in_another_namespace(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        made = await prompt(cluster)
        other_id = await made.prefill.open_namespace(Namespace("other", LAYOUT))
        source = await made.computed()
        target = await made.decode.allocate(BYTES)
        receive = await made.decode.receive(
            "r17", made.namespace_id, made.hashes, target, PLACES, deadline_s=WAIT_S
        )

        async def given(namespace_id: bytes) -> Any:
            return await made.prefill.hand_off(
                "r17", "decode-1", namespace_id, made.hashes, source, PLACES, deadline_s=WAIT_S
            )

        done, open_ = await given(other_id), await given(made.namespace_id)
        done.layer_done(ALL_LAYERS)
        assert (await done.result()).reason == ""
        stays = await given(other_id)
        await until(lambda: len(made.agent.intakes) == 2, "both are open")
        open_.layer_done(ALL_LAYERS)
        assert (await open_.result()).reason == ""
        result = await receive.result()
        assert (result.blocks, result.miss) == (BLOCKS, MissReason.NONE)
        # Its end is not that of the other one.
        stays.layer_done(ALL_LAYERS)
        assert (await stays.result()).reason == ""
        await made.decode.open_namespace(Namespace("other", LAYOUT))
        received = await made.decode.receive(
            "r17", other_id, made.hashes, target, PLACES, deadline_s=WAIT_S
        )
        assert (await received.result()).blocks == BLOCKS
        await made.idle()

    run_cluster(body)


def test_a_decode_node_without_holdings_is_unsupported_and_loads_go_on(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        made = await prompt(cluster, hold_bytes=0)
        source = await made.computed()
        assert (await made.load(source)).blocks == HITS
        hand_off = await made.prefill.hand_off(
            "r17", "decode-1", made.namespace_id, made.hashes, source, PLACES, deadline_s=WAIT_S
        )
        assert (await hand_off.result()).reason == "unsupported"
        target = await made.decode.allocate(BYTES)
        receive = await made.decode.receive(
            "r17", made.namespace_id, made.hashes, target, PLACES, deadline_s=WAIT_S
        )
        result = await receive.result()
        assert (result.blocks, result.miss) == (0, MissReason.UNAVAILABLE)
        assert result.events["unsupported"] == 1

    run_cluster(body)
