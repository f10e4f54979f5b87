"""Blocks for the measurements: their keys, their bytes, and the check of what came back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from dualpath.bench.testbed.keyed_content import KeyedContent
from dualpath.kvstore.block_store import BlockStore
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.store_api import ReserveStatus, SealStatus
from dualpath.transfer.errors import Corrupt, Unavailable

SEED = 20261122
_PUT_BYTES = 32 << 20
_GOOD = frozenset([SealStatus.SEALED, ReserveStatus.EXISTS])


class KeyedBlocks:
    """A chain of `count` blocks of `block_bytes`, a layout of 8 layers."""

    def __init__(self, block_bytes: int, count: int, *, name: str = "bench") -> None:
        self.layout = KVLayout(
            layers=8, block_tokens=16, layer_bytes=block_bytes // 8, dtype="bfloat16"
        )
        self.namespace = Namespace(model=name, layout=self.layout)
        self.block_bytes = self.layout.block_bytes
        self.count = count
        self.hashes = [
            hashlib.sha256(f"{name}/{block_bytes}/{index}".encode()).digest()
            for index in range(count)
        ]
        self.parents = [b"", *self.hashes[:-1]]
        self._content = KeyedContent(self.layout, SEED)

    @property
    def total_bytes(self) -> int:
        """Of all blocks."""
        return self.count * self.block_bytes

    def fill(self, index: int, memory: memoryview, at: int) -> None:
        """Write block `index` at an offset of `memory`."""
        self._content.fill(self.hashes[index], memory, at, self.layout.layer_bytes)

    def check(self, index: int, memory: memoryview, at: int) -> None:
        """Raises Corrupt unless block `index` lies there, byte by byte."""
        wrong = self._content.verify(self.hashes[index], memory, at, self.layout.layer_bytes)
        if wrong is not None:
            raise Corrupt(f"block {index} came back wrong: {wrong}")

    def groups(self, group_bytes: int = _PUT_BYTES) -> Iterator[tuple[range, list[memoryview]]]:
        """The blocks in groups, each with its bytes; a group's memory is used again for the
        next one."""
        step = max(1, group_bytes // self.block_bytes)
        memory = memoryview(bytearray(step * self.block_bytes))
        for start in range(0, self.count, step):
            part = range(start, min(start + step, self.count))
            for place, index in enumerate(part):
                self.fill(index, memory, place * self.block_bytes)
            yield (
                part,
                [
                    memory[place * self.block_bytes : (place + 1) * self.block_bytes]
                    for place in range(len(part))
                ],
            )

    def put(self, store: BlockStore) -> bytes:
        """Store all of them durably; returns the namespace's id. Raises Unavailable."""
        namespace_id = store.open_namespace(self.namespace)
        for part, data in self.groups():
            statuses = store.put(
                namespace_id,
                [self.hashes[index] for index in part],
                [self.parents[index] for index in part],
                data,
            )
            check_stored(statuses)
        return namespace_id


def check_stored(statuses: Sequence[ReserveStatus | SealStatus]) -> None:
    """Raises Unavailable unless every block is stored."""
    bad = [status.value for status in statuses if status not in _GOOD]
    if bad:
        raise Unavailable(f"{len(bad)} of {len(statuses)} blocks were not stored: {bad[0]}")
