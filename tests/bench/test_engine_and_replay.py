"""Engines of a demo over an agent made of memory: what they verify, how sessions are replayed."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from dualpath.agent.hand_off_spec import HandOffResult, HandOffSpec, LayerGate
from dualpath.agent.load_spec import LoadSpec, LoadUpdate, SaveSpec
from dualpath.agent.outcome import LoadResult, LoadStarted, Lookup, MissReason, SaveResult
from dualpath.bench.testbed.engine import LoadOutcome, PrefillEngine
from dualpath.bench.testbed.fill import fill_batches
from dualpath.bench.testbed.keyed_content import KeyedContent
from dualpath.bench.testbed.page_pool import PagedMemory, PagePool
from dualpath.bench.testbed.replay import Replay, load_deadline_s
from dualpath.bench.testbed.workload import Context, PlannedLoad, Workload, generated
from dualpath.client.kv_client import KVClient
from dualpath.client.memory import EngineMemory
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.proto.v1 import agent_pb2
from dualpath.transfer.errors import Unavailable
from dualpath.transfer.region import Region

LAYOUT = KVLayout(4, 64, 4096, "u8")
NAMESPACE = Namespace("test", LAYOUT)
SEED = 5


class MemoryAgent:
    """An agent session that makes the right bytes up; `spoil` may then change the memory."""

    def __init__(self, spoil: Callable[[memoryview, LoadSpec], None] | None = None) -> None:
        self.content = KeyedContent(LAYOUT, SEED)
        self.memory: EngineMemory | None = None
        self.spoil = spoil
        self.specs: list[LoadSpec] = []
        self.running = self.running_max = 0
        self.blocks_max = 1 << 20
        self.writes = True

    async def open_namespace(self, namespace: Namespace) -> bytes:
        return namespace.id

    async def allocate(self, nbytes: int, *, behind_compute_link: bool) -> EngineMemory:
        self.memory = EngineMemory(Region.anonymous(nbytes), 1, lambda _handle: None)
        return self.memory

    async def lookup(self, namespace_id: bytes, hashes: Sequence[bytes]) -> Lookup:
        return Lookup(0, (), MissReason.ABSENT)

    async def load(self, spec: LoadSpec) -> AsyncIterator[LoadUpdate]:
        assert self.memory is not None
        self.specs.append(spec)
        self.running += 1
        self.running_max = max(self.running_max, self.running)
        await asyncio.sleep(0)
        blocks = min(len(spec.hashes), self.blocks_max)
        for index in range(blocks if self.writes else 0):
            self.content.fill(
                spec.hashes[index],
                self.memory.view,
                spec.places.base_bytes[index],
                spec.places.layer_stride_bytes,
            )
        if self.spoil is not None:
            self.spoil(self.memory.view, spec)
        self.running -= 1
        yield LoadUpdate(
            started=LoadStarted(blocks, MissReason.NONE),
            result=LoadResult(
                blocks=blocks,
                requested_blocks=len(spec.hashes),
                miss=MissReason.NONE if blocks == len(spec.hashes) else MissReason.DEADLINE,
                detail="",
                shares={"direct": blocks * LAYOUT.block_bytes},
                events={},
                elapsed_s=0.1,
                lookup_s=0.0,
                nbytes=blocks * LAYOUT.block_bytes,
            ),
        )

    async def abort(self, load_id: str) -> None:
        raise Unavailable("not needed here")

    def receive(self, spec: LoadSpec) -> AsyncIterator[LoadUpdate]:
        raise Unavailable("not needed here")

    async def hand_off(self, spec: HandOffSpec, gate: LayerGate) -> HandOffResult:
        raise Unavailable("not needed here")

    async def save(self, spec: SaveSpec) -> SaveResult:
        raise Unavailable("not needed here")

    async def stats(self) -> agent_pb2.AgentStatsResponse:
        return agent_pb2.AgentStatsResponse()

    async def close(self) -> None:
        pass


async def engine(agent: MemoryAgent, verifier: ThreadPoolExecutor, pages: int) -> PrefillEngine:
    client = KVClient(agent)
    memory = await PagedMemory.allocate(
        client, LAYOUT, pages=pages, behind_compute_link=False, seed=SEED
    )
    return PrefillEngine(client, NAMESPACE, memory, seed=SEED, verifier=verifier)


def planned(blocks: int, session: int = 0) -> PlannedLoad:
    return PlannedLoad(session, 0, tuple(bytes([session, i]) * 16 for i in range(blocks)))


def load_once(agent: MemoryAgent, *loads: PlannedLoad) -> list[LoadOutcome]:
    async def run() -> list[LoadOutcome]:
        with ThreadPoolExecutor(1) as verifier:
            under_test = await engine(agent, verifier, 8)
            return [
                await (await under_test.load(each, policy="split", decode_peer="", deadline_s=10))
                for each in loads
            ]

    return asyncio.run(run())


def test_a_right_load_is_verified_block_by_block() -> None:
    (outcome,) = load_once(MemoryAgent(), planned(6))
    assert (outcome.verified_blocks, outcome.corrupt_blocks, outcome.failure) == (6, 0, "")
    assert outcome.nbytes == 6 * LAYOUT.block_bytes


def test_one_flipped_byte_makes_that_block_corrupt_and_names_it() -> None:
    def spoil(view: memoryview, spec: LoadSpec) -> None:
        view[spec.places.base_bytes[2] + 2 * spec.places.layer_stride_bytes + 77] ^= 1

    (outcome,) = load_once(MemoryAgent(spoil), planned(6))
    assert (outcome.verified_blocks, outcome.corrupt_blocks, outcome.failure) == (5, 1, "corrupt")
    assert "block 2" in outcome.detail
    assert "1 wrong bytes, the first in layer 2 at byte 77" in outcome.detail


def test_bytes_left_by_an_earlier_load_do_not_pass_for_those_of_a_later_one() -> None:
    agent = MemoryAgent()

    async def run() -> LoadOutcome:
        with ThreadPoolExecutor(1) as verifier:
            under_test = await engine(agent, verifier, 6)
            for writes in (True, False):
                agent.writes = writes
                last = await under_test.load(
                    planned(6), policy="split", decode_peer="", deadline_s=10
                )
                outcome = await last
            return outcome

    outcome = asyncio.run(run())
    assert agent.specs[0].places.base_bytes == agent.specs[1].places.base_bytes
    assert outcome.corrupt_blocks == 6


def test_a_shorter_prefix_is_a_failure_with_its_reason_and_what_came_is_verified() -> None:
    agent = MemoryAgent()
    agent.blocks_max = 4
    (outcome,) = load_once(agent, planned(6))
    assert (outcome.verified_blocks, outcome.failure) == (4, "deadline")


def test_the_pages_of_a_load_are_scattered_and_its_own() -> None:
    agent = MemoryAgent()
    load_once(agent, planned(8))
    bases = agent.specs[0].places.base_bytes
    assert sorted(bases) == [page * LAYOUT.layer_bytes for page in range(8)]
    assert list(bases) != sorted(bases)


def test_a_load_waits_for_pages() -> None:
    async def run() -> None:
        import random

        pool = PagePool(4, random.Random(1))
        first = await pool.take(3)
        waiting = asyncio.create_task(pool.take(2))
        await asyncio.sleep(0)
        assert not waiting.done()
        await pool.give(first)
        assert len(await waiting) == 2

    asyncio.run(run())


def workload() -> Workload:
    return generated(
        Context.K32,
        sessions=12,
        block_bytes=LAYOUT.block_bytes,
        load_bytes_mean=4 * LAYOUT.block_bytes,
        budget_bytes=200 * LAYOUT.block_bytes,
        seed=1,
    )


@pytest.mark.parametrize("concurrency", [1, 4])
def test_sessions_run_turn_after_turn_and_no_more_of_them_than_asked(concurrency: int) -> None:
    agents = [MemoryAgent(), MemoryAgent()]
    plan = workload()
    seen: list[LoadOutcome] = []

    async def run() -> None:
        with ThreadPoolExecutor(1) as verifier:
            engines = [
                await engine(agent, verifier, concurrency * plan.load_blocks_max)
                for agent in agents
            ]
            replay = Replay(engines, ["d0", "d1"], concurrency=concurrency, deadline_s=9)
            _, outcomes = await replay.run(plan, "split", seen.append)
            assert list(outcomes) == seen

    asyncio.run(run())
    assert len(seen) == plan.loads
    assert not any(outcome.failure for outcome in seen)
    assert max(agent.running_max for agent in agents) <= concurrency
    for session in range(12):
        turns = [outcome.turn for outcome in seen if outcome.session == session]
        assert all(after == before + 1 for before, after in pairwise(turns))
    peers = {(id(agent), spec.decode_peer) for agent in agents for spec in agent.specs}
    assert len(peers) == 4


def test_deadlines_leave_room_for_all_loads_on_one_link() -> None:
    plan = workload()
    assert load_deadline_s(plan, 8, 50e6) == 30
    assert load_deadline_s(plan, 8, 1e4) > 30
    assert load_deadline_s(plan, 8, 1.0) == 600


def test_batches_end_with_the_last_block() -> None:
    plan = workload()
    assert sum(len(hashes) for hashes, _ in fill_batches(plan, 7)) == plan.stored_blocks
