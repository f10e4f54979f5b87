"""stdout as the commands print to it: what it does not take is one clear error.

Owns `sys.stdout` for as long as a command runs. A full disk or a reader that went away is a
DualPathError, reason `output`, also when it shows only as the buffer is flushed at the end.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from dualpath.cli.output_file import naming


class CheckedStdout:
    """`stream`, with its errors named. Everything else is the stream's."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As the stream's."""
        with naming("stdout"):
            return self._stream.write(text)

    def flush(self) -> None:
        """As the stream's."""
        with naming("stdout"):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


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
