"""The order in which the blocks of one tier make way, told apart by tenant and size class.

Owns the groups of an eviction policy and, for each, the *spare* rows: those that should stay (a
retained block, a copy that a lease is on) but may go when nothing else may. Asks its owner what may
be done with a row: `verdict`. Needs the store's lock; does no I/O. Pure.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from dualpath.kvstore.eviction import NONE, EvictionPolicy
from numpy.typing import NDArray


class Verdict(enum.IntEnum):
    """What may be done with a row."""

    GO = 0
    SPARE = 1
    """It should stay, but may go in need."""
    STAY = 2


class TierOrder:
    """See the module docstring."""

    def __init__(self, policy: EvictionPolicy, verdict: Callable[[int], Verdict]) -> None:
        self.policy = policy
        self._verdict = verdict
        self._groups: dict[tuple[int, int], int] = {}
        self._group_of: list[tuple[int, int]] = []
        # Of each group the rows that were refused as spare, in the order of the policy.
        self._spare: list[OrderedDict[int, None]] = []

    def sizes(self, bucket: int) -> list[int]:
        """Size classes of which the bucket has or had rows."""
        return [size for of_bucket, size in self._groups if of_bucket == bucket]

    def has_other_sizes(self, slot_bytes: int) -> bool:
        """Whether there are rows of another size class."""
        return any(
            self.policy.count(group)
            for (_, size), group in self._groups.items()
            if size != slot_bytes
        )

    def enter(
        self, row: int, bucket: int, slot_bytes: int, key: int, *, extends: int, parked: bool
    ) -> None:
        """A row is in the tier from now on; see EvictionPolicy.insert."""
        group = self._group(bucket, slot_bytes)
        self.policy.insert(row, group, key, extends=extends, parked=parked)

    def fill(
        self, rows: NDArray[np.int32], bucket: int, slot_bytes: int, parked: NDArray[np.bool_]
    ) -> None:
        """Rows that are there at the start, the first to go first."""
        self.policy.fill(rows, self._group(bucket, slot_bytes), parked)

    def settle(self, row: int, *, spent: bool = False) -> None:
        """Something that kept the row may be over."""
        if self._verdict(row) is not Verdict.STAY:
            self.policy.ready(row, spent=spent)

    def settle_all(self, rows: NDArray[np.integer]) -> None:
        """As `settle`, for many."""
        for row in self.policy.parked(rows).tolist():
            self.settle(row)

    def leave(self, row: int, key: int = 0) -> None:
        """A row has left; with `key` because it had to make way."""
        group = self.policy.group_of(row)
        if group != NONE:
            self._spare[group].pop(row, None)
            self.policy.remove(row, key)

    def victim(
        self, buckets: Sequence[int], slot_bytes: int, *, any_size: bool, spare: bool
    ) -> int:
        """The first row to go of these buckets, in their order; NONE if none may. With `any_size`
        blocks of other sizes follow those of `slot_bytes`, with `spare` spare rows follow all."""
        for find in (self._next, self._next_spare) if spare else (self._next,):
            for bucket in buckets:
                others = self.sizes(bucket) if any_size else ()
                for size in (slot_bytes, *(each for each in others if each != slot_bytes)):
                    group = self._groups.get((bucket, size), NONE)
                    row = NONE if group == NONE else find(group)
                    if row != NONE:
                        return row
        return NONE

    def _next(self, group: int) -> int:
        return self.policy.victim(group, lambda row: self._may_go(group, row))

    def _next_spare(self, group: int) -> int:
        spare = self._spare[group]
        while spare:
            row = next(iter(spare))
            if self._verdict(row) is not Verdict.STAY:
                return row
            # It will be refused, and noted, again when its turn comes again.
            del spare[row]
        return NONE

    def _group(self, bucket: int, slot_bytes: int) -> int:
        group = self._groups.get((bucket, slot_bytes))
        if group is None:
            group = self._groups[bucket, slot_bytes] = len(self._spare)
            self._spare.append(OrderedDict())
        return group

    def _may_go(self, group: int, row: int) -> bool:
        verdict = self._verdict(row)
        if verdict is Verdict.SPARE:
            self._spare[group][row] = None
        return verdict is Verdict.GO
