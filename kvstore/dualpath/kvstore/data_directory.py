"""The data directory: lock, format, clean flag, and the namespaces.

    META           product, format version, id; refused by name if newer
    LOCK           flock of the one process that uses the directory
    CLEAN          present while nobody uses it after a clean shutdown
    namespaces/    one JSON file a namespace, named by the id, which is the hash of its content
    index/         LMDB (durable_index.py)
    index.snapshot what the index held at the clean shutdown (index_snapshot.py)
    segments/      segment files (ssd_tier.py)

Everything here is written whole, synced and renamed into place.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import uuid
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from dualpath.kvstore.index_snapshot import SNAPSHOT_NAME
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.psync_device import sync_directory
from dualpath.transfer.errors import Corrupt, InvalidRequest, Unavailable

STORE_FORMAT = 1
_PRODUCT = "dualpath-store"
_log = logging.getLogger(__name__)


class DataDirectory:
    """A locked data directory. `was_clean` tells how the last process left it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise InvalidRequest(
                f"cannot use {self.path} as data directory: {error.strerror}; choose another"
            ) from error
        self._lock = _locked(self.path)
        try:
            self.store_id = self._check_meta()
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
        folders = (self.path / "namespaces", self.index_path, self.segments_path)
        for folder in folders:
            folder.mkdir(exist_ok=True, mode=0o700)
        for folder in (*folders, self.path, self.path.resolve().parent):
            sync_directory(folder)

    def namespaces(self) -> list[Namespace]:
        """All namespaces that decode; the others are logged, and their blocks will be dropped."""
        found = []
        for path in sorted((self.path / "namespaces").glob("*.json")):
            try:
                fields = json.loads(path.read_bytes())
                fields["layout"] = KVLayout(**fields["layout"])
                namespace = Namespace(**fields)
            except (ValueError, TypeError, KeyError, InvalidRequest) as error:
                _log.warning("namespace file %s is damaged and ignored: %s", path, error)
                continue
            if namespace.id.hex() != path.stem:
                _log.warning("namespace file %s does not hash to its name; ignored", path)
                continue
            found.append(namespace)
        return found

    def save_namespace(self, namespace: Namespace) -> None:
        """Make a namespace durable. Idempotent. Raises OSError."""
        path = self.path / "namespaces" / f"{namespace.id.hex()}.json"
        text = json.dumps(asdict(namespace), sort_keys=True, separators=(",", ":"))
        if not path.exists() or path.read_text(errors="replace") != text:
            _write_durably(path, text)

    def remove_namespaces(self, namespace_ids: Iterable[bytes]) -> None:
        """Forget namespaces that hold nothing; they become durable again with their next seal."""
        for namespace_id in namespace_ids:
            (self.path / "namespaces" / f"{namespace_id.hex()}.json").unlink(missing_ok=True)

    def set_index_aside(self) -> None:
        """Keep a damaged index for a look later; start an empty one."""
        aside = self.path / "index.damaged"
        if aside.exists():
            for file in aside.iterdir():
                file.unlink()
            aside.rmdir()
        self.index_path.rename(aside)
        self.index_path.mkdir()
        sync_directory(self.path)

    def mark_clean(self, snapshot_crc: int | None = None) -> None:
        """Record a clean shutdown, with what the index file looks like and which snapshot, if
        any, belongs to it."""
        stamp = {"index": self._index_stamp(), "snapshot_crc": snapshot_crc}
        _write_durably(self.path / "CLEAN", json.dumps(stamp))

    def close(self) -> None:
        """Release the lock."""
        os.close(self._lock)

    def _index_stamp(self) -> dict[str, int]:
        try:
            stat = (self.index_path / "data.mdb").stat()
        except FileNotFoundError:
            return {}
        return {"index_bytes": stat.st_size, "index_mtime_ns": stat.st_mtime_ns}

    def _take_clean(self) -> bool:
        """Read and remove the clean flag; true only if the index is as it was left."""
        path = self.path / "CLEAN"
        try:
            stamp = json.loads(path.read_bytes())
        except FileNotFoundError:
            return not self._index_stamp()
        except (OSError, ValueError):
            stamp = None
        path.unlink(missing_ok=True)
        sync_directory(self.path)
        if not isinstance(stamp, dict):
            return False
        # Without a snapshot the stamp lay bare.
        if stamp.get("index", stamp) != self._index_stamp():
            return False
        crc = stamp.get("snapshot_crc")
        self.snapshot_crc = crc if isinstance(crc, int) else None
        return True

    def _check_meta(self) -> str:
        path = self.path / "META"
        return read_store_id(self.path) if path.exists() else self._create_meta(path)

    def _create_meta(self, path: Path) -> str:
        others = sorted(p.name for p in self.path.iterdir() if p.name not in ("LOCK", "META.new"))
        if others:
            raise InvalidRequest(
                f"{self.path} has no META but holds {', '.join(others[:5])}; choose an empty "
                "directory, or restore META"
            )
        store_id = uuid.uuid4().hex
        meta = {"product": _PRODUCT, "format": STORE_FORMAT, "id": store_id}
        _write_durably(path, json.dumps(meta))
        return store_id


def read_store_id(path: Path) -> str:
    """The id in the META of a data directory; also of one that another process uses. Raises
    Corrupt, or InvalidRequest for a newer format."""
    meta_path = path / "META"
    try:
        meta = json.loads(meta_path.read_bytes())
    except (OSError, ValueError) as error:
        raise Corrupt(
            f"{meta_path} cannot be read ({error}); restore it, or move the directory away and "
            "start with an empty one"
        ) from error
    if not isinstance(meta, dict) or meta.get("product") != _PRODUCT:
        raise Corrupt(f"{meta_path} is not that of a dualpath store; choose another directory")
    version = meta.get("format")
    if not isinstance(version, int) or version < 1:
        raise Corrupt(f"{meta_path} names format {version!r}; restore it from a backup")
    if version > STORE_FORMAT:
        raise InvalidRequest(
            f"data directory {path} has format {version}, this version reads up to "
            f"{STORE_FORMAT}; upgrade dualpath or use another directory",
            reason="newer_format",
        )
    return str(meta.get("id", ""))


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


def _write_durably(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
    sync_directory(path.parent)
