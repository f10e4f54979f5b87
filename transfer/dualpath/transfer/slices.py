"""Strided byte ranges inside one region.

Owns the arithmetic of `Slices`: which bytes of a region a chunk occupies. An engine keeps the
layers of a block apart (paged KV), so one chunk lands in many places; they are described by
(base, stride, count, length) and never by an object per place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dualpath.transfer.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Slices:
    """Bytes [skip, skip + nbytes) of the concatenation of `count` slices of `length` bytes.

    Slice i starts at `base + i * stride` of the region. All fields are bytes, except `count`.
    One contiguous extent is `Slices.contiguous(offset, nbytes)`.
    """

    base: int
    stride: int
    count: int
    length: int
    skip: int
    nbytes: int

    def __post_init__(self) -> None:
        if min(self.fields) < 0:
            raise InvalidRequest(f"slices with a negative field: {self.fields}")
        if self.skip + self.nbytes > self.count * self.length:
            raise InvalidRequest(
                f"slices cover {self.count * self.length} bytes; bytes "
                f"[{self.skip}, {self.skip + self.nbytes}) were asked for"
            )
        if self.count > 1 and self.stride < self.length:
            raise InvalidRequest(
                f"slices overlap: stride {self.stride} is less than length {self.length}"
            )

    @property
    def fields(self) -> tuple[int, int, int, int, int, int]:
        """All fields, in order."""
        return (self.base, self.stride, self.count, self.length, self.skip, self.nbytes)

    @staticmethod
    def contiguous(offset: int, nbytes: int) -> Slices:
        """One extent of `nbytes` bytes at `offset`."""
        return Slices(offset, nbytes, 1, nbytes, 0, nbytes)

    @staticmethod
    def strided(base: int, stride: int, count: int, length: int) -> Slices:
        """All bytes of `count` slices of `length` bytes, `stride` bytes apart."""
        return Slices(base, stride, count, length, 0, count * length)

    def part(self, offset: int, nbytes: int) -> Slices:
        """Bytes [offset, offset + nbytes) of this range's own bytes."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise InvalidRequest(
                f"part [{offset}, {offset + nbytes}) is outside of {self.nbytes} bytes"
            )
        return replace(self, skip=self.skip + offset, nbytes=nbytes)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yield (offset in the region, bytes) of each contiguous piece, in order."""
        left = self.nbytes
        if left == 0:
            return
        index, inside = divmod(self.skip, self.length)
        if self.stride == self.length:
            yield self.base + self.skip, left
            return
        while left:
            take = min(self.length - inside, left)
            yield self.base + index * self.stride + inside, take
            left -= take
            index, inside = index + 1, 0

    @property
    def piece_count(self) -> int:
        """How many contiguous pieces `pieces` yields."""
        if self.nbytes == 0:
            return 0
        if self.stride == self.length:
            return 1
        first = self.skip // self.length
        return (self.skip + self.nbytes - 1) // self.length - first + 1

    @property
    def end(self) -> int:
        """One past the last byte of the region that this range touches."""
        if self.nbytes == 0:
            return self.base
        last, inside = divmod(self.skip + self.nbytes - 1, self.length)
        return self.base + last * self.stride + inside + 1

    @property
    def start(self) -> int:
        """The first byte of the region that this range touches."""
        if self.nbytes == 0:
            return self.base
        first, inside = divmod(self.skip, self.length)
        return self.base + first * self.stride + inside
