"""The settings `io` and `io_depth`: how a store's device is read and written."""

from __future__ import annotations

import enum

from dualpath.transfer.errors import InvalidRequest

IO_DEPTH = 32
"""Transfers in flight of one batch: more is no faster on the devices that were measured."""
IO_DEPTH_MAX = 1024


class IoMode(enum.Enum):
    """See the module docstring."""

    AUTO = "auto"
    """io_uring where it can be had, else psync, which says why."""
    IO_URING = "io_uring"
    """io_uring or an error."""
    PSYNC = "psync"


def check_io(io: str, depth: int) -> None:
    """Raises InvalidRequest naming the setting."""
    if io not in (mode.value for mode in IoMode):
        raise InvalidRequest(
            f"io must be one of {', '.join(mode.value for mode in IoMode)}, not {io!r}"
        )
    if not 1 <= depth <= IO_DEPTH_MAX:
        raise InvalidRequest(f"io_depth must lie in 1..{IO_DEPTH_MAX}, not {depth}")
