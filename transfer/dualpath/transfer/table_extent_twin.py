"""The extent of a table in Python: what `_native` does where it could be built.

`extent_of` has the same arguments, answers and limits as that of transfer/native/table.c; what it
means is said in table_extent.py.
"""

from __future__ import annotations

from array import array

_LIMIT = 1 << 64


def extent_of(
    stride: int,
    count: int,
    length: int,
    bases: array[int],
    skips: array[int],
    sizes: array[int],
    /,
) -> tuple[int, int, int, int, int]:
    """See table_extent.extent_of."""
    if not len(sizes):
        raise ValueError("a table has at least one part")
    if not len(bases) == len(skips) == len(sizes):
        raise ValueError("bases, skips and sizes must be as many, of 64 bits each")
    if count > 1 and stride < length:
        raise ValueError(f"slices overlap: stride {stride} is less than length {length}")
    starts, ends = [], []
    for part, (base, skip, size) in enumerate(zip(bases, skips, sizes, strict=True)):
        if skip + size > count * length:
            raise ValueError(
                f"part {part} reaches beyond its {count} slices of {length} bytes each"
            )
        if size:
            first, last = (
                base + (at if count <= 1 else at // length * stride + at % length)
                for at in (skip, skip + size - 1)
            )
            if last + 1 >= _LIMIT:
                raise ValueError(f"part {part} reaches beyond 64 bits")
            starts.append(first)
            ends.append(last + 1)
    span = (min(starts), max(ends)) if starts else (bases[0], bases[0])
    nbytes = sum(sizes)
    if nbytes >= _LIMIT:
        raise ValueError("the parts reach beyond 64 bits")
    return nbytes, min(sizes), max(sizes), *span
