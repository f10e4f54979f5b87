"""Files that are read again when they change, or when a signal asks for it.

Owns what was last seen of each file and how the last reading went. A file that cannot be used
leaves what was in force in force; the trouble is logged once, counted and shown. Files are read on
a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from dualpath.transfer.errors import DualPathError

PERIOD_S = 1.0

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
        self._task: asyncio.Task[None] | None = None
        self._asked: asyncio.Event | None = None
        self.reloads = 0
        self.failures = 0

    def watch(self, name: str, paths: Sequence[str], apply: Callable[[], None]) -> None:
        """Call `apply` when one of the files changes; it raises if it cannot use them."""
        self._sources[name] = _Source(paths, apply, _look(paths))

    def start(self) -> None:
        """Look every PERIOD_S from now on, in the running event loop."""
        self._asked = asyncio.Event()
        self._task = asyncio.create_task(self._run(self._asked), name="key reload")

    def now(self) -> None:
        """Read everything again, changed or not. From the event loop; before `start` nothing."""
        if self._asked is not None:
            self._asked.set()

    async def stop(self) -> None:
        """End what `start` began."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self, asked: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asked.wait(), PERIOD_S)
            force = asked.is_set()
            asked.clear()
            await loop.run_in_executor(None, partial(self.poll, force=force))

    def poll(self, *, force: bool = False) -> None:
        """Apply what has changed since the last time; with `force` everything. Blocks; one at a
        time."""
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
