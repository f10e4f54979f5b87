"""The file RAW of a data directory: its segments lie on a raw device, and on which.

Without it a start that forgets the setting would find no segments, and drop every block.
"""

from __future__ import annotations

import os
from pathlib import Path

from dualpath.kvstore.psync_device import sync_directory
from dualpath.transfer.errors import InvalidRequest

RAW_MARKER = "RAW"


def raw_device_of(directory: Path) -> str:
    """The raw device that the marker names; "" if there is none. Raises OSError."""
    try:
        return (directory / RAW_MARKER).read_text().strip()
    except FileNotFoundError:
        return ""


def check_raw_device(directory: Path, segments: Path, raw: str) -> None:
    """Raises InvalidRequest if the segments lie elsewhere than the setting says. The device may
    get another path: what is on it tells whose it is."""
    marked = raw_device_of(directory)
    if marked and not raw:
        raise InvalidRequest(
            f"the segments of {directory} lie on the raw device {marked}: set raw_device"
        )
    if raw and not marked and segments.is_dir() and any(segments.iterdir()):
        raise InvalidRequest(
            f"{directory} has segment files, and raw_device is {raw}: unset it, or use another "
            "data directory"
        )


def mark_raw_device(directory: Path, raw: str) -> None:
    """Make the marker durable. Idempotent. Raises OSError."""
    if raw_device_of(directory) == raw:
        return
    new = directory / (RAW_MARKER + ".new")
    with new.open("w") as file:
        file.write(raw + "\n")
        file.flush()
        os.fsync(file.fileno())
    new.rename(directory / RAW_MARKER)
    sync_directory(directory)
