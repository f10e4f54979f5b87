"""A look-up that goes out with a load's first grant: found, partly, not, refused, late or lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
from dualpath.agent import daemon_link
from dualpath.agent.daemon_link import DaemonLink
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
    stored,
    until,
    wrong_blocks,
)
from dualpath.client.memory import EngineMemory
from dualpath.kvstore.service.lookup_calls import LookupCalls
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import Overloaded

Run: TypeAlias = Callable[..., None]
STORED, ASKED = 5, 8


async def _begun(
    client: KVClient, namespace_id: bytes, hashes: list[bytes], deadline_s: float = WAIT_S
) -> tuple[EngineMemory, Places, Load]:
    memory = await client.allocate(len(hashes) * LAYOUT.block_bytes)
    places = Places.contiguous(LAYOUT, len(hashes))
    load = await client.load(namespace_id, hashes, memory, places, deadline_s=deadline_s)
    return memory, places, load


async def _loaded(client: KVClient, namespace_id: bytes, hashes: list[bytes]) -> LoadResult:
    """Load; what came is right, nothing lies where nothing came, and no lease is left."""
    memory, places, load = await _begun(client, namespace_id, hashes)
    result = await load.result()
    assert (await load.started()).hit_blocks == result.blocks
    assert not wrong_blocks(memory, places, hashes[: result.blocks])
    assert not any(memory.view[result.blocks * LAYOUT.block_bytes :])
    return result


def _leases(cluster: LoopbackCluster) -> int:
    assert cluster.daemon is not None
    service = cluster.daemon._service
    assert service is not None
    return service.snapshot().store.leases


class _Held:
    """Keeps back what look-ups have found."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[tuple[DaemonLink, store_pb2.DeliverResponse]] = []
        self._handle = DaemonLink.on_response
        held = self

        def on_response(link: DaemonLink, response: store_pb2.DeliverResponse) -> None:
            if response.HasField("found"):
                held.answers.append((link, response))
            else:
                held._handle(link, response)

        monkeypatch.setattr(DaemonLink, "on_response", on_response)

    def release(self) -> None:
        """Let them through."""
        answers, self.answers = self.answers, []
        for link, response in answers:
            self._handle(link, response)


@pytest.mark.parametrize("known", [ASKED, STORED, 0])
def test_one_message_brings_all_part_or_nothing_of_a_load(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch, known: int
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, ASKED)
        hashes = hashes[:known] + chain(ASKED - known, "absent")

        async def never(*_: Any, **__: Any) -> None:
            raise AssertionError("it was looked up by a call of its own")

        monkeypatch.setattr(DaemonLink, "lookup", never)
        result = await _loaded(client, namespace_id, hashes)
        assert result.blocks == known
        assert result.miss is (MissReason.NONE if known == ASKED else MissReason.ABSENT)
        assert result.lookup_s > 0
        await until(lambda: _leases(cluster) == 0, "leases are given back")

    run_cluster(body)


@pytest.mark.parametrize("why", ["refused", "old daemon"])
def test_without_it_a_load_is_looked_up_by_a_call_of_its_own(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, ASKED)
        result = await _loaded(client, namespace_id, hashes)
        assert result.blocks == ASKED
        assert refused == (1 if why == "refused" else 0)

    refused = 0
    look_up = LookupCalls.look_up

    def refuse_once(calls: LookupCalls, *args: Any) -> store_pb2.LookupResponse:
        nonlocal refused
        refused += 1
        if refused == 1:
            raise Overloaded("not now", retry_after_s=1.0)
        refused = 1
        return look_up(calls, *args)

    if why == "refused":
        monkeypatch.setattr(LookupCalls, "look_up", refuse_once)
    else:
        monkeypatch.setattr(DaemonLink, "looks_up", False)
    run_cluster(body)


def test_a_look_up_that_is_never_answered_is_asked_again(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, ASKED)
        monkeypatch.setattr(LookupCalls, "lookup", swallow_once)
        assert (await client.lookup(namespace_id, hashes)).blocks == ASKED
        assert len(swallowed) == 1

    swallowed: list[Any] = []
    lookup = LookupCalls.lookup

    async def swallow_once(calls: LookupCalls, *args: Any) -> store_pb2.LookupResponse:
        if not swallowed:
            swallowed.append(args)
            await asyncio.Event().wait()
        return await lookup(calls, *args)

    monkeypatch.setattr(daemon_link, "LOOKUP_PATIENCE_S", 0.05)
    run_cluster(body)


def test_what_lands_before_the_answer_counts_only_once_it_is_verified(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, STORED)
        held = _Held(monkeypatch)
        hashes += chain(ASKED - STORED, "absent")
        memory, _, load = await _begun(client, namespace_id, hashes)
        await until(
            lambda: bool(held.answers) and any(memory.view[:1024]), "a first chunk has landed"
        )
        assert not load.done
        ((_, response),) = held.answers
        sums = bytearray(response.found.hit.checksums)
        sums[8 * LAYOUT.chunk_count * 2] ^= 1  # of the third block's first chunk
        response.found.hit.checksums = bytes(sums)
        held.release()
        result = await load.result()
        assert (result.blocks, result.miss) == (2, MissReason.CORRUPT)

    run_cluster(body)


@pytest.mark.parametrize("end", ["abort", "deadline", "timeout"])
def test_a_lease_that_comes_after_the_end_of_its_load_is_given_back(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded(lookup_timeout_s=0.2 if end == "timeout" else WAIT_S)
        namespace_id, hashes = await stored(client, STORED)
        held = _Held(monkeypatch)
        deadline_s = 0.2 if end == "deadline" else WAIT_S
        _, _, load = await _begun(client, namespace_id, hashes, deadline_s)
        await until(lambda: bool(held.answers), "the answer is on its way")
        assert _leases(cluster) == 1
        if end == "abort":
            await load.abort()
        result = await load.result()
        assert result.blocks == 0
        assert result.miss is (MissReason.UNAVAILABLE if end == "abort" else MissReason.DEADLINE)
        held.release()
        await until(lambda: _leases(cluster) == 0, "the lease is given back")
        loader = embedded_agent(client).loader
        assert loader.active == 0

    run_cluster(body)


def test_a_session_that_is_lost_before_the_answer_costs_a_load_nothing_but_time(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, STORED)
        held = _Held(monkeypatch)
        memory, places, load = await _begun(client, namespace_id, hashes)
        await until(lambda: bool(held.answers), "the answer is on its way")
        link, _ = held.answers[0]
        monkeypatch.undo()
        link.link.lose("for a test")
        result = await asyncio.wait_for(load.result(), WAIT_S)
        assert (result.blocks, result.miss) == (STORED, MissReason.NONE)
        assert not wrong_blocks(memory, places, hashes)
        held.release()  # of a session that is over: nobody listens
        await until(lambda: _leases(cluster) == 0, "leases are given back")

    run_cluster(body)
