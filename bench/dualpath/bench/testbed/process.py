"""One child process of the cluster: started, waited for until it says `ready`, ended.

Owns the process group, the log of its stderr and the parse of its one `ready {json}` line. A child
ends with this process, even if this one is killed (Linux: parent death signal).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dualpath.transfer.errors import DeadlineExceeded, Unavailable

READY_LINE_BYTES_MAX = 64 << 10
TAIL_LINES = 12
_TAIL_BYTES = 8 << 10
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> Callable[[], None] | None:
    """What a child runs between fork and exec. The library is loaded before the fork."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    return ask


_DYING = (
    "import ctypes,os,sys;ctypes.CDLL(None).prctl(1,9,0,0,0);os.execvp(sys.argv[1],sys.argv[1:])"
)
"""1: PR_SET_PDEATHSIG, 9: SIGKILL."""


def dying_with_parent(argv: Sequence[str]) -> list[str]:
    """The command line of a child that ends with this process. Other than `die_with_parent` it runs
    nothing between fork and exec, where a process with many threads may crash."""
    if not sys.platform.startswith("linux"):
        return list(argv)
    return [sys.executable, "-I", "-S", "-c", _DYING, *argv]


class ChildProcess:
    """A running `dualpath serve` or `dualpath agent`; `ready` is what it announced."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.ready: Mapping[str, object] = {}
        self._process = process
        self._log = log

    @classmethod
    async def start(cls, name: str, argv: Sequence[str], log: Path) -> ChildProcess:
        """Run `argv` in a process group of its own, stderr appended to `log`. Raises
        Unavailable."""
        if shutil.which(argv[0]) is None:
            raise Unavailable(f"{name} did not start ({' '.join(argv)}): no such program")
        try:
            with log.open("ab") as stderr:
                process = await asyncio.create_subprocess_exec(
                    *dying_with_parent(argv),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=stderr,
                    start_new_session=True,
                    limit=READY_LINE_BYTES_MAX,
                )
        except OSError as error:
            raise Unavailable(f"{name} did not start ({' '.join(argv)}): {error}") from error
        return cls(name, process, log)

    @property
    def pid(self) -> int:
        """Of the process that runs in the node (`ip netns exec` replaces itself by it)."""
        return self._process.pid

    def address(self, key: str) -> str:
        """A value of the ready line. Raises Unavailable if it is absent."""
        value = self.ready.get(key)
        if not isinstance(value, str) or not value:
            raise Unavailable(f"{self.name} announced no `{key}`: {dict(self.ready)}")
        return value

    async def wait_ready(self, deadline_s: float) -> None:
        """Wait for the ready line. Raises DeadlineExceeded or Unavailable, with the log's end."""
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(deadline_s):
                line = await self._process.stdout.readline()
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{self.name} was not ready after {deadline_s:g} s\n{self.tail()}"
            ) from error
        word, _, value = line.decode("utf-8", errors="replace").partition(" ")
        ready: object = None
        with contextlib.suppress(ValueError):
            ready = json.loads(value) if word == "ready" else None
        if not isinstance(ready, dict):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._process.wait()
            raise Unavailable(
                f"{self.name} ended before it was ready (status {self._process.returncode}); "
                f"it said {line[:200]!r}\n{self.tail()}"
            )
        self.ready = ready

    async def lost(self) -> str:
        """Wait until the process ends; return what to say about it."""
        await self._process.wait()
        return self.last_words

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.returncode is not None

    @property
    def last_words(self) -> str:
        """What to say about a process that has ended."""
        return f"{self.name} ended with status {self._process.returncode}\n{self.tail()}"

    def tail(self) -> str:
        """The end of its stderr, for errors."""
        try:
            text = self._log.read_bytes()[-_TAIL_BYTES:].decode("utf-8", errors="replace")
        except OSError:
            text = ""
        lines = [f"  {self.name}| {line}" for line in text.splitlines()[-TAIL_LINES:]]
        return "\n".join(lines) or f"  {self.name}| (nothing on stderr)"

    def terminate(self) -> None:
        """Ask the whole group to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the whole group at once, as a crash would."""
        self._signal(signal.SIGKILL)

    def freeze(self) -> None:
        """Stop the whole group where it is: it answers nothing, its connections stay."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen group go on."""
        self._signal(signal.SIGCONT)

    async def close(self, deadline_s: float) -> None:
        """Wait for the end up to `deadline_s`, then kill the group."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._process.wait()
        except TimeoutError:
            pass
        finally:
            # Also when the leader is gone: it may have left children in its group.
            self._signal(signal.SIGKILL)
        await self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)
