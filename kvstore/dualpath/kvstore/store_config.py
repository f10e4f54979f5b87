"""Configuration of an embedded store: one frozen value, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from dualpath.kvstore.eviction_choice import check_policy
from dualpath.kvstore.io_mode import IO_DEPTH, IoMode, check_io
from dualpath.kvstore.layout import ALIGN_BYTES
from dualpath.kvstore.numa import ANY_NODE
from dualpath.kvstore.s3_fifo import S3Fifo
from dualpath.kvstore.tenant_limits import TenantLimits, check_tenants
from dualpath.transfer.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """Limits of a `BlockStore`. Times in seconds.

    `disk_bytes` bounds the segment files (headers included; the index comes on top),
    `dram_bytes` the arena's slots, `read_buffers_bytes` the buffers for chunks that are read past
    them. `direct` asks for O_DIRECT. `shared_arena` makes the arena a sealed memfd, for
    peers that map it. `promote` keeps blocks that were read from SSD in DRAM. A seal that is not
    durable waits while `write_back_bytes_max` (0: half of `dram_bytes`) wait to be written. A batch
    of chunks waits `read_wait_s` for the SSD; what has not come by then is given up.
    """

    disk_bytes: int = 4 << 30
    dram_bytes: int = 256 << 20
    segment_bytes: int = 64 << 20
    read_buffers_bytes: int = 32 << 20
    direct: bool = True
    io: str = IoMode.AUTO.value
    """`auto`, `io_uring` or `psync`: see io_mode.py."""
    io_depth: int = IO_DEPTH
    """Transfers of one batch that are in flight on the SSD at once; reads of neighbours, up to
    1 MiB together, count as one."""
    raw_device: str = ""
    """Block device, or file that stands for one, that holds the segments; "": files beside."""
    shared_arena: bool = False
    numa_node: int = ANY_NODE
    """Node that the arena's memory comes from; ANY_NODE: that of our processors, if it is one."""
    prefault: bool = True
    """Have all memory of the arena at opening: no read pays for it, and none fails for it."""
    scrub_bytes_per_s: float = 0
    """How fast stored blocks are read again and verified in the background; 0: not at all."""
    promote: bool = True
    read_ahead_bytes: int = 0
    """Bytes of a leased prefix that are brought from SSD to DRAM before they are asked for, once a
    block before them was; at most an eighth of `dram_bytes`; 0: none."""
    eviction: str = S3Fifo.name
    """Which blocks make way, on SSD and in DRAM: `s3-fifo` or `lru`."""
    ttl_s: float = 0
    """Blocks leave when nobody has used them for so long; 0: never for that."""
    retain_bytes: int = 0
    """Most bytes of slots on SSD that may be retained; 0: a quarter of `disk_bytes`."""
    tenants: tuple[TenantLimits, ...] = ()
    """Tenants with quotas or times of their own."""
    write_back_bytes_max: int = 0
    leases_max: int = 1 << 16
    mapped_owner_bytes_max: int = 0
    """Most bytes of DRAM slots that one owner may have mapped; 0: half of `dram_bytes`."""
    mapped_bytes_max: int = 0
    """Most that all may; 0: three quarters of `dram_bytes`, so that writes find slots."""
    reservations_max: int = 1 << 16
    namespaces_max: int = 1 << 12
    removals_remembered_max: int = 1 << 14
    events_remembered_max: int = 1 << 16
    """Events that a reader of the log may be behind before it loses some; 0: none are kept."""
    reserve_wait_s: float = 1.0
    read_buffer_wait_s: float = 1.0
    read_wait_s: float = 10.0
    commit_wait_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("disk_bytes", "dram_bytes", "segment_bytes", "read_buffers_bytes"):
            if getattr(self, name) < 4 * ALIGN_BYTES:
                raise InvalidRequest(
                    f"{name} must be at least {4 * ALIGN_BYTES} bytes, not {getattr(self, name)}"
                )
        check_io(self.io, self.io_depth)
        check_policy(self.eviction)
        check_tenants(self.tenants)
        if not 0 <= self.retain_bytes <= self.disk_bytes:
            raise InvalidRequest(
                f"retain_bytes must lie in 0..{self.disk_bytes} (disk_bytes), not "
                f"{self.retain_bytes}"
            )
        if not 0 <= self.ttl_s < float("inf"):
            raise InvalidRequest(f"ttl_s must not be negative, not {self.ttl_s}")
        if not 0 <= self.scrub_bytes_per_s < float("inf"):
            raise InvalidRequest(
                f"scrub_bytes_per_s must not be negative, not {self.scrub_bytes_per_s}"
            )
        for name in ("leases_max", "reservations_max", "namespaces_max"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be positive, not {getattr(self, name)}")

    @property
    def retained_bytes_limit(self) -> int:
        """Most bytes that may be retained."""
        return self.retain_bytes or self.disk_bytes // 4

    @property
    def mapped_limits(self) -> tuple[int, int]:
        """Most bytes that one owner, and that all may have mapped."""
        return (
            self.mapped_owner_bytes_max or self.dram_bytes // 2,
            self.mapped_bytes_max or self.dram_bytes // 4 * 3,
        )

    @property
    def dirty_bytes_max(self) -> int:
        """Most bytes that wait to be written back."""
        return self.write_back_bytes_max or self.dram_bytes // 2
