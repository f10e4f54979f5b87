"""Tells a person on stderr what is being done: one line that moves, or plain lines in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

MOVE_S = 0.1
LOG_S = 5.0
_BAR_CHARS = 24


class Progress:
    """`stage` starts a step, `move` shows how far it is, `done` ends it, `say` prints a line."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._moves = self._stream.isatty()
        self._title = ""
        self._started_s = 0.0
        self._shown_s = 0.0

    def stage(self, title: str) -> None:
        """Begin a step."""
        self._title = title
        self._started_s = self._shown_s = time.monotonic()
        self._line(f"{title} ...", end="" if self._moves else "\n")

    def move(self, fraction: float, detail: str = "") -> None:
        """The step is at `fraction` of 1. Cheap enough to call for every load."""
        now_s = time.monotonic()
        if now_s - self._shown_s < (MOVE_S if self._moves else LOG_S):
            return
        self._shown_s = now_s
        filled = round(max(0.0, min(1.0, fraction)) * _BAR_CHARS)
        bar = "#" * filled + "." * (_BAR_CHARS - filled)
        text = f"{self._title} [{bar}] {100 * fraction:3.0f} %  {detail}"
        self._line(text, end="" if self._moves else "\n")

    def done(self, detail: str = "") -> None:
        """The step has ended."""
        seconds = time.monotonic() - self._started_s
        self._line(f"{self._title}: {detail or 'done'} ({seconds:.1f} s)", end="\n")

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self._line(text, end="\n")

    def _line(self, text: str, *, end: str) -> None:
        start = "\r\x1b[K" if self._moves else ""
        try:
            self._stream.write(f"{start}{text}{end}")
            self._stream.flush()
        except (OSError, ValueError):
            # A closed stderr must not end a measurement.
            self._moves = False
