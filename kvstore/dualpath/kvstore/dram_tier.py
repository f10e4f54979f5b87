"""The arena: memory in which blocks are written, kept hot, and read into.

Owns one Region, cut in two: slots that hold whole blocks, and a bounded pool of read buffers for
chunks of blocks that have no slot. With `shared` the region is a memfd that nobody else can map
for writing. Not thread-safe except for `view`; knows nothing of blocks.
"""

from __future__ import annotations

from dualpath.kvstore.layout import ALIGN_BYTES, CHUNK_BYTES_MAX
from dualpath.kvstore.slab_space import SlabSpace
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.region import Region

ARENA_NAME = "dualpath-arena"


class DramTier:
    """See the module docstring. Offsets are bytes in `region`."""

    def __init__(self, dram_bytes: int, read_buffers_bytes: int, *, shared: bool) -> None:
        if dram_bytes < ALIGN_BYTES:
            raise InvalidRequest(f"dram_bytes must be at least {ALIGN_BYTES}, not {dram_bytes}")
        if read_buffers_bytes < CHUNK_BYTES_MAX:
            raise InvalidRequest(
                f"read_buffers_bytes must be at least {CHUNK_BYTES_MAX}, not {read_buffers_bytes}"
            )
        self.slots = SlabSpace(0, dram_bytes)
        base = -(-dram_bytes // ALIGN_BYTES) * ALIGN_BYTES
        self.buffers = SlabSpace(base, read_buffers_bytes)
        if shared:
            self.region = Region.memfd(ARENA_NAME, base + read_buffers_bytes)
            self.region.forbid_new_writers()
        else:
            self.region = Region.anonymous(base + read_buffers_bytes)

    def __repr__(self) -> str:
        return f"<DramTier slots {self.slots!r} buffers {self.buffers!r}>"

    def view(self, offset: int, nbytes: int) -> memoryview:
        """The bytes of an extent."""
        return self.region.view[offset : offset + nbytes]

    def close(self) -> bool:
        """Unmap. False if someone still holds a view: the memory then goes with the last one."""
        try:
            self.region.close()
        except BufferError:
            return False
        return True
