"""The engines of a demo: one that fills the store, and one a prefill node that replays loads.

Owns the paged KV pool of an engine, the loads that it runs and the verification of every byte of
every loaded block against the keyed content, away from the event loop. A page is poisoned before
it is used again, so that bytes of an earlier load can never pass for those of a later one.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from dualpath.agent.places import Places
from dualpath.bench.demo.keyed_content import KeyedContent
from dualpath.bench.demo.workload import PlannedLoad, Workload
from dualpath.client.kv_client import KVClient
from dualpath.client.memory import EngineMemory
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.errors import DualPathError, Unavailable

FILL_BATCH_BYTES = 16 << 20
FILL_DEADLINE_S = 120.0
CORRUPT_DETAILS_MAX = 16
_POISON = 0xDB


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """What one load came to, as the engine itself saw it.

    `failure` is "" when every requested block arrived, else the reason. `nbytes` counts blocks
    that were verified right; `shares` are the agent's bytes by path.
    """

    session: int
    turn: int
    requested_blocks: int
    verified_blocks: int
    corrupt_blocks: int
    nbytes: int
    elapsed_s: float
    failure: str
    detail: str
    shares: Mapping[str, int]
    events: Mapping[str, int]


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
    ) -> LoadOutcome:
        """Run one load and verify it. Failures are outcomes; only programming errors raise."""
        pages = await self._pool.take(len(planned.hashes))
        try:
            return await self._load(planned, pages, policy, decode_peer, deadline_s)
        finally:
            await self._pool.give(pages)

    async def _load(
        self,
        planned: PlannedLoad,
        pages: tuple[int, ...],
        policy: str,
        decode_peer: str,
        deadline_s: float,
    ) -> LoadOutcome:
        places = Places.paged(self._namespace.layout, pages, self._pages)
        requested = len(planned.hashes)
        started_s = time.monotonic()
        shares: Mapping[str, int] = {}
        events: Mapping[str, int] = {}
        blocks, failure, detail = 0, "", ""
        try:
            load = await self._client.load(
                self._namespace.id,
                planned.hashes,
                self._memory,
                places,
                deadline_s=deadline_s,
                policy=policy,
                decode_peer=decode_peer,
            )
            result = await load.result()
            blocks, shares, events = result.blocks, result.shares, result.events
            if blocks < requested:
                failure, detail = result.miss.value, result.detail
        except DualPathError as error:
            failure, detail = error.reason, str(error)
        elapsed_s = time.monotonic() - started_s
        wrong = await asyncio.get_running_loop().run_in_executor(
            self._verifier, self._verify, planned.hashes[:blocks], places
        )
        if wrong:
            failure, detail = "corrupt", "; ".join(wrong[:CORRUPT_DETAILS_MAX])
        verified = blocks - len(wrong)
        return LoadOutcome(
            session=planned.session,
            turn=planned.turn,
            requested_blocks=requested,
            verified_blocks=verified,
            corrupt_blocks=len(wrong),
            nbytes=verified * self._namespace.layout.block_bytes,
            elapsed_s=elapsed_s,
            failure=failure,
            detail=detail,
            shares=shares,
            events=events,
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
        self._memory.close()
        await self._client.close()


async def fill_store(
    agent: str,
    namespace: Namespace,
    workload: Workload,
    *,
    token: str,
    seed: int,
    on_progress: Callable[[int], None],
) -> int:
    """Save all blocks of the workload through the agent; return how many bytes that were.

    Two buffers: one is generated while the other is being saved. Raises Unavailable, naming what
    the store said, if a block could not be stored.
    """
    layout = namespace.layout
    batch_blocks = max(1, FILL_BATCH_BYTES // layout.block_bytes)
    content = KeyedContent(layout, seed)
    done_bytes = 0
    saving: asyncio.Task[int] | None = None
    async with await KVClient.connect(agent, token=token) as client:
        await client.open_namespace(namespace)
        buffers = [await client.allocate(batch_blocks * layout.block_bytes) for _ in range(2)]

        async def save(hashes: Sequence[bytes], parents: Sequence[bytes], half: int) -> int:
            result = await client.save(
                namespace.id,
                hashes,
                parents,
                buffers[half],
                Places.contiguous(layout, len(hashes)),
                deadline_s=FILL_DEADLINE_S,
            )
            if result.present_blocks < len(hashes):
                raise Unavailable(
                    f"the store took {result.present_blocks} of {len(hashes)} blocks: "
                    f"{result.reason or 'refused'} {result.detail}".strip()
                )
            return len(hashes) * layout.block_bytes

        def generate(hashes: Sequence[bytes], half: int) -> None:
            for index, key in enumerate(hashes):
                content.fill(
                    key, buffers[half].view, index * layout.block_bytes, layout.layer_bytes
                )

        half = 0
        for hashes, parents in fill_batches(workload, batch_blocks):
            await asyncio.to_thread(generate, hashes, half)
            if saving is not None:
                done_bytes += await saving
                on_progress(done_bytes)
            saving = asyncio.create_task(save(hashes, parents, half))
            half = 1 - half
        if saving is not None:
            done_bytes += await saving
            on_progress(done_bytes)
        for buffer in buffers:
            buffer.close()
    return done_bytes


def fill_batches(
    workload: Workload, batch_blocks: int
) -> list[tuple[tuple[bytes, ...], tuple[bytes, ...]]]:
    """(hashes, parents) of each batch: every distinct block once, parents first."""
    stored: set[bytes] = set()
    batches = []
    for chain in workload.chains:
        new = [
            (each, chain[index - 1] if index else b"")
            for index, each in enumerate(chain)
            if each not in stored
        ]
        stored.update(each for each, _ in new)
        for start in range(0, len(new), batch_blocks):
            part = new[start : start + batch_blocks]
            batches.append((tuple(each for each, _ in part), tuple(parent for _, parent in part)))
    return batches
