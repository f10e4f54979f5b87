"""The arena: memory in which blocks are written, kept hot, and read into.

Owns one Region, cut in three: slots that hold whole blocks, a bounded pool of read buffers for
chunks of blocks that have no slot, and the guard words of mapped leases (`mapping_table`). With
`shared` the region is a memfd that nobody else can map for writing. Not thread-safe except for
`view`; knows nothing of blocks.
"""

from __future__ import annotations

from dualpath.kvstore.arena_memory import open_arena_memory
from dualpath.kvstore.layout import ALIGN_BYTES, CHUNK_BYTES_MAX
from dualpath.kvstore.mapping_table import GUARDS_BYTES
from dualpath.kvstore.numa import ANY_NODE
from dualpath.kvstore.read_buffers import ReadBuffers
from dualpath.kvstore.slab_space import SlabSpace
from dualpath.kvstore.store_config import StoreConfig
from dualpath.transfer.errors import InvalidRequest

ARENA_NAME = "dualpath-arena"


class DramTier:
    """See the module docstring. Offsets are bytes in `region`."""

    def __init__(
        self,
        dram_bytes: int,
        read_buffers_bytes: int,
        *,
        shared: bool,
        numa_node: int = ANY_NODE,
        prefault: bool = True,
    ) -> None:
        if dram_bytes < ALIGN_BYTES:
            raise InvalidRequest(f"dram_bytes must be at least {ALIGN_BYTES}, not {dram_bytes}")
        if read_buffers_bytes < CHUNK_BYTES_MAX:
            raise InvalidRequest(
                f"read_buffers_bytes must be at least {CHUNK_BYTES_MAX}, not {read_buffers_bytes}"
            )
        self.slots = SlabSpace(0, dram_bytes)
        base = -(-dram_bytes // ALIGN_BYTES) * ALIGN_BYTES
        self.buffers = ReadBuffers(base, read_buffers_bytes)
        end = base + read_buffers_bytes
        self.guards_offset = -(-end // ALIGN_BYTES) * ALIGN_BYTES
        self.memory = open_arena_memory(
            ARENA_NAME,
            self.guards_offset + GUARDS_BYTES,
            shared=shared,
            numa_node=numa_node,
            prefault=prefault,
        )
        self.region = self.memory.region
        guards = self.region.view[self.guards_offset : self.guards_offset + GUARDS_BYTES]
        self.guards = guards.cast("Q")

    @classmethod
    def of(cls, config: StoreConfig) -> DramTier:
        """As a store is configured. Raises Unavailable (`no_memory`), InvalidRequest."""
        return cls(
            config.dram_bytes,
            config.read_buffers_bytes,
            shared=config.shared_arena,
            numa_node=config.numa_node,
            prefault=config.prefault,
        )

    def __repr__(self) -> str:
        return f"<DramTier slots {self.slots!r} buffers {self.buffers!r}>"

    def view(self, offset: int, nbytes: int) -> memoryview:
        """The bytes of an extent."""
        return self.region.view[offset : offset + nbytes]

    def close(self) -> bool:
        """Unmap. False if someone still holds a view: the memory then goes with the last one."""
        self.guards.release()  # and with it the view it was cast from
        try:
            self.region.close()
        except BufferError:
            return False
        return True
