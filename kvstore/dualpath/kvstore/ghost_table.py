"""Which keys made way lately: a packed table of fingerprints, eight bytes an entry.

Sets of four fingerprints of 32 bits, each with the number of the entry: an entry counts as
remembered while fewer than `depth` younger ones were added. A full set forgets its oldest. Errs
rarely: an unknown key is taken for a known one once in 2^30 questions, a known one may be forgotten
before its time. Pure.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_WAYS = 4
_NUMBER_MASK = (1 << 32) - 1


class GhostTable:
    """See the module docstring."""

    def __init__(self, entries: int) -> None:
        self._sets = 1
        while self._sets * _WAYS < entries:
            self._sets *= 2
        self._added = 0
        self._adopt(*np.zeros((2, self._sets * _WAYS), np.uint32))

    @property
    def entries(self) -> int:
        """How many keys there is room for."""
        return self._sets * _WAYS

    @property
    def nbytes(self) -> int:
        """Bytes of the table: eight an entry."""
        return self._prints.nbytes + self._numbers.nbytes

    def grow(self, entries: int) -> None:
        """Have room for so many; what is remembered stays."""
        while self._sets * _WAYS < entries:
            # A fingerprint of set i belongs to set i or i + sets of a table twice as large.
            upper = self._prints & np.uint32(self._sets) != 0
            prints = np.concatenate((np.where(upper, 0, self._prints), self._prints * upper))
            numbers = np.concatenate((self._numbers, self._numbers))
            self._sets *= 2
            self._adopt(prints.astype(np.uint32), numbers)

    def add(self, key: int) -> None:
        """Remember a key."""
        mark = _fingerprint(key)
        start = (mark & (self._sets - 1)) * _WAYS
        self._added += 1
        now, oldest, at = self._added, -1, start
        for way in range(start, start + _WAYS):
            found = self._print_view[way]
            if found in (0, mark):
                at = way
                break
            age = (now - self._number_view[way]) & _NUMBER_MASK
            if age > oldest:
                oldest, at = age, way
        self._print_view[at] = mark
        self._number_view[at] = now & _NUMBER_MASK

    def take(self, key: int, depth: int) -> bool:
        """Whether a key is among the last `depth`; it is forgotten."""
        mark = _fingerprint(key)
        start = (mark & (self._sets - 1)) * _WAYS
        for way in range(start, start + _WAYS):
            if self._print_view[way] == mark:
                self._print_view[way] = 0
                return (self._added - self._number_view[way]) & _NUMBER_MASK < depth
        return False

    def _adopt(self, prints: NDArray[np.uint32], numbers: NDArray[np.uint32]) -> None:
        self._prints, self._numbers = prints, numbers
        self._print_view, self._number_view = prints.data, numbers.data


def _fingerprint(key: int) -> int:
    """32 bits, never 0."""
    mixed = (key * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
    return mixed >> 32 or 1
