"""In what pieces bytes travel: parts of a batch, and the slices of memory that a part fills.

Owns the geometry of a flow's memory. Parts lie one after another in the source, as blocks do at a
storage node; in the target they lie apart, as in an engine's paged memory, if the grain is
scattered. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualpath.transfer.slice_table import SliceTable

KIB, MIB = 1 << 10, 1 << 20
SLOTS = 8
"""Batches in flight: so much memory a side."""


@dataclass(frozen=True, slots=True)
class Grain:
    """`parts` parts of `slices` slices of `slice_bytes` bytes a batch; slices lie `gap_bytes`
    apart in the target."""

    name: str
    slice_bytes: int
    slices: int
    parts: int
    gap_bytes: int = 0

    @property
    def part_bytes(self) -> int:
        """What one tag stands for."""
        return self.slice_bytes * self.slices

    @property
    def batch_bytes(self) -> int:
        """Bytes of one call."""
        return self.part_bytes * self.parts

    @property
    def source_bytes(self) -> int:
        """Memory of the writer."""
        return self.batch_bytes * SLOTS

    @property
    def target_bytes(self) -> int:
        """Memory of the reader."""
        return (self.slice_bytes + self.gap_bytes) * self.slices * self.parts * SLOTS

    def source(self, slot: int) -> SliceTable:
        """Where the parts of a slot come from."""
        sizes = [self.part_bytes] * self.parts
        start = slot * self.batch_bytes
        return SliceTable.contiguous(
            [start + i * self.part_bytes for i in range(self.parts)], sizes
        )

    def target(self, slot: int) -> SliceTable:
        """Where they go."""
        stride = self.slice_bytes + self.gap_bytes
        span = stride * self.slices
        bases = [(slot * self.parts + i) * span for i in range(self.parts)]
        sizes = [self.part_bytes] * self.parts
        if self.slices == 1:
            return SliceTable.contiguous(bases, sizes)
        skips = [0] * self.parts
        return SliceTable(stride, self.slices, self.slice_bytes, bases, skips, sizes)


GRAINS = (
    Grain("40K-scattered", 40 * KIB, 1, 64, 40 * KIB),
    Grain("1M-of-40K-slices", 40 * KIB, 25, 4, 40 * KIB),
    Grain("256K", 256 * KIB, 1, 16),
    Grain("1M", MIB, 1, 4),
    Grain("16M", 16 * MIB, 1, 1),
)
"""A layer's slice of a block by itself; a chunk over 25 layers; larger and larger extents."""
BY_NAME = {grain.name: grain for grain in GRAINS}
