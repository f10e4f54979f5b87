"""The engine of a decode node: it receives what prefill engines hand off, and checks every byte.

Owns the paged memory that prompts are received into and their verification, as `engine.py` does for
loads. It decodes nothing: the pages of a prompt are free again once they were checked.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dualpath.agent.places import Places
from dualpath.bench.testbed.page_pool import (
    PagedMemory,
    PagePool,
    connect_paged,
    result_or_abort,
)
from dualpath.client.kv_client import KVClient
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.errors import DualPathError


@dataclass(frozen=True, slots=True)
class Received:
    """What came of a prompt: its blocks that were right and wrong, and why it is not whole, "" if
    it is. `shares`: bytes that the node held already (`retained`), and that were `handed_off`."""

    verified_blocks: int
    corrupt_blocks: int
    failure: str
    shares: dict[str, int]
    started_s: float = 0.0
    elapsed_s: float = 0.0
    """From its request (monotonic) to its end, before it was verified."""
    detail: str = ""


class DecodeEngine:
    """See the module docstring."""

    def __init__(
        self,
        client: KVClient,
        namespace: Namespace,
        memory: PagedMemory,
        *,
        seed: int,
        verifier: ThreadPoolExecutor,
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._memory = memory
        self._pool = PagePool(memory.pages, random.Random(seed))
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
    ) -> DecodeEngine:
        """Connect to the node's agent and register memory for `pages` blocks; `verifier` must have
        a single thread."""
        client, memory = await connect_paged(
            agent,
            namespace,
            token=token,
            pages=pages,
            behind_compute_link=behind_compute_link,
            seed=seed,
        )
        return cls(client, namespace, memory, seed=seed, verifier=verifier)

    @property
    def client(self) -> KVClient:
        """For the agent's statistics."""
        return self._client

    async def disturbed_pages(self) -> tuple[int, ...]:
        """Pages that were written to since they were given back. Only while nothing is received."""
        return await asyncio.get_running_loop().run_in_executor(
            self._verifier, self._memory.disturbed, range(self._memory.pages)
        )

    async def receive(
        self, request: str, hashes: Sequence[bytes], deadline_s: float, *, abort_s: float = math.inf
    ) -> Received:
        """Receive the prompt of `request`, of these blocks, and check it; give it up after
        `abort_s`. What fails is a value."""
        pages = await self._pool.take(len(hashes))
        places = self._memory.places(pages)
        blocks, failure, detail, shares = 0, "", "", dict[str, int]()
        started_s = time.monotonic()
        try:
            try:
                receive = await self._client.receive(
                    request,
                    self._namespace.id,
                    hashes,
                    self._memory.memory,
                    places,
                    deadline_s=deadline_s,
                )
                result = await result_or_abort(receive, abort_s)
                blocks, shares = result.blocks, dict(result.shares)
                failure = "" if blocks == len(hashes) else result.miss.value
                detail = result.detail
            except DualPathError as error:
                failure, detail = error.reason, str(error)
            elapsed_s = time.monotonic() - started_s
            wrong = await asyncio.get_running_loop().run_in_executor(
                self._verifier, self._verify, hashes[:blocks], places
            )
        finally:
            await self._pool.give(pages)
        failure = "corrupt" if wrong else failure
        return Received(blocks - wrong, wrong, failure, shares, started_s, elapsed_s, detail)

    def _verify(self, hashes: Sequence[bytes], places: Places) -> int:
        wrong = len(self._memory.wrong(hashes, places))
        self._memory.poison(places)
        return wrong

    async def close(self) -> None:
        """Give the memory back and end the session."""
        await self._memory.memory.aclose()
        await self._client.close()
