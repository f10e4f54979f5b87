"""A prefix whose blocks are read where they lie, in the daemon's memory.

Owns the lease of the prefix. Views are valid while it lives: `release` and the end of the
connection end it, and so does its time, after which the daemon may use the memory for something
else. Whoever copies out of views asks `stable` afterwards: True means that nothing had changed
until then.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Self

import numpy as np
from dualpath.kvstore.mapped_read import MappedRead, ReadBlocks
from dualpath.kvstore.mapping_table import GUARD_BYTES
from dualpath.kvstore.store_api import MappedPrefix, PrefixHit
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.region import Region
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dualpath.client.local_store import LocalStore


class MappedBlocks:
    """See the module docstring. A context manager that releases. `hit` is what the look-up found,
    `offsets[i]` where block i lies in `arena`, -1 if it is only on the SSD; `nbytes` of a block."""

    def __init__(
        self, store: LocalStore, arena: Region, mapped: MappedPrefix, chunk_bytes: int
    ) -> None:
        self._store = store
        self._mapped = mapped
        self._chunk_bytes = chunk_bytes
        self._released = False
        self.arena = arena
        self.hit: PrefixHit = mapped.hit
        self.offsets: NDArray[np.int64] = mapped.offsets
        self.nbytes = mapped.nbytes
        ends = self.offsets + mapped.nbytes
        if len(ends) and int(ends.max()) > arena.nbytes:
            raise InvalidRequest("the daemon named bytes outside of its arena")

    def __len__(self) -> int:
        return self.hit.blocks

    def view(self, block: int) -> memoryview:
        """The bytes of a block, read-only, no copy. Raises InvalidRequest if it is only on the
        SSD: `read_into` fetches it."""
        offset = int(self.offsets[block])
        if offset < 0:
            raise InvalidRequest(f"block {block} is not in DRAM: read it with read_into")
        return self.arena.view[offset : offset + self.nbytes]

    def array(self, block: int) -> NDArray[np.uint8]:
        """`view` as numpy bytes, read-only."""
        return np.frombuffer(self.view(block), np.uint8)

    def stable(self) -> bool:
        """Whether all that was read here up to now was the blocks' own."""
        guard = self._mapped.guard
        if self._released or guard < 0:
            return not len(self)
        word = self.arena.view[guard : guard + GUARD_BYTES]
        return int.from_bytes(word, sys.byteorder) == self.hit.lease_id

    def renew(self, lease_s: float) -> None:
        """Hold on for so long from now. Raises LeaseExpired."""
        self._store.renew(self.hit.lease_id, lease_s)

    def read_into(
        self,
        target: memoryview | bytearray,
        *,
        at: NDArray[np.int64] | None = None,
        verify: bool = True,
        first: int = 0,
    ) -> ReadBlocks:
        """Copy the blocks, block i to `at[i]` of `target`, by default one after another behind
        room for `first` blocks; see `LocalStore.read_into`."""
        read = MappedRead(
            _LocalChunks(self._store),
            self.arena.view,
            self._mapped,
            self._chunk_bytes,
            memoryview(target).cast("B"),
            at,
            self.stable,
            first=first,
        )
        return read.run(verify=verify)

    def release(self) -> None:
        """End the lease: views are void from now on. Idempotent."""
        if not self._released:
            self._released = True
            if self.hit.lease_id:
                self._store.release([self.hit.lease_id])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.release()


_CHUNKS_MAX = 256
"""Chunks that are asked for at once: the daemon answers when all of them are there."""


class _LocalChunks:
    """A ChunkSource over the local socket."""

    chunks_max = _CHUNKS_MAX
    fetches_max = 1

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self.report_corrupt = store.report_corrupt
        self.renew = store.renew

    def fetch(
        self,
        lease_id: int,
        blocks: NDArray[np.int32],
        chunks: NDArray[np.int32],
        *,
        patient: bool,
        paced: bool,
    ) -> _Brought:
        """See ChunkSource. The daemon waits as it likes."""
        return _Brought(self._store, *self._store.fetch(lease_id, blocks, chunks))


class _Brought:
    """FetchedChunks that all are there, or never will be."""

    def __init__(
        self, store: LocalStore, offsets: NDArray[np.int64], status: NDArray[np.uint8]
    ) -> None:
        self._store = store
        self._untold = np.arange(len(offsets), dtype=np.int32)
        self.offsets = offsets
        self.status = status

    def arrived(self, timeout_s: float) -> NDArray[np.int32]:
        """See FetchedChunks."""
        told, self._untold = self._untold, self._untold[:0]
        return told

    def release(self) -> None:
        """See FetchedChunks."""
        self._store.done()
