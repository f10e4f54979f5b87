"""Bytes of every block as a function of its key, so that a receiver can check each of them.

Owns the generator and the comparison. The content does not depend on our checksums or on anything
that was transferred: whoever knows (seed, block hash) knows every byte. Word w of page p of a
block is `table[w] ^ word(key, p)`, where `table` is one random table common to all blocks and
`word` a 64-bit mix. So two blocks differ in every page, two pages of a block differ, bytes shifted
inside a page differ, and a flipped bit is a flipped bit: the comparison is exact.

Not thread-safe: a `KeyedContent` has scratch memory of one block; make one for each thread.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from dualpath.kvstore.layout import KVLayout
from dualpath.transfer.errors import InvalidRequest

_PAGE_WORDS = 512
_WORD_BYTES = 8
_PAGE_BYTES = _PAGE_WORDS * _WORD_BYTES
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

Words = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first wrong byte of a block: which layer, and where in that Layer Block."""

    layer: int
    offset_bytes: int
    wrong_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.wrong_bytes} wrong bytes, the first in layer {self.layer} "
            f"at byte {self.offset_bytes}"
        )


def _mix(words: Words) -> Words:
    words = (words ^ (words >> np.uint64(30))) * _MIX_1
    words = (words ^ (words >> np.uint64(27))) * _MIX_2
    return words ^ (words >> np.uint64(31))


class KeyedContent:
    """Generates and verifies blocks of one layout."""

    def __init__(self, layout: KVLayout, seed: int) -> None:
        self._layout = layout
        self._seed = seed.to_bytes(8, "little", signed=True)
        pages = -(-layout.block_bytes // _PAGE_BYTES)
        # Splitmix of a counter: the same in every process and for every numpy version.
        counter = np.arange(_PAGE_WORDS, dtype=np.uint64) + np.uint64(seed & 0xFFFF_FFFF)
        self._table = _mix(counter * _GOLDEN)
        self._page_steps = np.arange(1, pages + 1, dtype=np.uint64) * _GOLDEN
        self._scratch = np.empty((pages, _PAGE_WORDS), dtype=np.uint64)
        flat: Bytes = self._scratch.reshape(-1).view(np.uint8)
        self._expected = flat[: layout.block_bytes].reshape(layout.layers, layout.layer_bytes)

    def _generate(self, key: bytes) -> None:
        digest = hashlib.blake2b(key, digest_size=8, key=self._seed).digest()
        start = np.uint64(int.from_bytes(digest, "little"))
        words = _mix(self._page_steps + start)
        np.bitwise_xor(self._table, words[:, None], out=self._scratch)

    def _rows(self, memory: memoryview, base_bytes: int, layer_stride_bytes: int) -> Bytes:
        layout = self._layout
        end = base_bytes + (layout.layers - 1) * layer_stride_bytes + layout.layer_bytes
        if base_bytes < 0 or layer_stride_bytes < layout.layer_bytes or end > memory.nbytes:
            raise InvalidRequest(
                f"a block at {base_bytes} with layer stride {layer_stride_bytes} ends at {end}, "
                f"outside of {memory.nbytes} bytes"
            )
        flat: Bytes = np.frombuffer(memory, dtype=np.uint8)
        return np.lib.stride_tricks.as_strided(
            flat[base_bytes:], (layout.layers, layout.layer_bytes), (layer_stride_bytes, 1)
        )

    def fill(
        self, key: bytes, memory: memoryview, base_bytes: int, layer_stride_bytes: int
    ) -> None:
        """Write the block of `key` into engine memory, layer l at base + l * stride."""
        rows = self._rows(memory, base_bytes, layer_stride_bytes)
        self._generate(key)
        np.copyto(rows, self._expected)

    def verify(
        self, key: bytes, memory: memoryview, base_bytes: int, layer_stride_bytes: int
    ) -> Mismatch | None:
        """Compare every byte of the block; None if all are right."""
        rows = self._rows(memory, base_bytes, layer_stride_bytes)
        self._generate(key)
        if np.array_equal(self._aligned(rows), self._aligned(self._expected)):
            return None
        wrong = rows != self._expected
        layer, offset = np.argwhere(wrong)[0]
        return Mismatch(int(layer), int(offset), int(np.count_nonzero(wrong)))

    @staticmethod
    def _aligned(rows: Bytes) -> npt.NDArray[np.uint64] | Bytes:
        """The same bytes as words where addresses and sizes allow: eight times fewer compares."""
        address = rows.__array_interface__["data"][0]
        if (address | rows.shape[1] | rows.strides[0]) % _WORD_BYTES == 0:
            return rows.view(np.uint64)
        return rows
