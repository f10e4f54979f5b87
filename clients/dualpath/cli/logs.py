"""Logging of the commands: to stderr, one line a record, with time, level and component."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import sys
import time

LEVELS = ("debug", "info", "warning", "error")


class _Lines(logging.Formatter):
    """UTC, milliseconds; the package prefix is left out of the component's name."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        record.component = record.name.removeprefix("dualpath.")
        return super().format(record)


def configure_logs(level: str) -> None:
    """Send everything from `level` on to stderr, and where every thread was if native code crashes.
    Called once, by a command's `run`."""
    with contextlib.suppress(OSError, ValueError):  # stderr may be no file
        faulthandler.enable()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _Lines(
            "%(asctime)s.%(msecs)03dZ %(levelname)-7s %(component)s: %(message)s",
            "%Y-%m-%dT%H:%M:%S",
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
