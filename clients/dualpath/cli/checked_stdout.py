"""stdout as the commands print to it: what it does not take is one clear error.

Owns `sys.stdout` for as long as a command runs. A full disk is a DualPathError, reason `output`,
also when it shows only as the buffer is flushed at the end. A reader that has seen enough, as in
`| head`, is no error to tell of: `ReaderGone`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from dualpath.cli.output_file import naming


class ReaderGone(Exception):
    """Whoever read what is printed has closed its end: nothing is left to do."""


class CheckedStdout:
    """`stream`, with its errors named. Everything else is the stream's."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As the stream's."""
        with _checking():
            return self._stream.write(text)

    def flush(self) -> None:
        """As the stream's."""
        with _checking():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _checking() -> Iterator[None]:
    with naming("stdout"):
        try:
            yield
        except BrokenPipeError as error:
            raise ReaderGone from error


@contextlib.contextmanager
def checked_stdout() -> Iterator[None]:
    """Check what is printed in the body."""
    plain = sys.stdout
    if plain is None:  # closed by whoever started us: print does nothing then
        yield
        return
    sys.stdout = cast(TextIO, CheckedStdout(plain))
    try:
        yield
    finally:
        sys.stdout = plain
        _leave_nothing(plain)


def _leave_nothing(stream: TextIO) -> None:
    """What could not be written must not be tried again as the interpreter ends: it complains."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
