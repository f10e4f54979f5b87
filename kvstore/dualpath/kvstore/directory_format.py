"""The small files of a data directory, as values: META, CLEAN, RETAINED, INVALIDATED, namespaces;
putting aside.

Owns their formats and versions (docs/disk-format.md). Every file is written whole, synced and
renamed into place, and carries a check over all of its bytes, so that a flipped one is found. Knows
no lock and no store.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.psync_device import sync_directory
from dualpath.kvstore.regular_file import NotRegularError, open_regular, read_regular
from dualpath.transfer.errors import Corrupt, InvalidRequest

STORE_FORMAT = 3
SUMMED_FORMAT = 2
"""From this format on META and CLEAN have a check and the index has sums."""
RETAINED_NAME = "RETAINED"
INVALIDATED_NAME = "INVALIDATED"
ASIDE_NAME = "damaged"
ASIDE_MAX = 4
"""How many things of one name recoveries keep; repairs by a person keep all."""

_PRODUCT = "dualpath-store"
_Row = TypeVar("_Row")
_HASHED_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Meta:
    """META: what this directory is."""

    version: int
    store_id: str


@dataclass(frozen=True, slots=True)
class IndexStamp:
    """What the file of the durable index is like: bytes, and xxh3-64 of all of them."""

    nbytes: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class CleanStamp:
    """CLEAN: how a clean shutdown left the index (None: there was none), and the CRC of the
    header of its snapshot, if one was written."""

    index: IndexStamp | None
    snapshot_crc: int | None


@dataclass(frozen=True, slots=True)
class RetainedPrefix:
    """One of RETAINED: the prefix that ends with a block should stay until then."""

    namespace_id: bytes
    hash: bytes
    until_unix_s: float


@dataclass(frozen=True, slots=True)
class Cut:
    """One of INVALIDATED: blocks of a scope up to a generation (invalidation_cuts.py)."""

    namespace_id: bytes
    writer: str
    hash: bytes
    generation: int


def read_meta(root: Path) -> Meta:
    """Raises Corrupt, or InvalidRequest for a newer format."""
    path = root / "META"
    try:
        raw = read_regular(path)
        fields = json.loads(raw)
    except (OSError, ValueError) as error:
        raise Corrupt(
            f"{path} cannot be read ({error}); restore it, let `dualpath fsck --repair` make a "
            "new one, or move the directory away and start with an empty one"
        ) from error
    if not isinstance(fields, dict) or fields.get("product") != _PRODUCT:
        raise Corrupt(
            f"{path} is not that of a dualpath store; choose another directory, or restore META"
        )
    version = fields.get("format")
    summed = "check" in fields or version in range(SUMMED_FORMAT, STORE_FORMAT + 1)
    if summed and raw != _summed(fields):
        raise Corrupt(
            f"{path}: its check does not match; restore it, or let `dualpath fsck --repair` make "
            "a new one"
        )
    if not isinstance(version, int) or version < 1:
        raise Corrupt(f"{path} names format {version!r}; restore it from a backup")
    if version > STORE_FORMAT:
        raise InvalidRequest(
            f"data directory {root} has format {version}, this version reads up to "
            f"{STORE_FORMAT}; upgrade dualpath or use another directory",
            reason="newer_format",
        )
    return Meta(version, str(fields.get("id", "")))


def write_meta(root: Path, meta: Meta) -> None:
    """Durably. Raises OSError."""
    fields = {"product": _PRODUCT, "format": meta.version, "id": meta.store_id}
    summed = meta.version >= SUMMED_FORMAT
    write_durably(root / "META", _summed(fields) if summed else json.dumps(fields).encode())


def read_clean(root: Path) -> CleanStamp | None:
    """None if the last shutdown was not clean, or by a version that cannot prove it. Raises
    Corrupt."""
    path = root / "CLEAN"
    try:
        raw = read_regular(path)
    except FileNotFoundError:
        return None
    except NotRegularError as error:
        raise Corrupt(str(error)) from error
    try:
        fields = json.loads(raw)
        if not isinstance(fields, dict):
            raise Corrupt(f"{path} is no object")
        if "check" not in fields and "index_mtime_ns" in raw.decode():
            return None  # of format 1, which went by a file time
        if raw != _summed(fields):
            raise Corrupt(f"{path}: its check does not match")
        index = IndexStamp(**fields["index"]) if fields["index"] is not None else None
        return CleanStamp(index, fields["snapshot_crc"])
    except (ValueError, TypeError, KeyError) as error:
        raise Corrupt(f"{path} makes no sense: {error}") from error


def write_clean(root: Path, stamp: CleanStamp) -> None:
    """Durably. Raises OSError."""
    write_durably(root / "CLEAN", _summed(asdict(stamp)))


def read_retained(root: Path) -> tuple[RetainedPrefix, ...]:
    """None at all if there is no file. Raises Corrupt."""

    def decoded(namespace_id: str, block_hash: str, until: float) -> RetainedPrefix:
        return RetainedPrefix(bytes.fromhex(namespace_id), bytes.fromhex(block_hash), float(until))

    return _read_rows(root / RETAINED_NAME, "prefixes", decoded)


def read_cuts(root: Path) -> tuple[Cut, ...]:
    """None at all if there is no file. Raises Corrupt."""

    def decoded(namespace_id: str, writer: str, block_hash: str, generation: int) -> Cut:
        return Cut(
            bytes.fromhex(namespace_id), str(writer), bytes.fromhex(block_hash), int(generation)
        )

    return _read_rows(root / INVALIDATED_NAME, "cuts", decoded)


def write_cuts(root: Path, cuts: Iterable[Cut]) -> None:
    """Durably. Raises OSError."""
    rows = [[cut.namespace_id.hex(), cut.writer, cut.hash.hex(), cut.generation] for cut in cuts]
    write_durably(root / INVALIDATED_NAME, _summed({"cuts": rows}))


def _read_rows(path: Path, name: str, decoded: Callable[..., _Row]) -> tuple[_Row, ...]:
    """The one list of a file, each row decoded. Raises Corrupt."""
    try:
        raw = read_regular(path)
    except FileNotFoundError:
        return ()
    except NotRegularError as error:
        raise Corrupt(str(error)) from error
    try:
        fields = json.loads(raw)
        if raw != _summed(fields):
            raise Corrupt(f"{path}: its check does not match")
        return tuple(decoded(*row) for row in fields[name])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Corrupt(f"{path} makes no sense: {error}") from error


def write_retained(root: Path, prefixes: Iterable[RetainedPrefix]) -> None:
    """Durably. Raises OSError."""
    listed = [[each.namespace_id.hex(), each.hash.hex(), each.until_unix_s] for each in prefixes]
    write_durably(root / RETAINED_NAME, _summed({"prefixes": listed}))


def stamp_index(root: Path) -> IndexStamp | None:
    """Read the whole file of the index; None if there is none, or something else in its place.
    Nobody may write to it."""
    digest = xxhash.xxh3_64()
    buffer = bytearray(_HASHED_BYTES)
    nbytes = 0
    try:
        fd = open_regular(root / "index" / "data.mdb", os.O_RDONLY)
        with open(fd, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
                nbytes += count
    except (FileNotFoundError, NotRegularError):
        return None
    return IndexStamp(nbytes, digest.hexdigest())


def namespace_text(namespace: Namespace) -> bytes:
    """The content of a namespace's file. Its hash is the file's name, so it needs no check."""
    return json.dumps(asdict(namespace), sort_keys=True, separators=(",", ":")).encode()


def read_namespace(path: Path) -> Namespace:
    """Raises Corrupt."""
    try:
        raw = read_regular(path)
        fields = json.loads(raw)
        fields["layout"] = KVLayout(**fields["layout"])
        namespace = Namespace(**fields)
    except (OSError, ValueError, TypeError, KeyError, InvalidRequest) as error:
        raise Corrupt(f"namespace file {path} is damaged: {error}") from error
    if namespace.id.hex() != path.stem or namespace_text(namespace) != raw:
        raise Corrupt(f"namespace file {path} does not hash to its name")
    return namespace


def set_aside(root: Path, path: Path, *, keep: int = 0) -> str:
    """Move something into the folder of damaged things; return its new name below `root`. With
    `keep`, only that many of its kind stay. Durable. Raises OSError."""
    target = _free_name(root, path.name)
    path.rename(target)
    sync_directory(target.parent)
    sync_directory(path.parent)
    if keep:
        for number, old in sorted(_kept(root, path.name))[:-keep]:
            assert number >= 0
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    return str(target.relative_to(root))


def keep_bytes(root: Path, name: str, content: bytes) -> str:
    """Keep what is about to be written over; return its name below `root`. Raises OSError."""
    target = _free_name(root, name)
    write_durably(target, content)
    return str(target.relative_to(root))


def _free_name(root: Path, name: str) -> Path:
    folder = root / ASIDE_NAME
    folder.mkdir(exist_ok=True, mode=0o700)
    sync_directory(root)
    last = max((number for number, _ in _kept(root, name)), default=0)
    return folder / f"{name}.{last + 1}"


def _kept(root: Path, name: str) -> list[tuple[int, Path]]:
    found = []
    for path in (root / ASIDE_NAME).iterdir():
        stem, _, number = path.name.rpartition(".")
        if stem == name and number.isdecimal():
            found.append((int(number), path))
    return found


def write_durably(path: Path, content: bytes) -> None:
    """Write whole, sync, rename into place. Raises OSError."""
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)
    sync_directory(path.parent)


def _summed(fields: Mapping[str, Any]) -> bytes:
    """The one encoding of these fields, with a check over the others."""
    bare = {name: value for name, value in fields.items() if name != "check"}
    text = json.dumps(bare, sort_keys=True, separators=(",", ":"))
    bare["check"] = xxhash.xxh3_64_hexdigest(text.encode())
    return json.dumps(bare, sort_keys=True, separators=(",", ":")).encode()
