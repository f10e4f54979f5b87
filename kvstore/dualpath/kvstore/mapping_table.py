"""Which rows' copies in DRAM are mapped by readers, for whom, and the words that say so.

Owns the counts of mapped rows and the guard words. A guard is 8 bytes at the end of the arena that
hold the lease's id for as long as the lease's mapped bytes are stable, and anything else
afterwards; ids are never used twice, and a guard changes before any of the bytes can. So a reader
that has copied, and then still finds the id, has copied what was stored; expiry cannot tear
anything unnoticed. Pure; needs the store's lock; pins on rows are the caller's.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
from dualpath.transfer.errors import Overloaded
from numpy.typing import NDArray

MAPPINGS_MAX = 4096
"""Most mapped leases at once; a row is counted in 16 bits."""
GUARD_BYTES = 8
GUARDS_BYTES = MAPPINGS_MAX * GUARD_BYTES
RETRY_S = 0.5

assert MAPPINGS_MAX < 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Mapping:
    """The pinned rows of a lease. `guard` is the index of its guard word."""

    owner: str
    rows: NDArray[np.intp]
    slot_bytes: int
    guard: int


class _Counts:
    """How often each row is mapped; `nbytes` counts a row once, however often."""

    __slots__ = ("_times", "nbytes")

    def __init__(self) -> None:
        self._times: NDArray[np.uint16] = np.zeros(0, np.uint16)
        self.nbytes = 0

    def fresh(self, rows: NDArray[np.intp]) -> int:
        """How many of these rows are not mapped yet."""
        known = rows[rows < len(self._times)]
        return len(rows) - int(np.count_nonzero(self._times[known]))

    def add(self, rows: NDArray[np.intp], slot_bytes: int) -> None:
        self.nbytes += self.fresh(rows) * slot_bytes
        least = int(rows.max()) + 1 if len(rows) else 0
        if least > len(self._times):
            grown = np.zeros(max(least, 2 * len(self._times)), np.uint16)
            grown[: len(self._times)] = self._times
            self._times = grown
        self._times[rows] += 1

    def remove(self, rows: NDArray[np.intp], slot_bytes: int) -> None:
        self._times[rows] -= 1
        self.nbytes -= int(np.count_nonzero(self._times[rows] == 0)) * slot_bytes

    def __contains__(self, row: int) -> bool:
        return row < len(self._times) and bool(self._times[row])


class MappingTable:
    """See the module docstring. `guards` is the memory of the words, of format `Q`; the limits
    are bytes of slots: mapped by one owner, and by all, each slot counted once."""

    def __init__(self, guards: memoryview, *, owner_bytes_max: int, bytes_max: int) -> None:
        self._guards = guards
        self._owner_bytes_max = owner_bytes_max
        self._bytes_max = bytes_max
        self._free = array("H", range(len(guards) - 1, -1, -1))
        self._all = _Counts()
        self._owners: dict[str, tuple[_Counts, int]] = {}

    def __len__(self) -> int:
        return len(self._guards) - len(self._free)

    def __contains__(self, row: int) -> bool:
        """Whether somebody has this row mapped."""
        return row in self._all

    @property
    def nbytes(self) -> int:
        """Bytes of mapped slots."""
        return self._all.nbytes

    def begin(self, owner: str, lease_id: int, rows: NDArray[np.intp], slot_bytes: int) -> Mapping:
        """Count the rows (each once) and set a guard. Raises Overloaded: nothing has changed."""
        counts, mappings = self._owners.get(owner) or (_Counts(), 0)
        self._check_room(counts, rows, slot_bytes)
        guard = self._free.pop()
        self._owners[owner] = counts, mappings + 1
        counts.add(rows, slot_bytes)
        self._all.add(rows, slot_bytes)
        self._guards[guard] = lease_id
        return Mapping(owner, rows, slot_bytes, guard)

    def end(self, mapping: Mapping) -> None:
        """Clear the guard, then forget the rows."""
        self._guards[mapping.guard] = 0
        self._free.append(mapping.guard)
        counts, mappings = self._owners[mapping.owner]
        if mappings > 1:
            counts.remove(mapping.rows, mapping.slot_bytes)
            self._owners[mapping.owner] = counts, mappings - 1
        else:
            del self._owners[mapping.owner]
        self._all.remove(mapping.rows, mapping.slot_bytes)

    def _check_room(self, counts: _Counts, rows: NDArray[np.intp], slot_bytes: int) -> None:
        if not self._free:
            raise Overloaded(
                f"{len(self._guards)} leases are mapped; release some or retry",
                retry_after_s=RETRY_S,
            )
        for held, most, whose in (
            (counts, self._owner_bytes_max, "by one client"),
            (self._all, self._bytes_max, "by all clients"),
        ):
            wanted = held.nbytes + held.fresh(rows) * slot_bytes
            if wanted > most:
                raise Overloaded(
                    f"{wanted} bytes would be mapped {whose}, the most is {most}: release what is "
                    "read, or map fewer blocks at once",
                    retry_after_s=RETRY_S,
                )
