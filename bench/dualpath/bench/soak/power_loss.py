"""What a loss of power may leave of a directory, from a recording of what was done to it.

`PowerLoss` follows the changes and knows, at each moment, what is durable and what is not:

- Bytes of a file are durable once an fsync or fdatasync of that file has returned after they were
  written, or at once through a descriptor with O_SYNC or O_DSYNC. Until then each 512-byte sector
  is, independently, any of its versions since the last sync: writes are lost, torn and reordered.
- The size of a file likewise: the durable one or any later one; sectors that were not written are
  zero.
- Names (made, renamed, removed) are durable once their directory has been synced. Until then, of
  each directory, some first part of the changes has happened, as in a journal. A rename is atomic.
  Syncing a new file does not make its name durable: POSIX does not promise it.
- After a sync that failed, later ones promise nothing about what was written before it, unless it
  is written again: that is how Linux tells of pages that it could not write.
- A sector is written whole or not at all, which disks promise and LMDB counts on.

Not modelled: sectors that decay although they were synced, and disks that lie about a flush.
"""

from __future__ import annotations

import enum
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dualpath.bench.soak.recording import Change, Record

SECTOR_BYTES = 512


class PowerLossError(Exception):
    """The recording holds something that the model cannot follow."""


class Mood(enum.Enum):
    """How much of what was in doubt is lost."""

    ALL = "all"
    NOTHING = "nothing"
    SECTORS = "sectors"
    """Each sector by itself, one of its versions."""
    RUNS = "runs"
    """Runs of neighbouring sectors share their fate: whole writes are lost or torn once."""


