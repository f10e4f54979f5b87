"""Paged memory of an engine `[layers, pages, layer_bytes]`: its free pages, and what lies in them.

A page is poisoned before it is used again, so that bytes of an earlier prompt can never pass for
those of a later one; and whoever writes late into a page that is not in use can be found out.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from dualpath.agent.outcome import LoadResult
from dualpath.agent.places import Places
from dualpath.bench.testbed.keyed_content import KeyedContent
from dualpath.client.kv_client import KVClient
from dualpath.client.load import Load
from dualpath.client.memory import EngineMemory
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.errors import DualPathError

_POISON = 0xDB


class PagePool:
    """Pages of an engine's KV memory, handed out in a shuffled order, whole prompts at a time."""

    def __init__(self, pages: int, rng: random.Random) -> None:
        self._free = list(range(pages))
        rng.shuffle(self._free)
        self._pages = pages
        self._changed = asyncio.Condition()

    async def take(self, count: int) -> tuple[int, ...]:
        """Wait for `count` free pages; waits only for work that has deadlines itself."""
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


class PagedMemory:
    """The memory of a pool, registered with an agent, and the keyed content of its pages.

    `fill`, `wrong` and `poison` belong to one thread: the content has one scratch block.
    """

    def __init__(self, memory: EngineMemory, layout: KVLayout, *, pages: int, seed: int) -> None:
        self.memory = memory
        self.pages = pages
        self._layout = layout
        self._content = KeyedContent(layout, seed)

    @classmethod
    async def allocate(
        cls,
        client: KVClient,
        layout: KVLayout,
        *,
        pages: int,
        behind_compute_link: bool,
        seed: int,
    ) -> PagedMemory:
        """Memory for `pages` blocks. Touches all of it, so that no load pays for page faults."""
        memory = await client.allocate(
            pages * layout.block_bytes, behind_compute_link=behind_compute_link
        )
        np.frombuffer(memory.view, dtype=np.uint8)[:] = _POISON
        return cls(memory, layout, pages=pages, seed=seed)

    def places(self, pages: tuple[int, ...]) -> Places:
        """Where blocks in these pages lie."""
        return Places.paged(self._layout, pages, self.pages)

    def fill(self, keys: Sequence[bytes], places: Places, first: int = 0) -> None:
        """Write the blocks of `keys` into the places from number `first` on."""
        for base, key in zip(places.base_bytes[first:], keys, strict=True):
            self._content.fill(key, self.memory.view, base, places.layer_stride_bytes)

    def wrong(self, keys: Sequence[bytes], places: Places) -> list[str]:
        """What is wrong with each bad block."""
        found = []
        for index, key in enumerate(keys):
            base = places.base_bytes[index]
            bad = self._content.verify(key, self.memory.view, base, places.layer_stride_bytes)
            if bad is not None:
                found.append(f"block {index} ({key.hex()[:12]}): {bad}")
        return found

    def disturbed(self, pages: Sequence[int]) -> tuple[int, ...]:
        """Which of these pages, poisoned and given back, were written to since."""
        by_page = self._by_page(self.pages * self._layout.layer_bytes)
        return tuple(page for page in pages if (by_page[:, page] != _POISON).any())

    def poison(self, places: Places) -> None:
        """Make the pages unfit for use."""
        by_page = self._by_page(places.layer_stride_bytes)
        for base in places.base_bytes:
            by_page[:, base // self._layout.layer_bytes] = _POISON

    def _by_page(self, layer_stride_bytes: int) -> npt.NDArray[np.uint8]:
        """`[layers, pages, layer_bytes]`."""
        layout = self._layout
        pool: npt.NDArray[np.uint8] = np.frombuffer(self.memory.view, dtype=np.uint8)
        pool = pool[: layout.layers * layer_stride_bytes]
        return pool.reshape(layout.layers, -1, layout.layer_bytes)


async def connect_paged(
    agent: str,
    namespace: Namespace,
    *,
    token: str,
    pages: int,
    behind_compute_link: bool,
    seed: int,
) -> tuple[KVClient, PagedMemory]:
    """An engine's session with its node's agent, and memory there for `pages` blocks."""
    client = await KVClient.connect(agent, token=token)
    try:
        await client.open_namespace(namespace)
        memory = await PagedMemory.allocate(
            client,
            namespace.layout,
            pages=pages,
            behind_compute_link=behind_compute_link,
            seed=seed,
        )
    except BaseException:
        await client.close()
        raise
    return client, memory


async def result_or_abort(load: Load, abort_s: float) -> LoadResult:
    """What a load or a receive comes to; it is given up after `abort_s`, which may be inf. Raises
    what its `result` raises."""
    if abort_s < math.inf:
        result = asyncio.ensure_future(load.result())
        await asyncio.wait((result,), timeout=abort_s)
        with contextlib.suppress(DualPathError):  # what cannot be told to end, ends by itself
            await load.abort()
        return await result
    return await load.result()
