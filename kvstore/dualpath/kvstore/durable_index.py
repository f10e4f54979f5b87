"""The durable facts: one CRC'd record a block, in LMDB.

Key: namespace id (16 bytes), then hash. Value: `BlockRecord.to_bytes`. Private to the process
that holds the data directory's lock. Read once at opening; written by one thread. `apply` is one
transaction: after it has returned its changes survive power loss, before that none of them is
visible. The sums of all records (index_sums.py) change with each transaction and are checked
whenever all records are read; an index that has none yet gets them then. They also say up to which
generation of the store it tells everything: later blocks are known by their headers. After an error
the environment is opened anew, because LMDB refuses everything after some. After an unclean stop
`Probe` tries it in a child process first, because a damaged map can kill its reader.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import lmdb
from dualpath.kvstore.index_sums import SUMS_KEY, IndexSums, is_record_key
from dualpath.kvstore.psync_device import sync_directory
from dualpath.kvstore.record import BlockRecord
from dualpath.transfer.errors import Corrupt

_MAP_BYTES_MIN = 64 << 20
_MAP_BYTES_MAX = 1 << 40
_PROBE_S_MAX = 120.0
_PROBE = (
    "import sys, lmdb\n"
    "env = lmdb.open(sys.argv[1], map_size=int(sys.argv[2]), lock=False, create=False)\n"
    "with env.begin() as txn:\n"
    "    sum(len(k) + len(v) for k, v in txn.cursor())\n"
    "with env.begin(write=True) as txn:\n"
    "    txn.put(b'probe', b'')\n"
    "with env.begin(write=True) as txn:\n"
    "    txn.delete(b'probe')\n"
    "env.close()\n"
)


class IndexFailure(OSError):
    """A transaction could not be committed: the medium or the map refused it."""


class DurableIndex:
    """See the module docstring."""

    def __init__(self, path: Path) -> None:
        data = path / "data.mdb"
        is_new = not data.exists()
        size = 0 if is_new else data.stat().st_size
        if not (is_new or (size and data.is_file())):
            # LMDB would make an empty one of it, as if nothing had ever been stored.
            raise Corrupt(f"{data} is empty or no file")
        self._map_bytes = max(_MAP_BYTES_MIN, 2 * size)
        self._turn = threading.Lock()
        self._path = path
        try:
            if is_new:
                _create(path)
            self._env = self._open()
        except lmdb.Error as error:
            raise Corrupt(f"the index {path} cannot be opened: {error}") from error
        try:
            self._sums = self._read_sums()
        except (lmdb.Error, Corrupt) as error:
            self._env.close()
            raise Corrupt(f"the index {path} cannot be opened: {error}") from error

    def _open(self) -> lmdb.Environment:
        return lmdb.open(
            str(self._path), map_size=self._map_bytes, lock=False, max_dbs=0, mode=0o600
        )

    def _read_sums(self) -> IndexSums | None:
        """None if the index is not empty and has none: an older format's. Raises Corrupt."""
        with self._env.begin() as txn:
            value = txn.get(SUMS_KEY)
            if value is None:
                return None if txn.stat()["entries"] else IndexSums()
        sums = IndexSums.from_bytes(value)
        if sums is None:
            raise Corrupt("its sums are damaged")
        return sums

    def records(self) -> Iterator[tuple[bytes, bytes]]:
        """All (key, value). Raises Corrupt, at the end also if these are not all."""
        found = IndexSums()
        try:
            with self._env.begin(buffers=False) as txn:
                for key, value in txn.cursor():
                    if is_record_key(key):
                        found.add(value)
                        yield key, value
        except lmdb.Error as error:
            raise Corrupt(f"the index cannot be read: {error}") from error
        if self._sums is None:
            self._sums = found
            with contextlib.suppress(IndexFailure):  # the next transaction brings them along
                self.apply([], [])
        elif not self._sums.holds(found):
            raise Corrupt(
                f"the index holds {found.records} records, not the {self._sums.records} that were "
                "committed"
            )

    def page(self, start: bytes, most: int) -> list[tuple[bytes, bytes]]:
        """At most `most` (key, value) from key `start` on, in order; beside the thread that writes.
        Raises Corrupt."""
        found: list[tuple[bytes, bytes]] = []
        try:
            # Without LMDB's own locks a writer may reuse pages under a reader.
            with self._turn, self._env.begin() as txn, txn.cursor() as cursor:
                if cursor.set_range(start):
                    for key, value in cursor:
                        if is_record_key(key):
                            found.append((key, value))
                        if len(found) == most:
                            break
        except lmdb.Error as error:
            raise Corrupt(f"the index cannot be read: {error}") from error
        return found

    @property
    def last_txn(self) -> int:
        """Number of the last committed transaction."""
        return int(self._env.info()["last_txnid"])

    @property
    def generation(self) -> int | None:
        """It tells of all blocks up to this generation; None: of all (up to format 2)."""
        return None if self._sums is None else self._sums.generation

    def apply(
        self,
        deletes: Sequence[tuple[bytes, int]],
        puts: Sequence[tuple[bytes, bytes]],
        generation: int | None = None,
    ) -> None:
        """Delete (key, generation) where the stored generation is that one, then put; durable on
        return. With `generation` it reaches so far then. Raises IndexFailure, having changed
        nothing."""
        reopened = False
        while True:
            try:
                self._apply(deletes, puts, generation)
            except lmdb.MapFullError as error:
                if self._map_bytes >= _MAP_BYTES_MAX:
                    raise IndexFailure(f"the index is full: {error}") from error
                self._map_bytes *= 2
                with self._turn:
                    self._env.set_mapsize(self._map_bytes)
            except lmdb.Error as error:
                self._reopen()
                if not reopened:
                    reopened = True
                    continue
                raise IndexFailure(f"the index refused a transaction: {error}") from error
            else:
                return

    def _apply(
        self,
        deletes: Sequence[tuple[bytes, int]],
        puts: Sequence[tuple[bytes, bytes]],
        generation: int | None,
    ) -> None:
        sums = None if self._sums is None else self._sums.copy()
        if sums is not None and generation is not None:
            sums.generation = generation
        with self._turn, self._env.begin(write=True) as txn:
            for key, born in deletes:
                value = txn.get(key)
                if value is not None and _goes(value, born):
                    txn.delete(key)
                    if sums is not None:
                        sums.remove(value)
            for key, value in puts:
                before = txn.replace(key, value)
                if sums is not None:
                    sums.add(value)
                    if before is not None:
                        sums.remove(before)
            if sums is not None:
                txn.put(SUMS_KEY, sums.to_bytes())
        self._sums = sums

    def _reopen(self) -> None:
        """Begin anew after an error: what was committed is there, the rest is not. If even that
        fails, the next transaction fails too, and tries again."""
        with self._turn, contextlib.suppress(lmdb.Error, Corrupt):
            self._env.close()
            self._env = self._open()
            self._sums = self._read_sums() or self._sums

    def close(self) -> None:
        """Close the environment."""
        self._env.close()


