"""The data directory: lock, format, clean flag, and the namespaces.

    META           product, format version, id; refused by name if newer
    LOCK           flock of the one process that uses the directory
    CLEAN          present while nobody uses it after a clean shutdown
    namespaces/    one JSON file a namespace, named by the id, which is the hash of its content
    namespaces.copy/  the same again (namespace_files.py)
    index/         LMDB (durable_index.py)
    index.snapshot what the index held at the clean shutdown (index_snapshot.py)
    segments/      segment files (ssd_tier.py)

The formats of the small files are in directory_format.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

from dualpath.kvstore import directory_format
from dualpath.kvstore.directory_format import (
    ASIDE_MAX,
    RETAINED_NAME,
    STORE_FORMAT,
    CleanStamp,
    Meta,
    stamp_index,
)
from dualpath.kvstore.index_snapshot import SNAPSHOT_NAME
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.namespace_files import COPIES_NAME, NAMESPACES_NAME, NamespaceFiles
from dualpath.kvstore.psync_device import sync_directory
from dualpath.transfer.errors import Corrupt, InvalidRequest, Unavailable

_log = logging.getLogger(__name__)


class DataDirectory:
    """A locked data directory. `was_clean` tells how the last process left it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.troubles: list[str] = []
        """A sentence for each thing that was found damaged or gone, besides the index."""
        self._namespaces = NamespaceFiles(self.path)
        try:
            self._open()
        except OSError as error:
            raise InvalidRequest(
                f"cannot use {self.path} as data directory: {error.filename or self.path}: "
                f"{error.strerror}; make it a directory that this user may write to, on a medium "
                "that is not mounted read-only, or choose another"
            ) from error

    def _open(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (self.path / "LOCK").exists():
            # What is not ours is refused without a trace.
            self._refuse_foreign()
        self._lock = _locked(self.path)
        try:
            meta = self._check_meta()
            self.store_id, self._version = meta.store_id, meta.version
            self._make_folders()
            self.snapshot_crc: int | None = None
            """Which snapshot the clean shutdown left, if any."""
            self.was_clean = self._take_clean()
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def index_path(self) -> Path:
        """Folder of the LMDB environment."""
        return self.path / "index"

    @property
    def snapshot_path(self) -> Path:
        """Where the snapshot of the index lies (index_snapshot.py)."""
        return self.path / SNAPSHOT_NAME

    @property
    def segments_path(self) -> Path:
        """Folder of the segment files."""
        return self.path / "segments"

    def _make_folders(self) -> None:
        """Durably, together with what a killed process may have left in them unsynced: a file
        that is merely seen may be gone after a loss of power."""
        names = (NAMESPACES_NAME, COPIES_NAME)
        folders = (*(self.path / name for name in names), self.index_path, self.segments_path)
        for folder in folders:
            folder.mkdir(exist_ok=True, mode=0o700)
        for folder in (*folders, self.path, self.path.resolve().parent):
            sync_directory(folder)

    def namespaces(self) -> list[Namespace]:
        """All namespaces that are known. What is wrong with their files is added to `troubles`;
        blocks of those that are lost will be dropped."""
        found, troubles = self._namespaces.open()
        self.troubles += troubles
        return found

    def save_namespace(self, namespace: Namespace) -> None:
        """Make a namespace durable. Idempotent. Raises OSError."""
        self._namespaces.save(namespace)

    def remove_namespaces(self, namespace_ids: Iterable[bytes]) -> None:
        """Forget namespaces that hold nothing; they become durable again with their next seal."""
        self._namespaces.remove(namespace_ids)

    def set_index_aside(self) -> None:
        """Keep a damaged index for a look later; start an empty one."""
        directory_format.set_aside(self.path, self.index_path, keep=ASIDE_MAX)
        self.index_path.mkdir(mode=0o700)
        sync_directory(self.path)

    def mark_clean(self, snapshot_crc: int | None = None) -> None:
        """Record a clean shutdown, with what the index file looks like and which snapshot, if
        any, belongs to it."""
        directory_format.write_clean(self.path, CleanStamp(stamp_index(self.path), snapshot_crc))

    def bring_up_to_date(self) -> None:
        """The store has taken in everything of an older format: name the present one."""
        if self._version == STORE_FORMAT:
            return
        try:
            directory_format.write_meta(self.path, Meta(STORE_FORMAT, self.store_id))
        except OSError as error:
            _log.warning("%s stays in format %d: %s", self.path, self._version, error)
            return
        _log.warning(
            "%s has format %d now, not %d: older versions refuse it",
            self.path,
            STORE_FORMAT,
            self._version,
        )
        self._version = STORE_FORMAT

    def close(self) -> None:
        """Release the lock."""
        os.close(self._lock)

    def _take_clean(self) -> bool:
        """Read and remove the clean flag; true only if the index is, byte for byte, as it was
        left."""
        path = self.path / "CLEAN"
        for file in (path, self.snapshot_path, self.path / RETAINED_NAME):
            if file.is_dir():
                kept = directory_format.set_aside(self.path, file, keep=ASIDE_MAX)
                _log.warning("%s is a directory, and put aside as %s", file, kept)
        if not path.exists():
            return not (self.index_path / "data.mdb").exists()
        try:
            stamp = directory_format.read_clean(self.path)
        except Corrupt as error:
            _log.warning("%s; the index is read instead", error)
            stamp = None
        path.unlink()
        sync_directory(self.path)
        if stamp is None or stamp.index != stamp_index(self.path):
            return False
        self.snapshot_crc = stamp.snapshot_crc
        return True

    def _check_meta(self) -> Meta:
        exists = (self.path / "META").exists()
        return directory_format.read_meta(self.path) if exists else self._create_meta()

    def _refuse_foreign(self) -> None:
        """Raises Corrupt, InvalidRequest if there is something that is no data directory."""
        if (self.path / "META").exists():
            directory_format.read_meta(self.path)
            return
        others = sorted(p.name for p in self.path.iterdir() if p.name not in ("LOCK", "META.new"))
        if len({"index", NAMESPACES_NAME, "segments"}.intersection(others)) > 1:
            raise InvalidRequest(
                f"{self.path} has lost its META: restore it, or let `dualpath fsck --repair "
                f"{self.path}` make a new one"
            )
        if others:
            raise InvalidRequest(
                f"{self.path} has no META but holds {', '.join(others[:5])}; choose an empty "
                "directory, or restore META"
            )

    def _create_meta(self) -> Meta:
        self._refuse_foreign()
        meta = Meta(STORE_FORMAT, uuid.uuid4().hex)
        directory_format.write_meta(self.path, meta)
        return meta


def read_store_id(path: Path) -> str:
    """The id in the META of a data directory; also of one that another process uses. Raises
    Corrupt, or InvalidRequest for a newer format."""
    return directory_format.read_meta(path).store_id


def _locked(path: Path) -> int:
    """Take the directory's lock. Raises Unavailable, naming the process that has it."""
    fd = os.open(path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise Unavailable(
            f"data directory {path} is in use by process {holder}; "
            "stop it or use another directory",
            reason="locked",
        ) from error
    with contextlib.suppress(OSError):  # a full disk: the number is for people only
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
