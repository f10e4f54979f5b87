"""What of a load has been verified: layers ready, blocks valid, blocks complete.

Owns the order in which the chunks of a load go (layer-major: chunk 0 of every block, then chunk
1 of every block, ...) and the marks of what has been verified. A load is a prefix of blocks; it
is only ever shortened (`cut`), and cut blocks no longer count for anything. Pure; it neither
moves nor verifies bytes itself. Each call costs O(1), except `cut`: O(chunks that it removes).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dualpath.kvstore.layout import KVLayout
from dualpath.transfer.errors import InvalidRequest


class LoadProgress:
    """Progress of one load of `blocks` blocks of one layout.

    Index i of a load is chunk i // blocks of block i % blocks, with `blocks` as at the start:
    cutting does not renumber.
    """

    __slots__ = (
        "_blocks",
        "_by_block",
        "_by_chunk",
        "_chunks",
        "_complete",
        "_layout",
        "_marks",
        "_ready_chunks",
        "_valid",
        "_verified",
        "chunk_nbytes",
    )

    def __init__(self, layout: KVLayout, blocks: int) -> None:
        if blocks < 0:
            raise InvalidRequest(f"a load has a number of blocks >= 0, not {blocks}")
        self._layout = layout
        self._blocks = blocks
        self._chunks = layout.chunk_count
        self._valid = blocks
        self._marks = bytearray(blocks * self._chunks)
        self._by_block = [0] * blocks
        self._by_chunk = [0] * self._chunks
        self._verified = 0
        self._complete = 0
        self._ready_chunks = 0
        nbytes: list[int] = []
        for chunk in range(self._chunks):
            nbytes += [layout.chunk_extent(chunk)[1]] * blocks
        self.chunk_nbytes: Sequence[int] = nbytes
        self._settle()

    @property
    def blocks_valid(self) -> int:
        """Length of the prefix that the load still aims at, in blocks."""
        return self._valid

    @property
    def layers_ready(self) -> int:
        """Layers [0, layers_ready) of blocks [0, blocks_valid) are verified."""
        if self._ready_chunks == 0:
            return 0
        return self._layout.layers_complete_after(self._ready_chunks - 1)

    @property
    def complete(self) -> bool:
        """Whether every chunk of every valid block is verified."""
        return self._verified == self._valid * self._chunks

    def complete_blocks(self) -> int:
        """Leading blocks that are fully verified; never more than `blocks_valid`."""
        return self._complete

    @property
    def left_bytes(self) -> int:
        """What is not verified yet of the valid blocks; chunks count as of one size."""
        chunks = self._valid * self._chunks - self._verified
        return chunks * self._layout.block_bytes // self._chunks

    def left_bytes_of_blocks(self) -> list[float]:
        """What is not verified yet of each valid block; chunks count as of one size."""
        chunk_bytes = self._layout.block_bytes / self._chunks
        return [(self._chunks - have) * chunk_bytes for have in self._by_block[: self._valid]]

    def fitting(self, nbytes: float) -> int:
        """Length of the longest prefix of which no more than `nbytes` are not verified yet."""
        chunk_bytes = self._layout.block_bytes / self._chunks
        nbytes = max(0.0, nbytes)
        for block in range(self._valid):
            nbytes -= (self._chunks - self._by_block[block]) * chunk_bytes
            if nbytes < 0:
                return block
        return self._valid

    @property
    def blocks(self) -> int:
        """Blocks of the load at its start, by which its indices count."""
        return self._blocks

    def chunk_ref(self, index: int) -> tuple[int, int]:
        """(block, chunk of the block) of load-chunk `index`."""
        self._check(index)
        chunk, block = divmod(index, self._blocks)
        return block, chunk

    def verified(self, indices: Iterable[int]) -> None:
        """Mark chunks; marking twice, or chunks of a cut block, changes nothing."""
        blocks, valid, marks, by_block = self._blocks, self._valid, self._marks, self._by_block
        indices = list(indices)
        for index in {min(indices), max(indices)} if indices else ():
            self._check(index)
        marked = 0
        for index in indices:
            block = index % blocks
            if block >= valid or marks[index]:
                continue
            marks[index] = 1
            by_block[block] += 1
            self._by_chunk[index // blocks] += 1
            marked += 1
        self._verified += marked
        self._settle()

    def cut(self, blocks: int) -> tuple[int, ...]:
        """Shorten the prefix to `blocks` blocks (longer: no effect).

        Returns the indices that are not needed any more and were not verified, in order.
        """
        if blocks < 0:
            raise InvalidRequest(f"cannot cut a load to {blocks} blocks")
        if blocks >= self._valid:
            return ()
        dropped = []
        for chunk in range(self._chunks):
            for block in range(blocks, self._valid):
                index = chunk * self._blocks + block
                if self._marks[index]:
                    self._by_chunk[chunk] -= 1
                    self._verified -= 1
                else:
                    dropped.append(index)
        self._valid = blocks
        self._complete = min(self._complete, blocks)
        self._settle()
        return tuple(dropped)

    def _settle(self) -> None:
        """Move the marks of leading complete blocks and chunks forward; amortised O(1)."""
        while self._complete < self._valid and self._by_block[self._complete] == self._chunks:
            self._complete += 1
        ready = self._ready_chunks
        while ready < self._chunks and self._by_chunk[ready] == self._valid:
            ready += 1
        self._ready_chunks = ready

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self._marks):
            raise InvalidRequest(f"chunk index {index} is outside of 0..{len(self._marks) - 1}")
