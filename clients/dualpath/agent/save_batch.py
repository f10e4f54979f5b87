"""One batch of a save: which blocks, what the daemon answered for them, and their chunks' tables.

Owns the arithmetic between blocks of a save, positions in a batch, and tags. Asks nobody and keeps
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from dualpath.agent.places import Places
from dualpath.kvstore.checksum import of_extents, of_slices
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.store_api import ReserveStatus
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import Unavailable
from dualpath.transfer.slice_table import SliceTable

BATCH_BYTES = 16 << 20
"""Bytes that are reserved, written and sealed at once."""
BATCH_BLOCKS = 1024
RESERVE_STATUS: Mapping[int, ReserveStatus] = {
    store_pb2.ReserveStatus.Value(f"RESERVE_STATUS_{status.name}"): status
    for status in ReserveStatus
}
ROOM_LATER = (ReserveStatus.FULL, ReserveStatus.QUOTA, ReserveStatus.NO_PARENT)


@dataclass(slots=True)
class Reserved:
    """What the daemon answered for a batch; the lists have an entry for each of `blocks`."""

    blocks: range
    window: bytes
    status: list[int]
    ids: list[int]
    bases: list[int]
    tags: list[int]

    def take(self, positions: Sequence[int], answer: store_pb2.ReserveResponse) -> None:
        """Enter what was answered for some of the blocks. Raises Unavailable if it is no answer
        to that."""
        parts = (answer.status, answer.reservation_id, answer.base_bytes, answer.first_tag)
        if any(len(part) != len(positions) for part in parts):
            raise Unavailable(
                f"the daemon answered {[len(part) for part in parts]} parts of a reservation of "
                f"{len(positions)} blocks: are its version and ours the same?",
                reason="malformed",
            )
        self.window = answer.window or self.window
        for index, position in enumerate(positions):
            self.status[position] = answer.status[index]
            self.ids[position] = answer.reservation_id[index]
            self.bases[position] = answer.base_bytes[index]
            self.tags[position] = answer.first_tag[index]

    def refused(self) -> list[int]:
        """Positions for which there may be room, or a parent, once others are sealed."""
        return [
            at for at, status in enumerate(self.status) if RESERVE_STATUS.get(status) in ROOM_LATER
        ]


def batches_of(layout: KVLayout, blocks: int) -> list[tuple[int, int]]:
    """(first, count) of each batch."""
    step = max(1, min(BATCH_BLOCKS, BATCH_BYTES // layout.block_bytes))
    return [(first, min(step, blocks - first)) for first in range(0, blocks, step)]


def runs_of(
    layout: KVLayout, fresh: Mapping[int, int], reserved: Reserved
) -> Iterator[Sequence[int]]:
    """The blocks, grouped so that the chunks of a group have consecutive tags."""
    run: list[int] = []
    next_tag = -1
    for block, position in fresh.items():
        tag = reserved.tags[position]
        if run and tag != next_tag:
            yield run
            run = []
        run.append(block)
        next_tag = tag + layout.chunk_count
    if run:
        yield run


def tables_of(
    layout: KVLayout, places: Places, blocks: Sequence[int], bases: Sequence[int]
) -> tuple[SliceTable, SliceTable]:
    """Where the chunks of `blocks` lie in the engine's memory, and where they go: contiguous from
    `bases` on."""
    extents = [layout.chunk_extent(chunk) for chunk in range(layout.chunk_count)]
    skips = [skip for skip, _ in extents] * len(blocks)
    sizes = [nbytes for _, nbytes in extents] * len(blocks)
    from_ = [places.base_bytes[block] for block in blocks for _ in extents]
    source = SliceTable(
        places.layer_stride_bytes, layout.layers, layout.layer_bytes, from_, skips, sizes
    )
    into = [base + skip for base in bases for skip, _ in extents]
    return source, SliceTable.contiguous(into, sizes)


def checksums_of(
    view: memoryview, layout: KVLayout, places: Places, blocks: Sequence[int]
) -> dict[int, list[int]]:
    """Of each block those of its chunks, made of the engine's memory."""
    source, _ = tables_of(layout, places, blocks, [0] * len(blocks))
    if source.solid:
        at = np.add(source.bases, source.skips, dtype=np.int64)
        sums = of_extents(view, at, np.array(source.sizes, np.int64)).tolist()
    else:
        sums = [of_slices(view, source.part(index)) for index in range(len(source))]
    count = layout.chunk_count
    return {block: sums[index * count : (index + 1) * count] for index, block in enumerate(blocks)}
