"""Many strided ranges of one shape: where the parts of a batch lie.

Owns the arithmetic of a table: its bounds, and the contiguous pieces of any of its bytes. One
value describes a batch of chunks, so that none of them costs an object of its own, and its numbers
are arrays, which travel, are compared and go to native code as they are.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, repeat
from operator import add

from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.slices import Slices
from dualpath.transfer.table_extent import extent_of

_PLACE_BYTES = 8 + 8
PART_BYTES = _PLACE_BYTES + 4
"""What a part takes in the bytes of a table."""
Fields = tuple[int, int, int, int, int, int]
"""The fields of a Slices, in its order."""

assert array("Q").itemsize == 8
assert array("I").itemsize == 4


@dataclass(frozen=True, slots=True, init=False)
class SliceTable:
    """Part i is `Slices(bases[i], stride, count, length, skips[i], sizes[i])`, all in bytes but
    `count`. The arrays (unsigned, 64 bits) must not change any more.

    All parts have `nbytes` bytes, none fewer than `size_min` or more than `size_max`.
    """

    stride: int
    count: int
    length: int
    bases: array[int]
    skips: array[int]
    sizes: array[int]
    nbytes: int = field(compare=False)
    size_min: int = field(compare=False)
    size_max: int = field(compare=False)
    _span: tuple[int, int] = field(compare=False, repr=False)

    def __init__(
        self,
        stride: int,
        count: int,
        length: int,
        bases: Sequence[int],
        skips: Sequence[int],
        sizes: Sequence[int],
    ) -> None:
        if not len(bases) == len(skips) == len(sizes) > 0:
            raise InvalidRequest(
                f"a table has as many bases, skips and sizes, at least one: {len(bases)}, "
                f"{len(skips)}, {len(sizes)}"
            )
        if min(stride, count, length) < 0:
            raise InvalidRequest(f"a table with a negative field: {min(stride, count, length)}")
        bases, skips, sizes = _numbers(bases), _numbers(skips), _numbers(sizes)
        try:
            covered = extent_of(stride, count, length, bases, skips, sizes)
        except (ValueError, OverflowError) as error:
            raise InvalidRequest(f"a table of slices: {error}") from error
        nbytes, size_min, size_max, start, end = covered
        put = object.__setattr__
        put(self, "stride", stride)
        put(self, "count", count)
        put(self, "length", length)
        put(self, "bases", bases)
        put(self, "skips", skips)
        put(self, "sizes", sizes)
        put(self, "nbytes", nbytes)
        put(self, "size_min", size_min)
        put(self, "size_max", size_max)
        put(self, "_span", (start, end))

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
    def solid(self) -> bool:
        """Whether each part is one contiguous piece."""
        return self.count <= 1 or self.stride == self.length

    @property
    def places(self) -> tuple[int, int, array[int], array[int]]:
        """(stride, length, bases, skips), as native code wants it: 1, 1 if the table is solid."""
        if self.solid:
            return 1, 1, self.bases, self.skips
        return self.stride, self.length, self.bases, self.skips

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

    def fields_of(self, index: int) -> Fields:
        """Those of one part."""
        base, skip, size = self.bases[index], self.skips[index], self.sizes[index]
        if self.count == 1:
            return (base + skip, size, 1, size, 0, size)
        return (base, self.stride, self.count, self.length, skip, size)

    def has(self, first: int, other: SliceTable) -> bool:
        """Whether parts from `first` on have the same fields as those of `other`."""
        last = first + len(other)
        mine = self if len(self) == len(other) and not first else self.parts(first, last)
        if mine.count != other.count or mine.sizes != other.sizes:
            return False
        if mine.skips == other.skips and mine.bases == other.bases:
            shape = (mine.stride, mine.length) == (other.stride, other.length)
            return shape or mine.count == 1
        return mine.count == 1 and list(mine.fields()) == list(other.fields())

    def span(self) -> tuple[int, int]:
        """The first byte of a region that any part touches, and one past the last."""
        return self._span

    def places_to_bytes(self) -> bytes:
        """The bases and then the skips, of 64 bits each, little endian."""
        return _to_wire(self.bases) + _to_wire(self.skips)

    def to_bytes(self) -> bytes:
        """The bases, the skips (64 bits each) and then the sizes (32 bits), little endian:
        PART_BYTES a part. Raises OverflowError for larger sizes."""
        return self.places_to_bytes() + _to_wire(array("I", self.sizes))

    @staticmethod
    def from_bytes(
        stride: int,
        count: int,
        length: int,
        raw: bytes | memoryview,
        sizes: array[int] | None = None,
    ) -> SliceTable:
        """Inverse of `to_bytes`, or of `places_to_bytes` if the sizes are known from elsewhere.
        Raises InvalidRequest."""
        parts = len(raw) // PART_BYTES if sizes is None else len(sizes)
        if len(raw) != parts * (PART_BYTES if sizes is None else _PLACE_BYTES):
            raise InvalidRequest(f"a table of {parts} parts in {len(raw)} bytes")
        bases = _from_wire("Q", raw[: 8 * parts])
        skips = _from_wire("Q", raw[8 * parts : _PLACE_BYTES * parts])
        if sizes is None:
            sizes = array("Q", _from_wire("I", raw[_PLACE_BYTES * parts :]))
        return SliceTable(stride, count, length, bases, skips, sizes)

    def bytes_of(self, first: int, last: int) -> int:
        """Bytes of parts [first, last)."""
        return self.nbytes if last - first == len(self) else sum(self.sizes[first:last])

    def ends(self) -> list[int]:
        """How many bytes of the table parts [0, i] have, for each i."""
        return list(accumulate(self.sizes))


def _numbers(values: Sequence[int]) -> array[int]:
    if isinstance(values, array) and values.typecode == "Q":
        return values
    try:
        return array("Q", values)
    except OverflowError as error:
        raise InvalidRequest(
            f"a table with a negative field, or one of more than 64 bits: {min(values)}, "
            f"{max(values)}"
        ) from error


def _to_wire(numbers: array[int]) -> bytes:
    if sys.byteorder == "big":
        numbers = numbers[:]
        numbers.byteswap()
    return numbers.tobytes()


def _from_wire(typecode: str, raw: bytes | memoryview) -> array[int]:
    numbers = array(typecode)
    numbers.frombytes(raw)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


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
