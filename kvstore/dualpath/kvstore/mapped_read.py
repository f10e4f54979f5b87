"""Copying a mapped prefix out of the arena: what lies in DRAM at once, the rest chunk by chunk.

The same for a user in the daemon's process and for one that has its arena mapped. Guarantees that a
block that counts is right: verified by its checksums, or, without `verify`, copied from memory
whose guard says that it did not change meanwhile. Chunks that come from the SSD, or that are read
again, are verified always, and copied while later ones are on their way. A chunk that is wrong is
reported and tried once more.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from dualpath.kvstore.block_copy import copy_blocks, copy_blocks_hashed
from dualpath.kvstore.fetched_batch import FetchStatus
from dualpath.kvstore.store_api import MappedPrefix, MissReason, PrefixHit
from dualpath.transfer.errors import InvalidRequest, LeaseExpired, Overloaded
from numpy.typing import NDArray

MAPPED_BYTES = 64 << 20
"""What a reader has mapped at once; large enough that a round trip does not count."""
_FIRST_BYTES = 4 << 20
_GROWTH = 5
"""The first fetch is so small that the device has work at once, each later one so much larger.
Three make MAPPED_BYTES; the last one holds back what is read while the others are copied."""
_ARRIVAL_S = 0.05
"""How long the oldest fetch is waited for before the others are looked at; the source ends what is
late."""
_WAITS_MAX = 20
"""How often in a row a full pool of read buffers is waited for."""


@dataclass(frozen=True, slots=True)
class ReadBlocks:
    """What was read: `blocks` leading blocks, `fetched` of which needed the SSD; why not more."""

    blocks: int
    fetched: int
    miss: MissReason
    detail: str = ""


class FetchedChunks(Protocol):
    """Chunks that were asked for together; see `FetchedBatch`, which is one."""

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where each chunk begins in the arena."""

    @property
    def status(self) -> NDArray[np.uint8]:
        """A FetchStatus each."""

    def arrived(self, timeout_s: float) -> NDArray[np.int32]:
        """Chunks that are no longer UNDER_WAY and were not told before, as soon as there is one."""

    def release(self) -> None:
        """Their bytes are not looked at any more."""


class ChunkSource(Protocol):
    """Where chunks come from that have no copy in DRAM."""

    @property
    def chunks_max(self) -> int:
        """Most chunks of one `fetch`."""

    @property
    def fetches_max(self) -> int:
        """Most fetches that are not released."""

    def fetch(
        self,
        lease_id: int,
        blocks: NDArray[np.int32],
        chunks: NDArray[np.int32],
        *,
        patient: bool,
        paced: bool,
    ) -> FetchedChunks:
        """The leading chunks, at least one; each is told by `arrived` sooner or later. Raises
        Overloaded if there is no room for one; only if `patient` it waits for that. `paced`: see
        TransferBatch."""

    def report_corrupt(self, lease_id: int, block: int, chunk: int) -> bool:
        """A chunk was wrong; True if its block was dropped, else it can be fetched again."""

    def renew(self, lease_id: int, lease_s: float) -> None:
        """Extend the lease from now."""


def unmapped(hit: PrefixHit, nbytes: int) -> MappedPrefix:
    """A leased prefix none of whose blocks is mapped: all of it is fetched."""
    return MappedPrefix(hit, np.full(hit.blocks, -1, np.int64), nbytes, -1)


def read_in_parts(
    read: Callable[[int, int], ReadBlocks], blocks: int, part_of: Callable[[], int]
) -> ReadBlocks:
    """Read a long prefix in parts, so that no reader has all of it mapped at once: `read(start,
    end)` reads blocks, `part_of()` says how many at once."""
    done = fetched = 0
    if not blocks:
        return ReadBlocks(0, 0, MissReason.NONE)
    while True:
        end = min(done + part_of(), blocks)
        part = read(done, end)
        fetched += part.fetched
        done += part.blocks
        if done < end or end == blocks:
            return replace(part, blocks=done, fetched=fetched)


class _UnderWay:
    """Chunks of `part`, (block, chunk) each, that were asked for together."""

    def __init__(self, part: NDArray[np.int32], fetched: FetchedChunks) -> None:
        self.part = part
        self.fetched = fetched
        self.left = len(part)
        """Chunks that have not been told."""
        self.right = np.zeros(len(part), np.bool_)
        """Those that are copied and verified."""


