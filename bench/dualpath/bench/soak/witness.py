"""What a store has promised, noted by a witness inside its process at the moment it happens.

A note is a byte and a key (namespace id, then hash): `+` visible, `-` gone, `D` durable. Notes
leave the process at once, through `note`, which must survive the process; so that after a crash
it is known what must be there. `-` is noted under the store's lock before the durable record is
deleted, and `D` after the commit, while the block is still there and before anybody hears that it
is durable; so a note is never later than what it forbids.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable

from dualpath.kvstore.block_store import BlockStore
from dualpath.kvstore.commit_job import CommitJob
from dualpath.kvstore.store_api import MissReason, SealStatus

Note = Callable[[bytes], None]


class Witness:
    """Attached to one open store."""

    def __init__(self, store: BlockStore, note: Note) -> None:
        self._note = note
        self._lock = threading.Lock()
        self._visible: set[bytes] = set()
        events = store.events
        stored, removed, cleared = events.stored, events.removed, events.cleared
        settle = store._writer._settle

        def on_stored(namespace_id: bytes, block_hash: bytes, parent: bytes) -> None:
            with self._lock:
                self._visible.add(namespace_id + block_hash)
                note(b"+" + namespace_id + block_hash)
            stored(namespace_id, block_hash, parent)

        def on_removed(
            namespace_id: bytes, block_hash: bytes, parent: bytes, reason: MissReason
        ) -> None:
            with self._lock:
                self._visible.discard(namespace_id + block_hash)
                note(b"-" + namespace_id + block_hash)
            removed(namespace_id, block_hash, parent, reason)

        def on_cleared(namespace_id: bytes, reason: MissReason) -> None:
            with self._lock:
                gone = [key for key in self._visible if key.startswith(namespace_id)]
                self._visible.difference_update(gone)
                for key in gone:
                    note(b"-" + key)
            cleared(namespace_id, reason)

        def on_settled(job: CommitJob) -> SealStatus:
            # Under the store's lock: before anybody can hear of it.
            status = settle(job)
            if status is SealStatus.SEALED:
                self.durable([job.record.key])
            return status

        events.stored = on_stored  # type: ignore[method-assign]
        events.removed = on_removed  # type: ignore[method-assign]
        events.cleared = on_cleared  # type: ignore[method-assign]
        store._writer._settle = on_settled  # type: ignore[method-assign]

    def durable(self, keys: Iterable[bytes]) -> None:
        """These blocks were acknowledged as durable; those that are gone again do not count."""
        with self._lock:
            for key in keys:
                if key in self._visible:
                    self._note(b"D" + key)


class Claims:
    """What must be there after all notes so far."""

    def __init__(self) -> None:
        self.visible: set[bytes] = set()
        self.durable: set[bytes] = set()
        self.acknowledged = 0

    def follow(self, notes: Iterable[bytes]) -> None:
        """Take notes in, in their order."""
        for note in notes:
            kind, key = note[:1], note[1:]
            if kind == b"+":
                self.visible.add(key)
            elif kind == b"-":
                self.visible.discard(key)
                self.durable.discard(key)
            elif kind == b"D":
                self.durable.add(key)
                self.acknowledged += 1

    def copy(self) -> Claims:
        """A copy that goes its own way."""
        other = Claims()
        other.visible, other.durable = set(self.visible), set(self.durable)
        other.acknowledged = self.acknowledged
        return other

    def restart(self, present: Iterable[bytes]) -> None:
        """The store was opened again and holds exactly these, all of them durable."""
        self.visible = set(present)
        self.durable = set(self.visible)


def read_notes(raw: bytes) -> list[bytes]:
    """Notes from a file of lines in hex; a last one that is cut is left out."""
    whole = raw[: raw.rfind(b"\n") + 1]
    return [bytes.fromhex(line.decode()) for line in whole.splitlines()]


def write_note(fd: int, note: bytes) -> None:
    """Append a note as a line to a file opened with O_APPEND; it survives the process."""
    os.write(fd, note.hex().encode() + b"\n")
