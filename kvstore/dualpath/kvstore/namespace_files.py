"""The files of the namespaces: each twice, so that one that is damaged or gone costs nothing.

`namespaces/ID.json` and `namespaces.copy/ID.json` have the same content. ID is its hash, so each
file tells by itself whether it is whole. Without either one nobody knows what the blocks of the
namespace are, and they cannot be served.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dualpath.kvstore import directory_format
from dualpath.kvstore.directory_format import ASIDE_MAX, namespace_text, write_durably
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.regular_file import read_regular
from dualpath.transfer.errors import Corrupt

NAMESPACES_NAME = "namespaces"
COPIES_NAME = "namespaces.copy"
_SUFFIX = ".json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BadNamespaceFile:
    """A file that is damaged, or missing while the other one is there. `namespace` is what it
    must say, as far as the other file tells."""

    path: Path
    why: str
    namespace: Namespace | None

    @property
    def where(self) -> str:
        """Its name below the data directory."""
        return f"{self.path.parent.name}/{self.path.name}"


@dataclass(slots=True)
class FoundNamespaces:
    """What the files say. `uncopied` are whole and have no copy, as older versions left them;
    `unfinished` is what a crash left of a write."""

    whole: list[Namespace] = field(default_factory=list)
    bad: list[BadNamespaceFile] = field(default_factory=list)
    uncopied: list[Namespace] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)


class NamespaceFiles:
    """Those of the data directory `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders = (root / NAMESPACES_NAME, root / COPIES_NAME)

    def find(self) -> FoundNamespaces:
        """Read all; change nothing."""
        found = FoundNamespaces()
        names: set[str] = set()
        for folder in self._folders:
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if path.suffix == ".new":
                    found.unfinished.append(path)
                else:
                    names.add(path.name)
        for name in sorted(names):
            self._find_one(name, found)
        return found

    def _find_one(self, name: str, found: FoundNamespaces) -> None:
        namespace: Namespace | None = None
        reasons: list[str] = []
        for folder in self._folders:
            reason = "it is missing"
            if (folder / name).exists():
                try:
                    namespace, reason = directory_format.read_namespace(folder / name), ""
                except Corrupt as error:
                    reason = str(error)
            reasons.append(reason)
        if namespace is not None:
            found.whole.append(namespace)
        for folder, reason in zip(self._folders, reasons, strict=True):
            there = (folder / name).exists()
            if namespace is not None and not there and folder.name == COPIES_NAME:
                found.uncopied.append(namespace)
            elif reason and (there or namespace is not None):
                found.bad.append(BadNamespaceFile(folder / name, reason, namespace))

    def open(self) -> tuple[list[Namespace], list[str]]:
        """All namespaces that are known, and a sentence for each trouble. What is damaged is put
        aside and written anew from the other file, if that is whole."""
        found = self.find()
        troubles = []
        for bad in found.bad:
            if bad.path.suffix == _SUFFIX:
                troubles.append(self._mend(bad))
                _log.warning("%s", troubles[-1])
        for namespace in found.uncopied:
            try:
                _write(self._folders[1], namespace)
            except OSError as error:
                _log.warning("namespace %s gets no copy: %s", namespace.id.hex(), error)
                break
        return found.whole, troubles

    def _mend(self, bad: BadNamespaceFile) -> str:
        if bad.namespace is None:
            return (
                f"{bad.where} is damaged, and there is no other one: its blocks are not served; "
                "restore it from a backup, and delete index/ while the store is stopped"
            )
        try:
            kept = self.write_anew(bad, keep=ASIDE_MAX)
        except OSError as error:
            return f"{bad.where}: {bad.why}; its other file is used, a new one fails: {error}"
        return f"{bad.where} was damaged or gone and is written anew from its other file{kept}"

    def write_anew(self, bad: BadNamespaceFile, *, keep: int = 0) -> str:
        """Put a damaged file aside (see `set_aside`) and write what it must say; say where the old
        one is. Raises OSError."""
        assert bad.namespace is not None
        kept = ""
        if bad.path.exists():
            kept = f"; the old one is {directory_format.set_aside(self._root, bad.path, keep=keep)}"
        bad.path.parent.mkdir(exist_ok=True, mode=0o700)
        _write(bad.path.parent, bad.namespace)
        return kept

    def save(self, namespace: Namespace) -> None:
        """Make a namespace durable. Idempotent. Raises OSError."""
        for folder in self._folders:
            _write(folder, namespace)

    def remove(self, namespace_ids: Iterable[bytes]) -> None:
        """Forget them; the copies first, since what has a copy only is brought back."""
        for namespace_id in namespace_ids:
            for folder in reversed(self._folders):
                (folder / (namespace_id.hex() + _SUFFIX)).unlink(missing_ok=True)


def _write(folder: Path, namespace: Namespace) -> None:
    path = folder / (namespace.id.hex() + _SUFFIX)
    content = namespace_text(namespace)
    if not path.exists() or read_regular(path) != content:
        write_durably(path, content)
