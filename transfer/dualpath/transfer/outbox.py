"""Writes to one peer from `write` to their completion.

Owns the pending writes of one connection: their order, deadlines, progress and the bound on
their bytes. Not thread-safe; the connection locks. Guarantees that each write leaves exactly
once, by `settle`, `expire` or `drain`; the caller delivers its completion by `deliver`.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import cast

from dualpath.transfer.errors import InvalidRequest, Overloaded
from dualpath.transfer.lane_queue import LaneQueue, PeerLanes
from dualpath.transfer.slice_table import TableReader
from dualpath.transfer.transport import (
    BATCH_WRITES_MAX,
    WRITE_BYTES_MAX,
    BatchCompletion,
    Completion,
    OnBatchCompletion,
    OnCompletion,
    Write,
    WriteBatch,
    WriteStatus,
)

QUEUED_WRITES_MAX = 1 << 16
RETRY_AFTER_S = 0.05
_STALE_DEADLINES = 1024
"""Deadlines of completed writes behind one that waits, before they are swept out."""
_TAG_LIMIT = 1 << 64
NONE_REFUSED: Mapping[int, str] = MappingProxyType({})

_log = logging.getLogger(__name__)


def check_write(write: Write) -> None:
    """Raise InvalidRequest, naming the value, unless `write` could be carried out."""
    nbytes = write.source_slices.nbytes
    if nbytes != write.target_slices.nbytes:
        raise InvalidRequest(
            f"source has {nbytes} bytes and target {write.target_slices.nbytes}; they must agree"
        )
    if not 1 <= nbytes <= WRITE_BYTES_MAX:
        raise InvalidRequest(f"a write has 1 to {WRITE_BYTES_MAX} bytes, not {nbytes}; split it")
    if write.source_slices.end > write.source.nbytes:
        raise InvalidRequest(
            f"source slices end at {write.source_slices.end}, the region has "
            f"{write.source.nbytes} bytes"
        )
    window, target = write.target, write.target_slices
    if target.start < window.offset or target.end > window.offset + window.nbytes:
        raise InvalidRequest(
            f"target slices [{target.start}, {target.end}) are outside of the window "
            f"[{window.offset}, {window.offset + window.nbytes})"
        )
    if not 0 <= write.tag < _TAG_LIMIT:
        raise InvalidRequest(f"tag {write.tag} does not fit into 64 bits")
    if not math.isfinite(write.deadline_s):
        raise InvalidRequest(f"a write needs a finite deadline, not {write.deadline_s} s")


def check_batch(batch: WriteBatch) -> None:
    """As `check_write`."""
    source, target, window = batch.source_table, batch.target_table, batch.target
    if source.sizes != target.sizes:
        raise InvalidRequest("the parts of source and target must have as many bytes each")
    if len(target) > BATCH_WRITES_MAX or target.size_min < 1 or target.nbytes > WRITE_BYTES_MAX:
        raise InvalidRequest(
            f"a batch has 1 to {BATCH_WRITES_MAX} writes, none of them empty, and at most "
            f"{WRITE_BYTES_MAX} bytes, not {len(target)} with {target.nbytes}; split it"
        )
    source_end = source.span()[1]
    if source_end > batch.source.nbytes:
        raise InvalidRequest(
            f"source slices end at {source_end}, the region has {batch.source.nbytes} bytes"
        )
    start, end = target.span()
    if start < window.offset or end > window.offset + window.nbytes:
        raise InvalidRequest(
            f"target slices [{start}, {end}) are outside of the window "
            f"[{window.offset}, {window.offset + window.nbytes})"
        )
    if batch.first_tag < 0 or batch.first_tag + len(target) > _TAG_LIMIT:
        raise InvalidRequest(f"tags from {batch.first_tag} on do not fit into 64 bits")
    if not math.isfinite(batch.deadline_s):
        raise InvalidRequest(f"a write needs a finite deadline, not {batch.deadline_s} s")


class PendingWrite:
    """A write, or a batch, that has no completion yet. `sent` bytes of it were taken to be sent;
    once it is `gone`, nothing of its source will be read any more."""

    __slots__ = (
        "deadline",
        "gone",
        "ident",
        "nbytes",
        "on_completion",
        "reader",
        "sent",
        "truncate_at",
        "write",
    )

    def __init__(
        self,
        ident: int,
        write: Write | WriteBatch,
        nbytes: int,
        on_completion: OnCompletion | OnBatchCompletion,
        deadline: float,
    ) -> None:
        self.ident = ident
        self.write = write
        self.on_completion = on_completion
        self.deadline = deadline
        self.nbytes = nbytes
        self.reader = TableReader(write.source_table) if isinstance(write, WriteBatch) else None
        self.sent = 0
        self.gone = False
        self.truncate_at = -1

    @property
    def single(self) -> Write:
        """The write, which must not be a batch."""
        assert isinstance(self.write, Write)
        return self.write


@dataclass(frozen=True, slots=True)
class Fragment:
    """The next bytes to send: [offset, offset + nbytes) of a pending write."""

    pending: PendingWrite
    offset: int
    nbytes: int


class Outbox:
    """Pending writes of one stream to a peer. Times are seconds of one monotonic clock.

    With `shared`, which the outboxes of the peer's other streams have too, order and bound hold
    over all of them."""

    def __init__(self, peer: str, queue_bytes_max: int, shared: PeerLanes | None = None) -> None:
        self.peer = peer
        self._shared = shared or PeerLanes()
        self._queue_bytes_max = queue_bytes_max
        self._lanes: LaneQueue[PendingWrite] = LaneQueue(self._shared)
        self._pending: dict[int, PendingWrite] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._next_ident = 1

    @property
    def queued_bytes(self) -> int:
        """Bytes without a completion of the peer, by all of its streams."""
        return self._shared.queued_bytes

    @property
    def waiting(self) -> bool:
        """Whether there is anything to send now."""
        return self._lanes.next_lane() is not None

    def add(self, write: Write, on_completion: OnCompletion, now: float) -> PendingWrite:
        """Queue a checked write; raises Overloaded if the peer has too much waiting."""
        return self._add(write, write.source_slices.nbytes, on_completion, now)

    def add_batch(
        self, batch: WriteBatch, on_completion: OnBatchCompletion, now: float
    ) -> PendingWrite:
        """As `add`."""
        return self._add(batch, batch.source_table.nbytes, on_completion, now)

    def _add(
        self,
        write: Write | WriteBatch,
        nbytes: int,
        on_completion: OnCompletion | OnBatchCompletion,
        now: float,
    ) -> PendingWrite:
        if self.queued_bytes + nbytes > self._queue_bytes_max:
            raise Overloaded(
                f"{self.queued_bytes} bytes wait for {self.peer!r}; {nbytes} more exceed the "
                f"limit of {self._queue_bytes_max}",
                retry_after_s=RETRY_AFTER_S,
            )
        if len(self._pending) >= QUEUED_WRITES_MAX:
            raise Overloaded(
                f"{QUEUED_WRITES_MAX} writes wait for {self.peer!r}", retry_after_s=RETRY_AFTER_S
            )
        deadline = now + write.deadline_s
        pending = PendingWrite(self._next_ident, write, nbytes, on_completion, deadline)
        self._next_ident += 1
        self._pending[pending.ident] = pending
        self._lanes.push(write.lane, pending)
        heapq.heappush(self._deadlines, (pending.deadline, pending.ident))
        if len(self._deadlines) > 2 * len(self._pending) + _STALE_DEADLINES:
            self._deadlines = [each for each in self._deadlines if each[1] in self._pending]
            heapq.heapify(self._deadlines)
        self._shared.queued_bytes += nbytes
        return pending

    def next_fragment(self, nbytes_max: int) -> Fragment | None:
        """Take the next bytes to send, at most `nbytes_max`."""
        lane = self._lanes.next_lane()
        if lane is None:
            return None
        pending = self._lanes.head(lane)
        offset = pending.sent
        nbytes = min(nbytes_max, pending.nbytes - offset)
        pending.sent += nbytes
        if pending.sent == pending.nbytes:
            self._lanes.pop(lane)
        self._lanes.charge(lane, nbytes)
        return Fragment(pending, offset, nbytes)

    def find(self, ident: int) -> PendingWrite | None:
        """The write, if it has no completion yet."""
        return self._pending.get(ident)

    def has(self, ident: int) -> bool:
        """Whether the write has no completion yet."""
        return ident in self._pending

    def sources_of(self, idents: Iterable[int]) -> frozenset[int]:
        """The serials of the regions that these writes read."""
        found = (self._pending.get(ident) for ident in idents)
        return frozenset(each.write.source.serial for each in found if each is not None)

    def settle(self, ident: int) -> PendingWrite | None:
        """Take the write out, if it has no completion yet."""
        pending = self._pending.pop(ident, None)
        if pending is not None:
            self._shared.queued_bytes -= pending.nbytes
            if pending.sent < pending.nbytes:
                self._lanes.remove(pending.write.lane, pending)
        return pending

    def expire(self, now: float) -> list[PendingWrite]:
        """Take out the writes whose deadline has passed."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, ident = heapq.heappop(self._deadlines)
            pending = self.settle(ident)
            if pending is not None:
                expired.append(pending)
        return expired

    def next_deadline(self) -> float | None:
        """The earliest deadline of a pending write."""
        while self._deadlines and self._deadlines[0][1] not in self._pending:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def drain(self) -> list[PendingWrite]:
        """Take out everything."""
        pending = list(self._pending.values())
        self._pending.clear()
        self._lanes.clear()
        self._deadlines.clear()
        self._shared.queued_bytes -= sum(each.nbytes for each in pending)
        return pending

    def __len__(self) -> int:
        return len(self._pending)


def deliver(
    peer: str,
    pending: PendingWrite,
    status: WriteStatus,
    detail: str = "",
    refused: Mapping[int, str] = NONE_REFUSED,
) -> None:
    """Hand the completion of a settled write to its owner. `refused` is a batch's, by tag."""
    write = pending.write
    call: Callable[[], None]
    if isinstance(write, WriteBatch):
        told = BatchCompletion(peer, write.first_tag, status, refused, detail)
        call = partial(cast(OnBatchCompletion, pending.on_completion), told)
        tag = write.first_tag
    else:
        single = Completion(peer, write.tag, status, pending.nbytes, detail)
        call = partial(cast(OnCompletion, pending.on_completion), single)
        tag = write.tag
    try:
        call()
    except Exception:  # noqa: BLE001 - a callback of others
        _log.exception("on_completion of tag %d raised", tag)
