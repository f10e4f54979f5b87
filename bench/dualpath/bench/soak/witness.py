"""What a store has promised, noted by a witness inside its process at the moment it happens.

A note is a byte and a key (namespace id, then hash): `+` visible, `-` gone, `D` durable, `~` handed
to the committer, so that a crash may leave it there unseen, `X` invalidated for good; `!` and `=`,
without a key, enclose the `+` of what an opening has found. Notes leave the process at once,
through `note`, which must survive the process; so that after a crash it is known what must be
there. `-` is noted under the store's lock before the durable record is deleted, and `D` after the
commit, while the block is still there and before anybody hears that it is durable; so a note is
never later than what it forbids.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from dualpath.kvstore.block_store import BlockStore
from dualpath.kvstore.block_table import RowState
from dualpath.kvstore.commit_job import CommitJob
from dualpath.kvstore.store_api import MissReason, SealStatus

Note = Callable[[bytes], None]


class Witness:
    """Attached to one open store, before anybody uses it."""

    def __init__(self, store: BlockStore, note: Note) -> None:
        self._note = note
        self._lock = threading.Lock()
        self._visible: set[bytes] = set()
        self._turn = 0
        self._came: dict[bytes, int] = {}
        self._storing: Counter[bytes] = Counter()
        """What is on its way into the store."""
        self._note_found(store)
        self._watch(store)

    def _note_found(self, store: BlockStore) -> None:
        state = store._state
        with state.lock:
            rows = np.flatnonzero(state.table.state == RowState.PRESENT).tolist()
            found = [state.catalog.key_of(row) for row in rows]
        self._note(b"!")
        for key in found:
            self._visible.add(key)
            self._note(b"+" + key)
        self._note(b"=")

    def _watch(self, store: BlockStore) -> None:
        note = self._note
        events = store.events
        stored, removed, cleared = events.stored, events.removed, events.cleared
        settle = store._writer._settle
        committer = store._writer._committer
        assert committer is not None
        submit = committer.submit

        def on_submitted(jobs: Sequence[CommitJob]) -> None:
            for job in jobs:
                note(b"~" + job.record.key)
            submit(jobs)

        def on_stored(namespace_id: bytes, block_hash: bytes, parent: bytes) -> None:
            with self._lock:
                self._turn += 1
                key = namespace_id + block_hash
                self._came[key] = self._turn
                self._visible.add(key)
                note(b"+" + key)
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
        committer.submit = on_submitted  # type: ignore[method-assign]

    @contextmanager
    def storing(self, keys: Collection[bytes]) -> Iterator[None]:
        """These blocks are being stored: what is invalidated meanwhile may stay or come."""
        with self._lock:
            self._storing.update(keys)
        try:
            yield
        finally:
            with self._lock:
                self._storing.subtract(keys)

    def durable(self, keys: Iterable[bytes]) -> None:
        """These blocks were acknowledged as durable; those that are gone again do not count."""
        with self._lock:
            for key in keys:
                if key in self._visible:
                    self._note(b"D" + key)

    @contextmanager
    def invalidating(self, keys: Collection[bytes]) -> Iterator[None]:
        """These are being invalidated, and all but those that came meanwhile are gone for good
        unless it fails."""
        with self._lock:
            turn = self._turn
        yield
        with self._lock:
            for key in keys:
                came = key in self._visible or self._came.get(key, 0) > turn
                if not came and not self._storing[key]:
                    self._note(b"X" + key)


class Claims:
    """What must be there after all notes so far."""

    def __init__(self) -> None:
        self.visible: set[bytes] = set()
        self.durable: set[bytes] = set()
        self.invalidated: set[bytes] = set()
        """What must not come back."""
        self.acknowledged = 0
        self._opening = False
        self.broken: list[str] = []
        """What an opening has lost, or brought back."""

    def follow(self, notes: Iterable[bytes]) -> None:
        """Take notes in, in their order."""
        for note in notes:
            kind, key = note[:1], note[1:]
            if kind == b"+":
                self.visible.add(key)
                if not self._opening:
                    self.invalidated.discard(key)
            elif kind == b"-":
                self.visible.discard(key)
                self.durable.discard(key)
            elif kind == b"D":
                self.durable.add(key)
                self.acknowledged += 1
            elif kind == b"~":
                self.invalidated.discard(key)
            elif kind == b"X":
                self.invalidated.add(key)
            elif kind == b"!":
                self.visible.clear()
                self._opening = True
            elif kind == b"=":
                self._opening = False
                self._opened()

    def _opened(self) -> None:
        if lost := self.durable - self.visible:
            self.broken.append(f"{len(lost)} durable blocks were gone at an opening")
        if back := self.invalidated & self.visible:
            self.broken.append(f"{len(back)} invalidated blocks were back at an opening")

    def copy(self) -> Claims:
        """A copy that goes its own way."""
        other = Claims()
        other.visible, other.durable = set(self.visible), set(self.durable)
        other.invalidated, other.broken = set(self.invalidated), list(self.broken)
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
