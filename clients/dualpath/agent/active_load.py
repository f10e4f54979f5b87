"""One running load: what it asked for, what it has, and who waits for it.

Owns the state of a load at its agent: lease, checksums, progress, a window a path, events. It
decides nothing; `daemon_loads.py` drives it. When `finish` has been called, all its windows are
closed and the result does not change any more.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping

import numpy as np
from dualpath.agent.load_progress import LoadProgress
from dualpath.agent.load_spec import LoadSpec, LoadUpdate
from dualpath.agent.load_window import ArmedChunk, LoadWindow
from dualpath.agent.outcome import LoadResult, LoadStarted, MissReason
from dualpath.agent.regions import EngineRegion
from dualpath.kvstore.layout import KVLayout
from dualpath.transfer.dispatcher import Grant
from dualpath.transfer.slices import Slices
from numpy.typing import NDArray


class ActiveLoad:
    """See the module docstring. Times are of the loop's clock."""

    def __init__(
        self,
        spec: LoadSpec,
        layout: KVLayout,
        entry: EngineRegion,
        started_at: float,
    ) -> None:
        self.spec = spec
        self.layout = layout
        self.entry = entry
        self.started_at = started_at
        self.deadline_at = started_at + spec.deadline_s
        self.lookup_s = 0.0
        self.lease_id = 0
        self.hit = LoadStarted(0, MissReason.NONE)
        self.checksums: NDArray[np.uint64] = np.empty(0, np.uint64)
        self.tiers = b""
        """Where each block of the hit lay at the lookup: a code of store_api.TIERS each."""
        self.progress = LoadProgress(layout, 0)
        self.windows: dict[str, LoadWindow] = {}
        self.tickets: dict[str, tuple[str, bytes]] = {}
        """By path: the relay's attachment at the daemon, and the ticket made out to it."""
        self.held: list[Grant] = []
        """Grants that wait for a ticket or a new lease."""
        self.refreshing: asyncio.Task[None] | None = None
        self.delegating: asyncio.Task[None] | None = None
        self.reports: list[asyncio.Task[None]] = []
        self.aborted = False
        self.refreshes = 0
        self.events: Counter[str] = Counter()
        self.shares: Counter[str] = Counter()
        self.miss = MissReason.NONE
        self.detail = ""
        self.result: LoadResult | None = None
        self.last_told: LoadResult | None = None
        self.deadline_timer: asyncio.TimerHandle | None = None
        self._span = (0, 0)
        self._next_tag = 1
        self._changed = asyncio.Event()
        self._block_slices: list[Slices | None] = []
        self._extents = [layout.chunk_extent(chunk) for chunk in range(layout.chunk_count)]

    def begin(self, hit: LoadStarted, lease_id: int, checksums: NDArray[np.uint64]) -> None:
        """The lookup found something: `checksums` has one a chunk, block after block."""
        self.hit = hit
        self.lease_id = lease_id
        self.checksums = checksums
        self.miss, self.detail = hit.miss, hit.detail
        self.progress = LoadProgress(self.layout, hit.hit_blocks)
        self._span = self.spec.places.span(self.layout, hit.hit_blocks)
        self._block_slices = [None] * hit.hit_blocks

    @property
    def span(self) -> tuple[int, int]:
        """(start, end) in the region of everything that may be written."""
        return self._span

    def arm_chunk(self, index: int) -> tuple[int, int, ArmedChunk]:
        """(block, chunk, what to arm) of one attempt at a load-chunk; each has a tag of its own."""
        block, chunk = self.progress.chunk_ref(index)
        whole = self._block_slices[block]
        if whole is None:
            whole = self._block_slices[block] = self.spec.places.block(self.layout, block)
        offset, nbytes = self._extents[chunk]
        slices = Slices(
            whole.base, whole.stride, whole.count, whole.length, whole.skip + offset, nbytes
        )
        tag = self._next_tag
        self._next_tag += 1
        checksum = int(self.checksums[block * len(self._extents) + chunk])
        return block, chunk, ArmedChunk(tag, index, slices, checksum)

    def verified(self, index: int, path: str) -> None:
        """A chunk is in place and intact."""
        self.progress.verified(index)
        self.shares[path] += self.progress.chunk_nbytes[index]

    def changed(self) -> None:
        """Wake whoever follows the load."""
        self._changed.set()

    async def next_change(self) -> LoadUpdate:
        """Wait for news; the last one has the result."""
        await self._changed.wait()
        self._changed.clear()
        if self.result is not None:
            self.last_told = self.result
            return LoadUpdate(self.layers_ready, self.result.blocks, result=self.result)
        return LoadUpdate(self.layers_ready, self.progress.blocks_valid)

    @property
    def layers_ready(self) -> int:
        """Leading layers verified for all valid blocks."""
        return self.progress.layers_ready

    def finish(self, now: float, extra: Mapping[str, int]) -> LoadResult:
        """Make the result; all windows must be closed."""
        assert all(not window.open for window in self.windows.values())
        blocks = self.progress.complete_blocks()
        requested = len(self.spec.hashes)
        self.events.update(extra)
        self.progress.cut(blocks)
        self.result = LoadResult(
            blocks=blocks,
            requested_blocks=requested,
            miss=MissReason.NONE if blocks == requested else self.miss,
            detail="" if blocks == requested else self.detail,
            shares=dict(self.shares),
            events=dict(self.events),
            elapsed_s=now - self.started_at,
            lookup_s=self.lookup_s,
            nbytes=blocks * self.layout.block_bytes,
        )
        self.changed()
        return self.result
