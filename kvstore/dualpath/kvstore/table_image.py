"""Between the block table and columns of facts: opening fills the table, closing takes an image.

`fill_table` and `columns_of` are inverses. What is not on SSD is not in an image: blocks that
have still to be written back, and what hangs below them. Needs the store's lock; does no I/O.
"""

from __future__ import annotations

import numpy as np
from dualpath.kvstore.block_columns import BlockColumns
from dualpath.kvstore.block_table import NO_ROW, BlockTable, RowState
from dualpath.kvstore.catalog import Catalog
from numpy.typing import NDArray


def fill_table(table: BlockTable, catalog: Catalog, columns: BlockColumns) -> None:
    """Make the blocks present, on SSD only: block i in row i of the still empty table.
    `columns.namespaces` are the catalog's numbers."""
    count = len(columns)
    first = table.extend(count)
    assert first == 0
    table.set_hashes(0, columns.hashes, columns.hash_bytes)
    table.state[:count] = RowState.PRESENT
    table.namespace[:count] = columns.namespaces
    table.parent[:count] = columns.parents
    table.segment[:count] = columns.segments
    table.slot[:count] = columns.slots
    table.generation[:count] = columns.generations
    table.used[:count] = columns.used
    table.link_all(count)
    table.index.put_first(count)
    for number, rows in _rows_by_namespace(columns.namespaces):
        entry = catalog.numbered(number)
        entry.blocks = len(rows)
        entry.ever_stored = True
        table.slot_bytes[rows] = entry.layout.slot_bytes
        checksums = columns.checksums
        if len(rows) < count:
            checksums = checksums[columns.checksums_at(rows)]
        start = entry.pool.put_all(checksums.reshape(len(rows), entry.layout.chunk_count))
        table.checksum_row[rows] = np.arange(start, start + len(rows))


def columns_of(table: BlockTable, catalog: Catalog) -> tuple[tuple[bytes, ...], BlockColumns]:
    """(namespace ids, the blocks that are on SSD in the order of their seals);
    `columns.namespaces` are positions in the ids."""
    rows = np.flatnonzero((table.state == RowState.PRESENT) & ~table.dirty).astype(np.int32)
    rows = rows[np.argsort(table.generation[rows], kind="stable")]
    position = np.full(table.rows + 2, -2, np.int32)
    position[rows] = np.arange(len(rows))
    position[NO_ROW] = NO_ROW  # the last two answer for NO_ROW and GONE
    numbers = table.namespace[rows]
    entries = [catalog.numbered(number) for number, _ in _rows_by_namespace(numbers)]
    chunks = np.zeros(len(rows), np.int32)
    for number, at in _rows_by_namespace(numbers):
        chunks[at] = catalog.numbered(number).layout.chunk_count
    namespaces = np.searchsorted([entry.index for entry in entries], numbers).astype(np.int32)
    hashes, hash_bytes = table.hashes(rows)
    columns = BlockColumns(
        namespaces=namespaces,
        hashes=hashes,
        hash_bytes=hash_bytes,
        parents=position[table.parent[rows]],
        segments=table.segment[rows],
        slots=table.slot[rows],
        generations=table.generation[rows],
        used=table.used[rows],
        chunks=chunks,
        checksums=np.zeros(int(chunks.sum()), np.uint64),
    )
    for number, at in _rows_by_namespace(numbers):
        sums = catalog.numbered(number).pool.take(table.checksum_row[rows[at]])
        columns.checksums[columns.checksums_at(at)] = sums.reshape(-1)
    rooted = columns.rooted(np.ones(len(columns), np.bool_))
    if not rooted.all():
        columns = columns.take(np.flatnonzero(rooted))
    return tuple(entry.id for entry in entries), columns


def _rows_by_namespace(numbers: NDArray[np.int32]) -> list[tuple[int, NDArray[np.int64]]]:
    """(number, where it stands in `numbers`, rising) of each number that occurs, rising."""
    counts = np.bincount(numbers) if len(numbers) else np.zeros(0, np.int64)
    # Short numbers are sorted by their digits, without comparisons.
    short = numbers.astype(np.uint16) if len(counts) <= 1 << 16 else numbers
    order = np.argsort(short, kind="stable")
    known = np.flatnonzero(counts)
    ends = np.cumsum(counts[known])
    return [
        (int(number), order[end - int(counts[number]) : end])
        for number, end in zip(known, ends, strict=True)
    ]
