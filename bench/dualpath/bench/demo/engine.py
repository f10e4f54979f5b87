"""The engine of a prefill node: it runs loads into paged memory and checks what arrived.

Owns the paged KV pool of an engine, the loads that it runs and the verification of every byte of
every loaded block against the keyed content, away from the event loop. A page is poisoned before
it is used again, so that bytes of an earlier load can never pass for those of a later one.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from dualpath.agent.places import Places
from dualpath.bench.demo.keyed_content import KeyedContent
from dualpath.bench.demo.workload import PlannedLoad
from dualpath.client.kv_client import KVClient
from dualpath.client.memory import EngineMemory
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.errors import DualPathError

CORRUPT_DETAILS_MAX = 16
_POISON = 0xDB


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """What one load came to, as the engine itself saw it.

    `failure` is "" when every requested block arrived, else the reason. `nbytes` counts blocks
    that were verified right; `shares` are the agent's bytes by path. `ended_s` (monotonic) is when
    the load ended, before it was verified.
    """

    session: int
    turn: int
    requested_blocks: int
    verified_blocks: int
    corrupt_blocks: int
    nbytes: int
    ended_s: float
    elapsed_s: float
    failure: str
    detail: str
    shares: Mapping[str, int]
    events: Mapping[str, int]


@dataclass(slots=True)
class _Arrival:
    """What a load brought, while it is not verified."""

    places: Places
    blocks: int = 0
    ended_s: float = 0.0
    elapsed_s: float = 0.0
    failure: str = ""
    detail: str = ""
    shares: Mapping[str, int] = field(default_factory=dict)
    events: Mapping[str, int] = field(default_factory=dict)


class PagePool:
    """Pages of an engine's KV memory, handed out in a shuffled order, whole loads at a time."""

    def __init__(self, pages: int, rng: random.Random) -> None:
        self._free = list(range(pages))
        rng.shuffle(self._free)
        self._pages = pages
        self._changed = asyncio.Condition()

    async def take(self, count: int) -> tuple[int, ...]:
        """Wait for `count` free pages; waits only for loads that have deadlines themselves."""
        assert count <= self._pages
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._free) >= count)
            taken = tuple(self._free[:count])
            del self._free[:count]
            return taken

    async def give(self, pages: Sequence[int]) -> None:
        """Return pages that `take` gave."""
        async with self._changed:
            self._free.extend(pages)
            self._changed.notify_all()


class PrefillEngine:
    """Replays loads into a paged pool `[layers, pages, layer_bytes]` and checks what came."""

    def __init__(
        self,
        client: KVClient,
        namespace: Namespace,
        memory: EngineMemory,
        *,
        pages: int,
        seed: int,
        verifier: ThreadPoolExecutor,
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._memory = memory
        self._pages = pages
        self._pool = PagePool(pages, random.Random(seed))
        self._content = KeyedContent(namespace.layout, seed)
        self._verifier = verifier

    @classmethod
    async def open(
        cls,
        agent: str,
        namespace: Namespace,
        *,
        token: str,
        pages: int,
        behind_compute_link: bool,
        seed: int,
        verifier: ThreadPoolExecutor,
    ) -> PrefillEngine:
        """Connect to the node's agent and register a pool of `pages` blocks.

        `verifier` must have a single thread: the content of an engine has one scratch block.
        """
        client = await KVClient.connect(agent, token=token)
        try:
            await client.open_namespace(namespace)
            memory = await client.allocate(
                pages * namespace.layout.block_bytes, behind_compute_link=behind_compute_link
            )
        except BaseException:
            await client.close()
            raise
        engine = cls(client, namespace, memory, pages=pages, seed=seed, verifier=verifier)
        # Touches every page now, so that no load pays for page faults.
        np.frombuffer(memory.view, dtype=np.uint8)[:] = _POISON
        return engine

    @property
    def client(self) -> KVClient:
        """For the agent's statistics."""
        return self._client

    async def load(
        self, planned: PlannedLoad, *, policy: str, decode_peer: str, deadline_s: float
    ) -> asyncio.Task[LoadOutcome]:
        """Run one load; return when it has ended, with the verification under way.

        Failures are outcomes; only programming errors raise. The pages are taken until the
        verification has ended, so that these never pile up beyond the pool.
        """
        pages = await self._pool.take(len(planned.hashes))
        arrival = _Arrival(Places.paged(self._namespace.layout, pages, self._pages))
        try:
            await self._arrive(planned, arrival, policy, decode_peer, deadline_s)
        except BaseException:
            await self._pool.give(pages)
            raise
        return asyncio.create_task(self._outcome(planned, pages, arrival))

    async def _arrive(
        self,
        planned: PlannedLoad,
        arrival: _Arrival,
        policy: str,
        decode_peer: str,
        deadline_s: float,
    ) -> None:
        started_s = time.monotonic()
        try:
            load = await self._client.load(
                self._namespace.id,
                planned.hashes,
                self._memory,
                arrival.places,
                deadline_s=deadline_s,
                policy=policy,
                decode_peer=decode_peer,
            )
            result = await load.result()
            arrival.blocks = result.blocks
            arrival.shares, arrival.events = result.shares, result.events
            if result.blocks < len(planned.hashes):
                arrival.failure, arrival.detail = result.miss.value, result.detail
        except DualPathError as error:
            arrival.failure, arrival.detail = error.reason, str(error)
        arrival.ended_s = time.monotonic()
        arrival.elapsed_s = arrival.ended_s - started_s

    async def _outcome(
        self, planned: PlannedLoad, pages: tuple[int, ...], arrival: _Arrival
    ) -> LoadOutcome:
        try:
            wrong = await asyncio.get_running_loop().run_in_executor(
                self._verifier, self._verify, planned.hashes[: arrival.blocks], arrival.places
            )
        finally:
            await self._pool.give(pages)
        verified = arrival.blocks - len(wrong)
        return LoadOutcome(
            session=planned.session,
            turn=planned.turn,
            requested_blocks=len(planned.hashes),
            verified_blocks=verified,
            corrupt_blocks=len(wrong),
            nbytes=verified * self._namespace.layout.block_bytes,
            ended_s=arrival.ended_s,
            elapsed_s=arrival.elapsed_s,
            failure="corrupt" if wrong else arrival.failure,
            detail="; ".join(wrong[:CORRUPT_DETAILS_MAX]) if wrong else arrival.detail,
            shares=arrival.shares,
            events=arrival.events,
        )

    def _verify(self, hashes: Sequence[bytes], places: Places) -> list[str]:
        """Check and poison the blocks; return what is wrong with each bad one."""
        wrong = []
        for index, key in enumerate(hashes):
            base = places.base_bytes[index]
            bad = self._content.verify(key, self._memory.view, base, places.layer_stride_bytes)
            if bad is not None:
                wrong.append(f"block {index} ({key.hex()[:12]}): {bad}")
        self._poison(places)
        return wrong

    def _poison(self, places: Places) -> None:
        layout = self._namespace.layout
        pool = np.frombuffer(self._memory.view, dtype=np.uint8)
        pool = pool[: layout.layers * places.layer_stride_bytes]
        by_page = pool.reshape(layout.layers, -1, layout.layer_bytes)
        for base in places.base_bytes:
            by_page[:, base // layout.layer_bytes] = _POISON

    async def close(self) -> None:
        """Give the memory back and end the session."""
        await self._memory.aclose()
        await self._client.close()
