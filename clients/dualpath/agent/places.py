"""Where blocks lie in an engine's memory.

Owns the arithmetic from (block, chunk) to strided slices of a region: engines keep the layers of
a block apart (paged KV) or together (a Full Block). Knows no region and copies nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.store_api import BATCH_BLOCKS_MAX
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.slices import Slices


@dataclass(frozen=True, slots=True)
class Places:
    """Block b starts at `base_bytes[b]`; its layer l at base + l * `layer_stride_bytes`.

    `layer_stride_bytes` equal to the layout's `layer_bytes` means one contiguous Full Block.
    """

    layer_stride_bytes: int
    base_bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.base_bytes) <= BATCH_BLOCKS_MAX:
            raise InvalidRequest(
                f"places name 1..{BATCH_BLOCKS_MAX} blocks, not {len(self.base_bytes)}"
            )
        if self.layer_stride_bytes < 0 or min(self.base_bytes) < 0:
            raise InvalidRequest("places with a negative offset or stride")

    @staticmethod
    def contiguous(layout: KVLayout, blocks: int, offset: int = 0) -> Places:
        """`blocks` Full Blocks one after another from `offset` bytes on."""
        step = layout.block_bytes
        return Places(layout.layer_bytes, tuple(offset + step * i for i in range(blocks)))

    @staticmethod
    def paged(layout: KVLayout, pages: tuple[int, ...], pages_max: int) -> Places:
        """Paged KV `[layers, pages_max, layer_bytes]`: block b is page `pages[b]` of each layer."""
        return Places(
            layout.layer_bytes * pages_max, tuple(page * layout.layer_bytes for page in pages)
        )

    def block(self, layout: KVLayout, block: int) -> Slices:
        """All bytes of a block, in the order of the Full Block."""
        return Slices.strided(
            self.base_bytes[block], self.layer_stride_bytes, layout.layers, layout.layer_bytes
        )

    def span(self, layout: KVLayout, blocks: int) -> tuple[int, int]:
        """(start, end) in the region of the first `blocks` blocks. Raises InvalidRequest."""
        if layout.layers > 1 and self.layer_stride_bytes < layout.layer_bytes:
            raise InvalidRequest(
                f"layer_stride_bytes {self.layer_stride_bytes} is less than a layer's "
                f"{layout.layer_bytes} bytes: layers would overlap"
            )
        reach = (layout.layers - 1) * self.layer_stride_bytes + layout.layer_bytes
        used = self.base_bytes[:blocks]
        return min(used), max(used) + reach

    def check(self, layout: KVLayout, blocks: int, region_bytes: int) -> None:
        """Raise InvalidRequest unless they name `blocks` blocks inside of the region."""
        if len(self.base_bytes) != blocks:
            raise InvalidRequest(f"{blocks} hashes, but places of {len(self.base_bytes)} blocks")
        _, end = self.span(layout, blocks)
        if end > region_bytes:
            raise InvalidRequest(
                f"blocks end at byte {end} of a region of {region_bytes} bytes; register more "
                "memory or correct base_bytes and layer_stride_bytes"
            )
        if len(set(self.base_bytes)) != blocks:
            raise InvalidRequest("two blocks have the same place; each needs memory of its own")