class MappedRead:
    """One read. `arena` are the bytes that offsets count in; `at[i]` is where block i goes, by
    default one after another behind room for `first` blocks."""

    def __init__(
        self,
        source: ChunkSource,
        arena: memoryview,
        mapped: MappedPrefix,
        chunk_bytes: int,
        target: memoryview,
        at: NDArray[np.int64] | None,
        stable: Callable[[], bool],
        *,
        first: int = 0,
    ) -> None:
        self._source = source
        self._arena = arena
        self._mapped = mapped
        self._chunk_bytes = chunk_bytes
        self._target = target
        self._stable = stable
        blocks = mapped.hit.blocks
        if at is None:
            at = np.arange(first, first + blocks, dtype=np.int64) * mapped.nbytes
        self._at = at[:blocks]
        if len(self._at) < blocks:
            raise InvalidRequest(f"places for {len(self._at)} blocks, {blocks} were found")
        self._chunks = -(-mapped.nbytes // chunk_bytes)
        self._wrong = np.zeros((blocks, self._chunks), np.bool_)
        self._renewed_at = time.monotonic()
        self._first_gone = self._end = blocks
        """Beyond `_end` nothing can count any more."""
        self._tried_again = np.zeros((blocks, self._chunks), np.bool_)
        self._under_way: deque[_UnderWay] = deque()
        self._fetch_chunks = max(1, _FIRST_BYTES // min(chunk_bytes, mapped.nbytes))

    def run(self, *, verify: bool) -> ReadBlocks:
        """Do it. Raises LeaseExpired if the memory changed under an unverified copy, InvalidRequest
        if a place lies outside of the target."""
        mapped, hit = self._mapped, self._mapped.hit
        if not hit.blocks:
            return ReadBlocks(0, 0, hit.miss, hit.detail)
        if hit.checksums.shape[1] != self._chunks:
            raise InvalidRequest("to read into memory, map with checksums")
        here = np.flatnonzero(mapped.offsets >= 0)
        if len(here):
            self._copy(here, verify=verify)
        wanted = self._wrong | (mapped.offsets < 0)[:, None]
        fetched = int(np.count_nonzero(wanted.any(axis=1)))
        end = self._fetch_all(wanted) if fetched else hit.blocks
        if end == hit.blocks:
            return ReadBlocks(end, fetched, hit.miss, hit.detail)
        if self._first_gone == end:
            detail = f"block {end} left the store since it was looked up; look up again"
            return ReadBlocks(end, fetched, MissReason.INVALIDATED, detail)
        detail = f"block {end} could not be read; it was dropped"
        return ReadBlocks(end, fetched, MissReason.CORRUPT, detail)

    def _copy(self, here: NDArray[np.intp], *, verify: bool) -> None:
        """Blocks that lie in DRAM. Wrong chunks are noted and reported."""
        mapped = self._mapped
        at, offsets = self._at[here], mapped.offsets[here]
        if not verify:
            copy_blocks(self._target, at, self._arena, offsets, mapped.nbytes)
            if not self._stable():
                raise LeaseExpired(
                    f"lease {mapped.hit.lease_id} ended while its blocks were copied: map again, "
                    "with a longer lease"
                )
            return
        sums = copy_blocks_hashed(
            self._target, at, self._arena, offsets, mapped.nbytes, self._chunk_bytes
        )
        self._wrong[here] = sums != mapped.hit.checksums[here]
        if self._wrong.any() and self._stable():
            for block, chunk in np.argwhere(self._wrong).tolist():
                self._source.report_corrupt(mapped.hit.lease_id, block, chunk)

    def _fetch_all(self, wanted: NDArray[np.bool_]) -> int:
        """Fetch and copy chunks; how many leading blocks are right in the end."""
        items = np.argwhere(wanted).astype(np.int32)
        self._tried_again |= self._wrong
        under_way = self._under_way
        try:
            while len(items) or under_way:
                self._keep_lease()
                items = self._begin(items)
                while under_way[0].left:
                    # All of them: the oldest may wait for what another one has.
                    came = [self._advance(one, 0.0) for one in under_way if one.left]
                    if not any(came):
                        self._advance(under_way[0], _ARRIVAL_S)
                oldest = under_way.popleft()
                oldest.fetched.release()
                items = np.concatenate((self._settle(oldest), items))
                items = items[items[:, 0] < self._end]
        finally:
            while under_way:
                under_way.popleft().fetched.release()
        return self._end

    def _begin(self, items: NDArray[np.int32]) -> NDArray[np.int32]:
        """Ask for the leading items, by as many fetches as there may be: while the first one is
        copied the device has others. Return those that are not asked for. Raises Overloaded."""
        source, under_way, waits = self._source, self._under_way, 0
        while len(items) and len(under_way) < source.fetches_max:
            most = self._fetch_chunks if source.fetches_max > 1 else source.chunks_max
            part = items[: min(most, source.chunks_max)]
            # What is asked for before goes as a whole: only behind the last one nothing follows.
            last = len(part) == len(items) or len(under_way) + 1 == source.fetches_max
            try:
                fetched = source.fetch(
                    self._mapped.hit.lease_id,
                    part[:, 0],
                    part[:, 1],
                    patient=not under_way,
                    paced=last,
                )
            except Overloaded:
                if under_way:
                    break  # room comes when these are copied
                waits += 1
                if waits > _WAITS_MAX:
                    raise
                continue  # the store has waited for a buffer before it refused
            part = part[: len(fetched.offsets)]
            under_way.append(_UnderWay(part, fetched))
            items = items[len(part) :]
            self._fetch_chunks = min(self._fetch_chunks * _GROWTH, source.chunks_max)
        return items

    def _advance(self, one: _UnderWay, timeout_s: float) -> bool:
        """Copy and verify chunks that have arrived; False if none has."""
        fetched = one.fetched
        items = fetched.arrived(timeout_s)
        if not len(items):
            return False
        there = items[fetched.status[items] == FetchStatus.OK]
        one.right[there] = self._copy_chunks(one.part[there], fetched.offsets[there])
        one.left -= len(items)
        return True

    def _settle(self, one: _UnderWay) -> NDArray[np.int32]:
        """All of it was told: what has to be tried again. Notes where the prefix ends."""
        part, status = one.part, one.fetched.status
        gone = part[status == FetchStatus.GONE]
        if len(gone):
            # Nothing was wrong with it: its lease outlived it. What is before it counts.
            self._first_gone = min(self._first_gone, int(gone[:, 0].min()))
            self._end = min(self._end, self._first_gone)
        again = []
        for block, chunk in part[~one.right].tolist():
            if block >= self._end:
                continue
            dropped = self._source.report_corrupt(self._mapped.hit.lease_id, block, chunk)
            if dropped or self._tried_again[block, chunk]:
                self._end = block
            else:
                self._tried_again[block, chunk] = True
                again.append((block, chunk))
        return np.array(again, np.int32).reshape(-1, 2)

    def _copy_chunks(
        self, part: NDArray[np.int32], offsets: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Copy and verify; which chunks are right."""
        last = self._chunks - 1
        last_bytes = self._mapped.nbytes - last * self._chunk_bytes
        if last_bytes == self._chunk_bytes:
            return self._copy_alike(part, offsets, last_bytes)
        right = np.zeros(len(part), np.bool_)
        shorter = part[:, 1] == last
        for group, nbytes in ((~shorter, self._chunk_bytes), (shorter, last_bytes)):
            if group.any():
                right[group] = self._copy_alike(part[group], offsets[group], nbytes)
        return right

    def _copy_alike(
        self, part: NDArray[np.int32], offsets: NDArray[np.int64], nbytes: int
    ) -> NDArray[np.bool_]:
        """As `_copy_chunks`, of chunks of one size."""
        blocks, chunks = part[:, 0], part[:, 1]
        at = self._at[blocks] + chunks * np.int64(self._chunk_bytes)
        sums = copy_blocks_hashed(self._target, at, self._arena, offsets, nbytes, nbytes)
        right: NDArray[np.bool_] = sums[:, 0] == self._mapped.hit.checksums[blocks, chunks]
        return right

    def _keep_lease(self) -> None:
        lease_s, now = self._mapped.hit.lease_s, time.monotonic()
        if now - self._renewed_at > lease_s / 3:
            self._source.renew(self._mapped.hit.lease_id, lease_s)
            self._renewed_at = now