@dataclass(slots=True)
class _Object:
    """A file: what is durable, what a reader would see, and the versions in between."""

    durable: bytearray
    seen: bytearray
    doubtful: dict[int, list[bytes]] = field(default_factory=dict)
    given_up: dict[int, list[bytes]] = field(default_factory=dict)
    """Versions from before a sync that failed, of sectors not written and synced since."""
    sizes: list[int] = field(default_factory=list)
    cut_short: bool = False
    """Since the last sync: what came after is zero again, or written anew."""

    def write(self, offset: int, data: bytes, *, at_once: bool) -> None:
        end = offset + len(data)
        if end > len(self.seen):
            self.resize(end)
        self.seen[offset:end] = data
        for sector in range(offset // SECTOR_BYTES, -(-end // SECTOR_BYTES)):
            start = sector * SECTOR_BYTES
            content = bytes(self.seen[start : start + SECTOR_BYTES])
            if at_once:
                self.doubtful.pop(sector, None)
                self.given_up.pop(sector, None)
                _put(self.durable, start, content)
            else:
                self.doubtful.setdefault(sector, []).append(content)
        if at_once and self.sizes:
            self._keep_size()

    def resize(self, size: int) -> None:
        if size < len(self.seen):
            for versions in (self.doubtful, self.given_up):
                for sector in [s for s in versions if s * SECTOR_BYTES >= size]:
                    del versions[sector]
            del self.seen[size:]
            self.cut_short = True
        else:
            self.seen.extend(bytes(size - len(self.seen)))
        self.sizes.append(size)

    def sync(self) -> None:
        if self.cut_short:
            self.durable[:] = self.seen
            self.cut_short = False
        for sector, versions in self.doubtful.items():
            _put(self.durable, sector * SECTOR_BYTES, versions[-1])
            self.given_up.pop(sector, None)
        self.doubtful.clear()
        self._keep_size()

    def fail_sync(self) -> None:
        for sector, versions in self.doubtful.items():
            self.given_up.setdefault(sector, []).extend(versions)
        self.doubtful.clear()

    def _keep_size(self) -> None:
        size = len(self.seen)
        if size < len(self.durable):
            del self.durable[size:]
        else:
            self.durable.extend(bytes(size - len(self.durable)))
        self.sizes.clear()

    def lose(self, dice: random.Random, mood: Mood) -> bytes:
        """One of the contents that a loss of power may leave."""
        if mood is Mood.NOTHING:
            return bytes(self.seen)
        if mood is Mood.ALL:
            return bytes(self.durable)
        sizes = [len(self.durable), *self.sizes]
        left = bytearray(self.durable)
        before, fate = -2, 0.0
        for sector in sorted(self.doubtful.keys() | self.given_up.keys()):
            if mood is Mood.SECTORS or sector != before + 1 or dice.random() < 0.1:
                fate = dice.random()
            before = sector
            versions = self.given_up.get(sector, []) + self.doubtful.get(sector, [])
            # 0 is the durable version, the others those since.
            chosen = int(fate * (len(versions) + 1))
            if chosen:
                _put(left, sector * SECTOR_BYTES, versions[chosen - 1])
        size = dice.choice(sizes)
        left.extend(bytes(max(0, size - len(left))))
        return bytes(left[:size])


def _put(target: bytearray, offset: int, content: bytes) -> None:
    if offset > len(target):
        target.extend(bytes(offset - len(target)))
    target[offset : offset + len(content)] = content


@dataclass(frozen=True, slots=True)
class _NameChange:
    """`name` now means `after` (an object, a directory, or None: nothing)."""

    names: tuple[tuple[str, _Object | str | None], ...]
    directories: frozenset[str]


_DIRECTORY = "directory"


class PowerLoss:
    """See the module docstring. `root` is read once: all of it counts as durable."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._names: dict[str, _Object | str] = {}
        self._doubtful: list[_NameChange] = []
        self._handles: dict[int, tuple[str, _Object | None, bool]] = {}
        self.notes: list[bytes] = []
        """What the recorded process said so far."""
        for path in sorted(root.rglob("*")):
            if path.is_dir():
                self._names[str(path)] = _DIRECTORY
            else:
                content = path.read_bytes()
                self._names[str(path)] = _Object(bytearray(content), bytearray(content))
        self._seen = dict(self._names)

    def follow(self, records: Iterable[Record]) -> None:
        """Take changes in. Raises PowerLossError."""
        for record in records:
            self._follow(record)

    def _follow(self, record: Record) -> None:
        match record.kind:
            case Change.OPENED:
                self._open(record)
            case Change.WRITTEN:
                self._file(record).write(record.a, record.data, at_once=bool(record.b))
            case Change.SIZED:
                file = self._file(record)
                if record.a != len(file.seen):
                    file.resize(record.a)
            case Change.SYNCED:
                self._sync(record)
            case Change.SYNC_FAILED:
                _, target, _ = self._handles[record.handle]
                if target is not None:  # a directory's names are in doubt as they were
                    target.fail_sync()
            case Change.RENAMED:
                before, after = (os.fsdecode(part) for part in record.data.split(b"\0"))
                self._rename(before, after)
            case Change.UNLINKED | Change.REMOVED_DIRECTORY:
                self._change((record.path, None))
            case Change.MADE_DIRECTORY:
                self._change((record.path, _DIRECTORY))
            case Change.NOTE:
                self.notes.append(record.data)
            case Change.UNKNOWN:
                raise PowerLossError(f"a call that the model does not know: {record.path}")

    def _open(self, record: Record) -> None:
        path, made = record.path, bool(record.b)
        if made:
            self._change((path, _Object(bytearray(), bytearray())))
        found = _DIRECTORY if path == self._root else self._seen.get(path)
        if found is None:
            raise PowerLossError(f"{path} was opened and never made")
        if isinstance(found, _Object) and record.a & os.O_TRUNC and found.seen:
            found.resize(0)
        target = found if isinstance(found, _Object) else None
        self._handles[record.handle] = (path, target, made)

    def _file(self, record: Record) -> _Object:
        path, target, _ = self._handles[record.handle]
        if target is None:
            raise PowerLossError(f"a write to the directory {path}")
        return target

    def _sync(self, record: Record) -> None:
        path, target, _ = self._handles[record.handle]
        if target is not None:
            target.sync()
            return
        for change in [c for c in self._doubtful if path in c.directories]:
            self._doubtful.remove(change)
            _apply(self._names, change)

    def _rename(self, before: str, after: str) -> None:
        moved = [(before, after)]
        prefix = before + "/"
        moved += [(n, after + n[len(before) :]) for n in self._seen if n.startswith(prefix)]
        names: list[tuple[str, _Object | str | None]] = []
        for old, new in moved:
            names += [(new, self._seen[old]), (old, None)]
        self._change(*names, directories=(before, after))

    def _change(
        self,
        *names: tuple[str, _Object | str | None],
        directories: tuple[str, ...] = (),
    ) -> None:
        parents = (str(PurePosixPath(path).parent) for path in directories or (names[0][0],))
        change = _NameChange(names, frozenset(parents))
        self._doubtful.append(change)
        _apply(self._seen, change)

    def lose(self, seed: int, target: Path, mood: Mood | None = None) -> Mood:
        """Write what one loss of power leaves into `target` (empty); return what it was like.
        The model is not changed: many losses may be tried at one moment."""
        dice = random.Random(seed)
        mood = mood or dice.choice(list(Mood))
        names = dict(self._names)
        until: dict[str, int] = {}
        done: dict[str, int] = {}
        for change in self._doubtful:
            for directory in change.directories:
                until[directory] = until.get(directory, 0) + 1
        for directory, count in sorted(until.items()):
            until[directory] = {Mood.ALL: 0, Mood.NOTHING: count}.get(mood, dice.randint(0, count))
        for change in self._doubtful:
            if all(done.get(d, 0) < until[d] for d in change.directories):
                _apply(names, change)
                for directory in change.directories:
                    done[directory] = done.get(directory, 0) + 1
            else:
                # A journal: nothing later of these directories happened either.
                for directory in change.directories:
                    until[directory] = min(until[directory], done.get(directory, 0))
        there = {self._root}
        for path in sorted(names):
            if str(PurePosixPath(path).parent) not in there:
                continue  # its directory never came to be
            where = target / PurePosixPath(path).relative_to(self._root)
            found = names[path]
            if isinstance(found, _Object):
                where.write_bytes(found.lose(dice, mood))
            else:
                where.mkdir(mode=0o700)
                there.add(path)
        return mood


def _apply(names: dict[str, _Object | str], change: _NameChange) -> None:
    for path, after in change.names:
        if after is None:
            names.pop(path, None)
        else:
            names[path] = after
