"""One running load: what it asked for, what it has, and who waits for it.

Owns the state of a load at its agent: lease, checksums, progress, a window a path, events. It
decides nothing; `daemon_loads.py` drives it. When `finish` has been called, all its windows are
closed and the result does not change any more.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from dualpath.agent.first_look import FirstLook
from dualpath.agent.load_progress import LoadProgress
from dualpath.agent.load_spec import LoadSpec, LoadUpdate
from dualpath.agent.load_window import ArmedChunks, LoadWindow
from dualpath.agent.outcome import LoadResult, LoadStarted, MissReason
from dualpath.agent.regions import EngineRegion
from dualpath.kvstore.layout import KVLayout
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.chunk_queue import ChunkState
from dualpath.transfer.errors import DualPathError
from dualpath.transfer.grant import Grant
from dualpath.transfer.slice_table import SliceTable
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
        self.former_leases: list[int] = []
        """That others replaced. They may still hold what is on its way."""
        self.hit = LoadStarted(0, MissReason.NONE)
        self.checksums: NDArray[np.uint64] = np.empty(0, np.uint64)
        self.tiers = b""
        """Where each block of the hit lay at the lookup: a code of store_api.TIERS each."""
        self.progress = LoadProgress(layout, 0)
        self.had: Collection[tuple[int, int]] = ()
        """(block, chunk of the block) of what is in place and verified before it begins."""
        self.windows: dict[str, LoadWindow] = {}
        self.tickets: dict[str, tuple[str, bytes]] = {}
        """By path: the relay's attachment at the daemon, and the ticket made out to it."""
        self.held: list[Grant] = []
        """Grants that wait for a ticket or a new lease."""
        self.looking: FirstLook | None = None
        """While what is stored is only assumed, and there is no lease."""
        self.refreshing: asyncio.Task[None] | None = None
        self.delegating: asyncio.Task[None] | None = None
        self.reports: list[asyncio.Future[None]] = []
        """What is still said, or read, under its lease."""
        self.distrusted: set[int] = set()
        """Chunks that came corrupt: relays are to read them from storage."""
        self.held_bytes: Counter[str] = Counter()
        """By path: what a relay did not have to read, as far as it has said so."""
        self.aborted = False
        self.look_limit: asyncio.Timeout | None = None
        """Of the look-up, while that is under way: what is aborted then does not wait for it."""
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
        self._shown = (0, 0, False)
        extents = [layout.chunk_extent(chunk) for chunk in range(layout.chunk_count)]
        self._skips, self._sizes = np.array(extents, np.int64).T
        self._bases: NDArray[np.int64] = np.empty(0, np.int64)

    @property
    def recompute_block_s(self) -> float:
        """Seconds in which the engine would compute a block itself; 0: it has not said."""
        rate = self.spec.recompute_tokens_per_s
        return self.layout.block_tokens / rate if rate else 0.0

    def begin(self, hit: LoadStarted, lease_id: int, checksums: NDArray[np.uint64]) -> None:
        """The lookup found something: `checksums` has one a chunk, block after block."""
        self._spread(hit.hit_blocks)
        self._know(hit, lease_id, checksums)

    def assume(self, look: FirstLook) -> None:
        """Begin as if every block were stored, until `found` says what is."""
        self.looking = look
        self._spread(len(self.spec.hashes))

    def found(self, answer: store_pb2.LookupResponse, now: float) -> None:
        """What the look-up of an assumed load has found. Raises DualPathError for a bad answer."""
        check_found(answer, self.spec, self.layout)
        hit = LoadStarted(answer.blocks, MissReason.of_proto(answer.miss), answer.detail)
        self._know(hit, answer.lease_id, np.frombuffer(answer.checksums, "<u8"))
        self.tiers = answer.tiers
        self.lookup_s = now - self.started_at
        self.looking = None

    def _spread(self, blocks: int) -> None:
        """The load is of so many blocks."""
        self.progress = LoadProgress(self.layout, blocks)
        self._span = self.spec.places.span(self.layout, blocks)
        self._bases = np.array(self.spec.places.base_bytes[:blocks], np.int64)

    def _know(self, hit: LoadStarted, lease_id: int, checksums: NDArray[np.uint64]) -> None:
        self.hit = hit
        self.lease_id = lease_id
        self.checksums = checksums
        self.miss, self.detail = hit.miss, hit.detail

    @property
    def span(self) -> tuple[int, int]:
        """(start, end) in the region of everything that may be written."""
        return self._span

    def arm(self, indices: Sequence[int]) -> ArmedChunks:
        """What to arm for one attempt at these load-chunks; each has a tag of its own."""
        chunks, blocks = np.divmod(np.array(indices, np.int64), self.progress.blocks)
        layout, places = self.layout, self.spec.places
        targets = SliceTable(
            places.layer_stride_bytes,
            layout.layers,
            layout.layer_bytes,
            self._bases[blocks].tolist(),
            self._skips[chunks].tolist(),
            self._sizes[chunks].tolist(),
        )
        first_tag = self._next_tag
        self._next_tag += len(indices)
        armed = ArmedChunks(first_tag, indices, blocks.tolist(), chunks.tolist(), targets, ())
        return armed if self.looking else replace(armed, checksums=self.checksums_of(armed))

    def describe(self, chunks: Mapping[ChunkState, int]) -> str:
        """For the log: how many chunks are in each state, and what its grants wait for."""
        lease = self.refreshing or self.looking
        waits = "lease" if lease else "tickets" if self.delegating else "nothing"
        counts = ", ".join(f"{count} {state.name.lower()}" for state, count in chunks.items())
        return (
            f"load {self.spec.load_id} (chunks: {counts}; {len(self.held)} grants held for {waits})"
        )

    def take_from_held(self, path: str, chunks: Collection[int]) -> set[int]:
        """Those of `chunks` whose grants on `path` are held: they are held no longer."""
        taken: set[int] = set()
        kept = []
        for grant in self.held:
            left = grant.chunks
            if grant.path == path:
                taken.update(each for each in grant.chunks if each in chunks)
                left = tuple(each for each in grant.chunks if each not in chunks)
            if left:
                kept.append(replace(grant, chunks=left))
        self.held = kept
        return taken

    def checksums_of(self, armed: ArmedChunks) -> list[int]:
        """What chunks must hash to; 0 for those of blocks that were not found."""
        at = np.array(armed.blocks, np.int64) * len(self._sizes) + armed.chunks
        count = len(self.checksums)
        if at.max() < count:
            sums: list[int] = self.checksums[at].tolist()
            return sums
        return [int(self.checksums[each]) if each < count else 0 for each in at]

    def verified(self, indices: Sequence[int], path: str) -> int:
        """Chunks are in place and intact; how many bytes that is."""
        self.progress.verified(indices)
        sizes = self.progress.chunk_nbytes
        nbytes: int = sum(sizes[index] for index in indices)
        self.shares[path] += nbytes
        return nbytes

    def changed(self) -> None:
        """Wake whoever follows the load, if there is something new to say."""
        state = (self.progress.layers_ready, self.progress.blocks_valid, self.result is not None)
        if state != self._shown:
            self._shown = state
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
            held_bytes=dict(+self.held_bytes),
        )
        self.changed()
        return self.result


def check_found(answer: store_pb2.LookupResponse, spec: LoadSpec, layout: KVLayout) -> None:
    """Raise DualPathError for an answer that does not fit the request."""
    if len(answer.checksums) != 8 * answer.blocks * layout.chunk_count or answer.blocks > len(
        spec.hashes
    ):
        raise DualPathError(
            f"the daemon answered {answer.blocks} of {len(spec.hashes)} blocks with "
            f"{len(answer.checksums)} bytes of checksums"
        )
