"""What became present and what left, as a bounded log with sequence numbers, for routers.

Owns a ring of packed records. The store calls `stored`, `removed` and `cleared` under its lock:
each costs a few microseconds, never blocks and never fails. Readers ask for what follows a
sequence number; what has been overwritten meanwhile is reported as lost, never silently skipped.
Sequence numbers begin at 1 and rise by 1; they are those of one opening of the store. Thread-safe.
"""

from __future__ import annotations

import enum
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from dualpath.kvstore.namespace import NAMESPACE_ID_BYTES
from dualpath.kvstore.store_api import HASH_BYTES_MAX, MissReason

CAPACITY_MIN = 16

_RECORD = struct.Struct(f"<BBBBd{NAMESPACE_ID_BYTES}s{HASH_BYTES_MAX}s{HASH_BYTES_MAX}s")
"""kind, reason, bytes of the hash, bytes of the parent, unix seconds, namespace, hash, parent."""
_REASONS = tuple(MissReason)
_REASON_NUMBERS = {reason: number for number, reason in enumerate(_REASONS)}


class EventKind(enum.IntEnum):
    """What happened."""

    STORED = 1
    """The block is visible to lookups from now on."""
    REMOVED = 2
    """The block left, for `reason`."""
    CLEARED = 3
    """Every block of the namespace left at once, for `reason`; there is no event for each."""


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """One event. `hash` and `parent` are b"" where there is none; `unix_s` is for people;
    `reason` is NONE for what was stored."""

    sequence: int
    kind: EventKind
    namespace_id: bytes
    hash: bytes
    parent: bytes
    reason: MissReason
    unix_s: float


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Answer of `read`. `lost` events between the one asked for and the first of these were
    overwritten before they were read; ask on with `last`."""

    events: tuple[BlockEvent, ...]
    last: int
    lost: int


class BlockEvents:
    """See the module docstring. `capacity` events are remembered; 0: none, all are lost."""

    def __init__(self, capacity: int) -> None:
        self._capacity = max(capacity, CAPACITY_MIN) if capacity else 0
        self._ring = bytearray(self._capacity * _RECORD.size)
        self._last = 0
        self._lock = threading.Lock()
        # Callbacks of readers that have read everything: called once, at the next event.
        self._waiting: list[Callable[[], None]] = []

    @property
    def capacity(self) -> int:
        """Events that are remembered."""
        return self._capacity

    @property
    def last(self) -> int:
        """Sequence number of the latest event, 0 before the first."""
        return self._last

    @property
    def first(self) -> int:
        """Sequence number of the oldest event that can still be read."""
        return max(1, self._last - self._capacity + 1)

    def stored(self, namespace_id: bytes, block_hash: bytes, parent: bytes) -> None:
        """A block became present; `parent` is b"" for the first of a chain."""
        self._note(EventKind.STORED, namespace_id, block_hash, parent, MissReason.NONE)

    def removed(
        self, namespace_id: bytes, block_hash: bytes, parent: bytes, reason: MissReason
    ) -> None:
        """A present block left."""
        self._note(EventKind.REMOVED, namespace_id, block_hash, parent, reason)

    def cleared(self, namespace_id: bytes, reason: MissReason) -> None:
        """All blocks of a namespace left at once: call this instead of `removed` for each."""
        self._note(EventKind.CLEARED, namespace_id, b"", b"", reason)

    def read(self, after: int, limit: int, namespace_id: bytes = b"") -> EventBatch:
        """Events that follow sequence number `after`, up to `limit` looked at; those of other
        namespaces than `namespace_id` (b"": all) are left out."""
        with self._lock:
            first = max(after + 1, self.first)
            end = min(self._last, first + limit - 1)
            size = _RECORD.size
            slots = [(number - 1) % self._capacity for number in range(first, end + 1)]
            raw = [bytes(self._ring[slot * size : (slot + 1) * size]) for slot in slots]
        events = tuple(
            event
            for number, record in enumerate(raw, first)
            if (event := _event(number, record)).namespace_id == namespace_id or not namespace_id
        )
        return EventBatch(events, max(end, first - 1), first - after - 1)

    def call_at_news(self, after: int, callback: Callable[[], None]) -> None:
        """Call `callback` once, as soon as there is an event after `after`: at once, or on the
        thread that brings it, under the store's lock. It must be quick and must not raise."""
        with self._lock:
            if self._last <= after:
                self._waiting.append(callback)
                return
        callback()

    def forget_callback(self, callback: Callable[[], None]) -> None:
        """Do not call it any more."""
        with self._lock:
            self._waiting = [each for each in self._waiting if each is not callback]

    def _note(
        self,
        kind: EventKind,
        namespace_id: bytes,
        block_hash: bytes,
        parent: bytes,
        reason: MissReason,
    ) -> None:
        with self._lock:
            if self._capacity:
                _RECORD.pack_into(
                    self._ring,
                    (self._last % self._capacity) * _RECORD.size,
                    kind,
                    _REASON_NUMBERS[reason],
                    len(block_hash),
                    len(parent),
                    time.time(),
                    namespace_id,
                    block_hash,
                    parent,
                )
            self._last += 1
            waiting, self._waiting = self._waiting, []
        for callback in waiting:
            callback()


def _event(sequence: int, record: bytes) -> BlockEvent:
    kind, reason, hash_len, parent_len, unix_s, namespace_id, block_hash, parent = _RECORD.unpack(
        record
    )
    return BlockEvent(
        sequence,
        EventKind(kind),
        namespace_id,
        block_hash[:hash_len],
        parent[:parent_len],
        _REASONS[reason],
        unix_s,
    )