def _create(path: Path) -> None:
    """An empty index that is there whole or not at all: LMDB writes its first pages without a
    sync, and syncs no names."""
    new = path / "data.mdb.new"
    new.unlink(missing_ok=True)
    with (
        lmdb.open(str(new), map_size=_MAP_BYTES_MIN, lock=False, subdir=False, mode=0o600) as env,
        env.begin(write=True) as txn,
    ):
        txn.put(SUMS_KEY, IndexSums(generation=0).to_bytes())
    new.rename(path / "data.mdb")
    sync_directory(path)


def _goes(value: bytes, generation: int) -> bool:
    """Whether a delete for `generation` (-1: any) means this record."""
    if generation < 0:
        return True
    try:
        return BlockRecord.from_bytes(value).generation == generation
    except Corrupt:
        return True


class Probe:
    """Walks the whole index and writes to it, in a child process that starts at once; nobody may
    open the index until `passed` or `close` has returned."""

    def __init__(self, path: Path) -> None:
        data = path / "data.mdb"
        self._child: subprocess.Popen[bytes] | None = None
        # An empty one is refused by DurableIndex; the child would make a good one of it.
        self._needed = data.is_file() and data.stat().st_size > 0
        if self._needed:
            map_bytes = max(_MAP_BYTES_MIN, 2 * data.stat().st_size)
            # If even a process cannot be had, the index counts as bad.
            with contextlib.suppress(OSError):
                self._child = subprocess.Popen(
                    [sys.executable, "-c", _PROBE, str(path), str(map_bytes)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )

    def passed(self) -> bool:
        """Wait for it; False if it failed, crashed or hung."""
        if self._child is None:
            return not self._needed
        try:
            return self._child.wait(_PROBE_S_MAX) == 0
        except subprocess.TimeoutExpired:
            return False

    def close(self) -> None:
        """End it, if it still runs."""
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.wait()
