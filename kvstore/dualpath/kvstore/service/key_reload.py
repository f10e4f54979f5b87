"""Files that are read again when they change, or when a signal asks for it.

Owns what was last seen of each file and how the last reading went. A file that cannot be used
leaves what was in force in force; the trouble is logged once, counted and shown. Blocks on the
file system: for a thread, one at a time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dualpath.transfer.errors import DualPathError

_log = logging.getLogger(__name__)

_Seen = tuple[tuple[int, int, int] | None, ...]


@dataclass(slots=True)
class _Source:
    paths: Sequence[str]
    apply: Callable[[], None]
    seen: _Seen
    trouble: str = ""


class KeyReload:
    """See the module docstring."""

    def __init__(self) -> None:
        self._sources: dict[str, _Source] = {}
        self.reloads = 0
        self.failures = 0

    def watch(self, name: str, paths: Sequence[str], apply: Callable[[], None]) -> None:
        """Call `apply` when one of the files changes; it raises if it cannot use them."""
        self._sources[name] = _Source(paths, apply, _look(paths))

    def poll(self, *, force: bool = False) -> None:
        """Apply what has changed since the last time; with `force` everything."""
        for name, source in self._sources.items():
            seen = _look(source.paths)
            if seen != source.seen or force:
                source.seen = seen
                self._apply(name, source)

    def troubles(self) -> Mapping[str, str]:
        """By name, why the newest files are not in use."""
        return {name: each.trouble for name, each in self._sources.items() if each.trouble}

    def _apply(self, name: str, source: _Source) -> None:
        try:
            source.apply()
        except (DualPathError, OSError) as error:
            source.trouble = str(error)
            self.failures += 1
            _log.error("%s: not reloaded, the old ones stay in force: %s", name, error)
        else:
            source.trouble = ""
            self.reloads += 1
            _log.info("%s: reloaded", name)


def _look(paths: Sequence[str]) -> _Seen:
    return tuple(map(_stat, paths))


def _stat(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    # Also a link that was turned to another file has another inode behind it.
    return found.st_mtime_ns, found.st_size, found.st_ino
