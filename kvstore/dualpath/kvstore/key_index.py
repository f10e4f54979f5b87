"""The key index: from a block's key (namespace and chain hash) to its row.

Owns which rows are present, by key. The keys stay in the columns of the block table, lent by
`bind`; a row's key must not change while it is in the index. The native index
(kvstore/native/key_index.c) takes 10 to 20 bytes a key and keeps no object a block; the twin, a
dict, about 150, and serves where the extension is not built. Neither can be slowed down by chosen
keys: both hash with a secret seed. Needs the store's lock.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Protocol

import numpy as np
from dualpath.kvstore.checksum import Buffer
from numpy.typing import NDArray

_SEED_BYTES = 16


class KeyIndex(Protocol):
    """See the module docstring."""

    def bind(
        self,
        namespaces: NDArray[np.int32],
        hashes: NDArray[np.uint8],
        lengths: NDArray[np.uint8],
        parents: NDArray[np.int32],
        /,
        *soon: NDArray[Any],
    ) -> None:
        """Use these columns from now on: the former ones with more rows. `hashes` is 32 wide.
        `soon` are up to four more in which whoever asks for a prefix looks next: their memory is
        asked for with it."""

    def put(self, row: int, /) -> None:
        """Bring in a row. Raises KeyError if its key is there, IndexError if it is no row."""

    def put_first(self, count: int, /) -> None:
        """Bring rows [0, count) into an empty index."""

    def remove(self, row: int, /) -> None:
        """Take a row out. Raises KeyError if it is not there."""

    def get(self, namespace: int, key: Buffer, /) -> int:
        """The row of a key; -1 if it is absent."""

    def find_parents(
        self, hashes: NDArray[np.uint8], lengths: NDArray[np.uint8], out: NDArray[np.int32], /
    ) -> None:
        """For each of the first rows, the row of another hash in the same namespace, or -1."""

    def prefix(
        self, namespace: int, keys: Buffer, key_bytes: int, out: NDArray[np.int32], /
    ) -> int:
        """How many leading keys are present and one chain, each the parent of the next; their
        rows go to `out`."""

    def __len__(self) -> int:
        """Rows that are in."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory, without the columns."""


class DictKeyIndex:
    """The twin."""

    def __init__(self) -> None:
        self._rows: dict[bytes, int] = {}
        self._namespaces: NDArray[np.int32] = np.zeros(0, np.int32)
        self._hashes: NDArray[np.uint8] = np.zeros((0, 32), np.uint8)
        self._lengths: NDArray[np.uint8] = np.zeros(0, np.uint8)
        self._parents: NDArray[np.int32] = np.zeros(0, np.int32)

    def bind(
        self,
        namespaces: NDArray[np.int32],
        hashes: NDArray[np.uint8],
        lengths: NDArray[np.uint8],
        parents: NDArray[np.int32],
        /,
        *soon: NDArray[Any],
    ) -> None:
        """See KeyIndex."""
        rows = len(lengths)
        columns: tuple[NDArray[Any], ...] = (namespaces, hashes, parents, *soon)
        if {len(each) for each in columns} != {rows} or rows < len(self._lengths):
            raise ValueError("the columns have not the same rows, or fewer than before")
        self._namespaces, self._hashes = namespaces, hashes
        self._lengths, self._parents = lengths, parents

    def put(self, row: int, /) -> None:
        """See KeyIndex."""
        key = self._key(row)
        if key in self._rows:
            raise KeyError(f"row {row} has the key of row {self._rows[key]}")
        self._rows[key] = row

    def put_first(self, count: int, /) -> None:
        """See KeyIndex."""
        if self._rows or not 0 <= count <= len(self._lengths):
            raise ValueError(
                f"{count} rows of {len(self._lengths)} into an index of {len(self._rows)}"
            )
        for row in range(count):
            self.put(row)

    def remove(self, row: int, /) -> None:
        """See KeyIndex."""
        key = self._key(row)
        if self._rows.get(key) != row:
            raise KeyError(f"row {row} is not in the index")
        del self._rows[key]

    def get(self, namespace: int, key: Buffer, /) -> int:
        """See KeyIndex."""
        return self._rows.get(_name(namespace) + bytes(key), -1)

    def find_parents(
        self, hashes: NDArray[np.uint8], lengths: NDArray[np.uint8], out: NDArray[np.int32], /
    ) -> None:
        """See KeyIndex."""
        if not len(hashes) == len(lengths) == len(out) <= len(self._lengths):
            raise ValueError("hashes, lengths and out are not of the same rows")
        for row, length in enumerate(lengths.tolist()):
            out[row] = self.get(int(self._namespaces[row]), hashes[row, :length].tobytes())

    def prefix(
        self, namespace: int, keys: Buffer, key_bytes: int, out: NDArray[np.int32], /
    ) -> int:
        """See KeyIndex."""
        data = bytes(keys)
        if not 1 <= key_bytes <= 32 or len(data) % key_bytes or len(out) < len(data) // key_bytes:
            raise ValueError("keys, their size and out do not fit each other")
        name, above = _name(namespace), -1
        for index in range(len(data) // key_bytes):
            row = self._rows.get(name + data[index * key_bytes : (index + 1) * key_bytes])
            if row is None or (index and self._parents[row] != above):
                return index
            out[index] = above = row
        return len(data) // key_bytes

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """See KeyIndex."""
        return sys.getsizeof(self._rows) + len(self._rows) * _OBJECTS_BYTES

    def _key(self, row: int) -> bytes:
        if not 0 <= row < len(self._lengths):
            raise IndexError(f"row {row} is outside of 0..{len(self._lengths) - 1}")
        return (
            _name(int(self._namespaces[row]))
            + self._hashes[row, : int(self._lengths[row])].tobytes()
        )


_OBJECTS_BYTES = sys.getsizeof(bytes(36)) + sys.getsizeof(1 << 20)


def _name(namespace: int) -> bytes:
    return namespace.to_bytes(4, "little", signed=True)


try:
    from dualpath.kvstore._native import KeyIndex as _NativeKeyIndex
except ImportError:

    def new_key_index() -> KeyIndex:
        """An empty index: the twin, since the native extension is not built."""
        return DictKeyIndex()
else:

    def new_key_index() -> KeyIndex:
        """An empty index: the native one."""
        return _NativeKeyIndex(os.urandom(_SEED_BYTES))
