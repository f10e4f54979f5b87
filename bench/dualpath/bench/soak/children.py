"""Processes of the soak: forked from one small server, so that a round costs no imports.

The server has everything imported and nothing opened: no thread, no gRPC channel. Preloading the
recorder goes through its environment. A child tells what it has to say, picklable values, by a
pipe; that it ends without a word is a result too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dualpath.bench.soak.recording import LIBRARY_VARIABLE

_PRELOADED = (
    "dualpath.bench.soak.daemon",
    "dualpath.bench.soak.engine",
    "dualpath.bench.soak.workload",
    "dualpath.bench.soak.verification",
    "dualpath.bench.soak.recording",
)
_END_S_MAX = 60.0


class ChildLost(Exception):
    """A child ended without its result, or not in time."""


Tell = Callable[[Any], None]
"""What a child's function gets first: sends a value to `Child.hear`."""


class Child:
    """A running process. It is signalled by a descriptor, never by its number: the server reaps
    children at once, and a number may be somebody else's by then."""

    def __init__(self, process: Any, pipe: Connection) -> None:
        self._process = process
        self._pipe = pipe
        # It cannot end before it is told to go on: the number is still its own.
        self._descriptor = os.pidfd_open(process.pid)
        pipe.send(None)

    @property
    def pid(self) -> int:
        """Of the process."""
        return int(self._process.pid)

    def hear(self, wait_s: float) -> Any:
        """The next thing that it tells. Raises ChildLost."""
        try:
            if not self._pipe.poll(wait_s):
                raise ChildLost(f"no answer within {wait_s:.0f} s")
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(_END_S_MAX)
            raise ChildLost(f"ended with status {self._process.exitcode}") from error

    def kill(self) -> int:
        """kill -9, if it still runs; return its exit status (negative: a signal)."""
        self._signal_kill()
        return self.join()

    def _signal_kill(self) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    def join(self) -> int:
        """Wait for its end by itself; return its exit status. Raises ChildLost."""
        self._process.join(_END_S_MAX)
        if self._process.exitcode is None:
            self._signal_kill()
            self._process.join(_END_S_MAX)
            raise ChildLost(f"did not end within {_END_S_MAX:.0f} s")
        self._pipe.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        return int(self._process.exitcode)

    def wait(self, wait_s: float) -> int | None:
        """Its exit status if it ends within `wait_s`, else None."""
        self._process.join(wait_s)
        code = self._process.exitcode
        return None if code is None else int(code)


class Nursery:
    """Makes children. One a program: the server lives as long as the program. What they log and
    print goes to `said`."""

    def __init__(self, recorder: Path | None, said: Path) -> None:
        self.records = recorder is not None
        """Whether children can be recorded."""
        self._said = said
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_PRELOADED))
        before = os.environ.get(LIBRARY_VARIABLE)
        if recorder is not None:
            os.environ[LIBRARY_VARIABLE] = str(recorder)
        try:
            self.start(_nothing).join()
        finally:
            if before is None:
                os.environ.pop(LIBRARY_VARIABLE, None)
            else:
                os.environ[LIBRARY_VARIABLE] = before

    def start(self, function: Callable[..., Any], *arguments: Any) -> Child:
        """Run `function(tell, *arguments)` in a fresh process; all must be picklable."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_run, args=(theirs, self._said, function, arguments))
        process.daemon = True
        process.start()
        theirs.close()
        return Child(process, ours)

    def call(self, function: Callable[..., Any], *arguments: Any, wait_s: float) -> Any:
        """Run it and return the first thing that it tells. Raises ChildLost."""
        child = self.start(function, *arguments)
        try:
            return child.hear(wait_s)
        finally:
            child.kill()


def _nothing(tell: Tell) -> None:
    """Starts the server."""


def _run(
    pipe: Connection, said: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    pipe.recv()
    # An interrupt at the keyboard is the program's to handle: it ends its children itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fd = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(fd, stream)
    function(pipe.send, *arguments)
    pipe.close()
