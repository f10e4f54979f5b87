"""Many strided ranges of one shape: where the parts of a batch lie.

Owns the arithmetic of a table: its bounds, and the contiguous pieces of any of its bytes. One
value describes a batch of chunks, so that none of them costs an object of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from operator import add

from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.slices import Slices

Fields = tuple[int, int, int, int, int, int]
"""The fields of a Slices, in its order."""


@dataclass(frozen=True, slots=True)
class SliceTable:
    """Part i is `Slices(bases[i], stride, count, length, skips[i], sizes[i])`, all in bytes but
    `count`. The sequences must not change any more."""

    stride: int
    count: int
    length: int
    bases: Sequence[int]
    skips: Sequence[int]
    sizes: Sequence[int]

    def __post_init__(self) -> None:
        if not len(self.bases) == len(self.skips) == len(self.sizes) > 0:
            raise InvalidRequest(
                f"a table has as many bases, skips and sizes, at least one: {len(self.bases)}, "
                f"{len(self.skips)}, {len(self.sizes)}"
            )
        lowest = min(
            self.stride, self.count, self.length, *map(min, (self.bases, self.skips, self.sizes))
        )
        if lowest < 0:
            raise InvalidRequest(f"a table with a negative field: {lowest}")
        whole = self.count * self.length
        if (
            max(self.skips) + max(self.sizes) > whole  # which is quickly seen, and mostly not so
            and max(map(add, self.skips, self.sizes)) > whole
        ):
            raise InvalidRequest(
                f"a part reaches beyond {self.count} slices of {self.length} bytes each"
            )
        if self.count > 1 and self.stride < self.length:
            raise InvalidRequest(
                f"slices overlap: stride {self.stride} is less than length {self.length}"
            )

    @staticmethod
    def contiguous(offsets: Sequence[int], sizes: Sequence[int]) -> SliceTable:
        """One extent a part."""
        length = max(sizes)
        return SliceTable(length, 1, length, offsets, [0] * len(sizes), sizes)

    @staticmethod
    def of(slices: Slices) -> SliceTable:
        """A table of one part."""
        return SliceTable(
            slices.stride,
            slices.count,
            slices.length,
            (slices.base,),
            (slices.skip,),
            (slices.nbytes,),
        )

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(self.sizes)

    @property
    def solid(self) -> bool:
        """Whether each part is one contiguous piece."""
        return self.count <= 1 or self.stride == self.length

    @property
    def pieces_max(self) -> int:
        """The contiguous pieces of all parts are not more than so many."""
        if self.solid:
            return len(self)
        return sum(size // self.length + 2 for size in self.sizes)

    def part(self, index: int) -> Slices:
        """One part, with its `fields`."""
        if self.count == 1:
            return Slices.contiguous(self.bases[index] + self.skips[index], self.sizes[index])
        return Slices(
            self.bases[index],
            self.stride,
            self.count,
            self.length,
            self.skips[index],
            self.sizes[index],
        )

    def parts(self, first: int, last: int) -> SliceTable:
        """Parts [first, last), at least one."""
        chosen = slice(first, last)
        return SliceTable(
            self.stride,
            self.count,
            self.length,
            self.bases[chosen],
            self.skips[chosen],
            self.sizes[chosen],
        )

    def chosen(self, indices: Sequence[int]) -> SliceTable:
        """The parts with these indices, at least one, in that order."""
        bases, skips, sizes = (
            [each[index] for index in indices] for each in (self.bases, self.skips, self.sizes)
        )
        return SliceTable(self.stride, self.count, self.length, bases, skips, sizes)

    def fields(self) -> Iterator[Fields]:
        """The fields of each part's Slices; of one slice those of `Slices.contiguous`, so that the
        same bytes have the same fields."""
        if self.count == 1:
            starts = map(add, self.bases, self.skips) if any(self.skips) else self.bases
            return zip(
                starts, self.sizes, repeat(1), self.sizes, repeat(0), self.sizes, strict=False
            )
        return zip(
            self.bases,
            repeat(self.stride),
            repeat(self.count),
            repeat(self.length),
            self.skips,
            self.sizes,
            strict=False,
        )

    def span(self) -> tuple[int, int]:
        """The first byte of a region that any part touches, and one past the last."""
        if self.solid:
            starts = list(map(add, self.bases, self.skips)) if any(self.skips) else self.bases
            return min(starts), max(map(add, starts, self.sizes))
        slices = [self.part(index) for index in range(len(self))]
        return min(each.start for each in slices), max(each.end for each in slices)

    def ends(self) -> list[int]:
        """How many bytes of the table parts [0, i] have, for each i."""
        return list(accumulate(self.sizes))


class TableReader:
    """The pieces of a table's bytes, one part after another, from any offset on."""

    __slots__ = ("ends", "table")

    def __init__(self, table: SliceTable) -> None:
        self.table = table
        self.ends = table.ends()

    def buffers(self, view: memoryview, offset: int, nbytes: int, limit: int) -> list[memoryview]:
        """The pieces of bytes [offset, offset + nbytes) in `view`, at most `limit` of them; parts
        that adjoin are one."""
        table, ends = self.table, self.ends
        index = bisect_right(ends, offset)
        inside = offset - (ends[index - 1] if index else 0)
        solid = table.solid
        found: list[memoryview] = []
        begin = end = -1  # of the last piece
        while nbytes and len(found) < limit:
            take = min(table.sizes[index] - inside, nbytes)
            if solid:
                start = table.bases[index] + table.skips[index] + inside
                if start == end:
                    found.pop()
                else:
                    begin = start
                end = start + take
                found.append(view[begin:end])
            else:
                for at, size in table.part(index).part(inside, take).pieces():
                    found.append(view[at : at + size])
                    if len(found) == limit:
                        break
            nbytes -= take
            inside = 0
            index += 1
        return found
