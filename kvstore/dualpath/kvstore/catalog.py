"""The catalog: which namespaces exist, which of their blocks are present, and why one is not.

Owns the namespaces and the small memory of recent removals; which block is present is kept by the
table's key index, without an object a block. Needs the store's lock.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from dualpath.kvstore.block_table import NO_ROW, BlockTable, ChecksumPool, RowState
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.packed_hashes import PackedHashes
from dualpath.kvstore.store_api import BATCH_BLOCKS_MAX, HASH_BYTES_MAX, HASH_BYTES_MIN, MissReason
from dualpath.transfer.errors import InvalidRequest, Overloaded
from numpy.typing import NDArray

_FORGOTTEN_SHARE = 8
"""Of a full table of namespaces an eighth may be forgotten at once."""
_COMPARED_MAX = 256
"""Most other namespaces that a miss is compared with."""


@dataclass(slots=True)
class NamespaceEntry:
    """A namespace: how many blocks of it are present, and the rows of reserved ones by hash."""

    index: int
    id: bytes
    namespace: Namespace
    layout: KVLayout
    pool: ChecksumPool
    blocks: int = 0
    pending: dict[bytes, int] = field(default_factory=dict)
    ever_stored: bool = False
    used: int = 0
    """Rises with every use."""


class Catalog:
    """See the module docstring."""

    def __init__(self, table: BlockTable, namespaces_max: int, removals_max: int) -> None:
        self._table = table
        self._namespaces_max = namespaces_max
        self._removals_max = removals_max
        self._by_id: dict[bytes, NamespaceEntry] = {}
        self._entries: list[NamespaceEntry | None] = []
        self._clock = 0
        self._pools: dict[int, ChecksumPool] = {}
        self._removals: OrderedDict[bytes, MissReason] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def blocks(self) -> int:
        """Present blocks of all namespaces."""
        return len(self._table.index)

    def open(self, namespace: Namespace) -> NamespaceEntry:
        """Make known. Idempotent. Raises Overloaded."""
        namespace_id = namespace.id
        entry = self._by_id.get(namespace_id)
        if entry is not None:
            return entry
        if len(self._by_id) >= self._namespaces_max:
            self._forget_idle(1 + self._namespaces_max // _FORGOTTEN_SHARE)
        if len(self._by_id) >= self._namespaces_max:
            raise Overloaded(
                f"{self._namespaces_max} namespaces hold blocks; raise namespaces_max",
                retry_after_s=60.0,
            )
        return self.restore(namespace)

    def restore(self, namespace: Namespace) -> NamespaceEntry:
        """Like `open`, for one that was found at opening, and without the limit."""
        layout, namespace_id = namespace.layout, namespace.id
        pool = self._pools.setdefault(layout.chunk_count, ChecksumPool(layout.chunk_count))
        index = self._entries.index(None) if None in self._entries else len(self._entries)
        entry = NamespaceEntry(index, namespace_id, namespace, layout, pool)
        self._by_id[namespace_id] = entry
        self._entries[index : index + 1] = [entry]
        return entry

    def forget_excess(self) -> list[bytes]:
        """After opening: forget namespaces without blocks until the limit holds; return their
        ids. Those with blocks stay, whatever the limit."""
        return self._forget_idle(len(self._by_id) - self._namespaces_max)

    def _forget_idle(self, most: int) -> list[bytes]:
        """Forget those without any row, least recently used first. Who names one of them again
        hears that it was never opened, as after a restart."""
        if most <= 0:
            return []
        table = self._table
        rows = np.bincount(table.namespace[table.state != RowState.FREE], minlength=self.numbers)
        idle = [entry for entry in self._by_id.values() if not rows[entry.index]]
        idle.sort(key=lambda entry: entry.used)
        for entry in idle[:most]:
            del self._by_id[entry.id]
            self._entries[entry.index] = None
        return [entry.id for entry in idle[:most]]

    @property
    def numbers(self) -> int:
        """All `index` of namespaces are less than this."""
        return len(self._entries)

    def by_number(self, value: Callable[[NamespaceEntry], int]) -> NDArray[np.int64]:
        """A value of each namespace, at its number; 0 where there is none."""
        return np.array([value(each) if each else 0 for each in self._entries], np.int64)

    def entries(self) -> Iterable[NamespaceEntry]:
        """All namespaces."""
        return self._by_id.values()

    def numbered(self, index: int) -> NamespaceEntry:
        """By number."""
        entry = self._entries[index]
        assert entry is not None, index
        return entry

    def entry(self, namespace_id: bytes) -> NamespaceEntry:
        """By id. Raises InvalidRequest, reason `namespace`."""
        entry = self._by_id.get(namespace_id)
        if entry is None:
            raise InvalidRequest(
                f"namespace {namespace_id.hex()[:64]} was never opened; call open_namespace first",
                reason="namespace",
            )
        self._clock += 1
        entry.used = self._clock
        return entry

    def find(self, namespace_id: bytes) -> NamespaceEntry | None:
        """By id; None if unknown."""
        return self._by_id.get(namespace_id)

    def entry_of(self, row: int) -> NamespaceEntry:
        """The namespace of a row."""
        return self.numbered(int(self._table.namespace[row]))

    def key_of(self, row: int) -> bytes:
        """The store key of a row: namespace id, then hash."""
        return self.entry_of(row).id + self._table.hash_of(row)

    def row_of(self, entry: NamespaceEntry, block_hash: bytes) -> int:
        """Row of a present block; NO_ROW if it is not."""
        return self._table.index.get(entry.index, block_hash)

    def prefix(self, entry: NamespaceEntry, hashes: PackedHashes) -> NDArray[np.int32]:
        """Rows of the longest leading run that is present and is one chain."""
        rows = np.empty(len(hashes), np.int32)
        found = self._table.index.prefix(entry.index, hashes.data, hashes.hash_bytes, rows)
        return rows[:found].copy() if found < len(rows) else rows

    def publish(self, row: int) -> None:
        """The block of a row is present from now on."""
        self._table.index.put(row)
        entry = self.entry_of(row)
        entry.blocks += 1
        entry.ever_stored = True

    def withdraw(self, row: int) -> None:
        """The block of a row is not present any more."""
        self._table.index.remove(row)
        self.entry_of(row).blocks -= 1

    def remember(self, row: int, reason: MissReason) -> None:
        """Keep why a block went, for the next miss."""
        key = self.key_of(row)
        self._removals[key] = reason
        self._removals.move_to_end(key)
        if len(self._removals) > self._removals_max:
            self._removals.popitem(last=False)

    def removal_of(self, row: int) -> MissReason | None:
        """Why the block of a row that is DEAD went; None if that is not known any more, or if
        the block is back."""
        return self._removals.get(self.key_of(row))

    def forget_removal(self, row: int) -> None:
        """The block is back."""
        self._removals.pop(self.key_of(row), None)

    def explain(
        self, entry: NamespaceEntry, hashes: PackedHashes, hits: int
    ) -> tuple[MissReason, str]:
        """Why the prefix of `hashes` ends after `hits` blocks, with a detail for a person."""
        if hits == len(hashes):
            return MissReason.NONE, ""
        missed = hashes[hits]
        if self.row_of(entry, missed) != NO_ROW:
            return (
                MissReason.ABSENT,
                f"block {hits} is stored, but not as a child of the one before",
            )
        if missed in entry.pending:
            return MissReason.PENDING, f"block {hits} is being written"
        reason = self._removals.get(entry.id + missed)
        if reason is not None:
            return reason, f"block {hits} was removed: {reason.value}"
        if not entry.ever_stored:
            detail = self._nearest(entry)
            if detail:
                return MissReason.NAMESPACE, detail
        return MissReason.ABSENT, ""

    def _nearest(self, entry: NamespaceEntry) -> str:
        """How this empty namespace differs from the most alike of its tenant; "" if no other
        namespace holds anything. Other tenants' namespaces are never described."""
        nearest: tuple[str, ...] = ()
        others = False
        for other in itertools.islice(self._by_id.values(), _COMPARED_MAX):
            if other is entry or not other.blocks:
                continue
            others = True
            if other.namespace.tenant != entry.namespace.tenant:
                continue
            fields = entry.namespace.differences(other.namespace)
            if not nearest or len(fields) < len(nearest):
                nearest = fields
        if not others:
            return ""
        if not nearest:
            return "nothing was ever stored in this namespace, nor in another of its tenant"
        return (
            "nothing was ever stored in this namespace; the nearest of its tenant differs in: "
            + ", ".join(nearest)
        )


def check_hashes(hashes: Sequence[bytes]) -> None:
    """Raises InvalidRequest on a batch or a key of a wrong size."""
    if len(hashes) > BATCH_BLOCKS_MAX:
        raise InvalidRequest(
            f"{len(hashes)} blocks in one batch; the most is {BATCH_BLOCKS_MAX}: split it"
        )
    sizes = set(map(len, hashes))
    if sizes and not (min(sizes) >= HASH_BYTES_MIN and max(sizes) <= HASH_BYTES_MAX):
        raise InvalidRequest(
            f"hashes have {HASH_BYTES_MIN}..{HASH_BYTES_MAX} bytes, not {sorted(sizes)}"
        )
