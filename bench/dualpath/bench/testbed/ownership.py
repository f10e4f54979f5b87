"""Names that tell which process made a thing, so that what a killed run left can be removed.

A tag is `<pid>-<start time of that process>-<random>`; the start time tells a living owner from
another process that got its number.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

_TAG = re.compile(r"(\d+)-([0-9a-f]+)-[0-9a-f]{4}(?![0-9a-f])")


def _start_time(pid: int) -> int | None:
    """Clock ticks after boot at which `pid` started, None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is a name in parentheses that may itself contain spaces and parentheses.
    return int(stat.rpartition(")")[2].split()[19])


def owner_tag() -> str:
    """A new tag of this process."""
    pid = os.getpid()
    return f"{pid}-{_start_time(pid) or 0:x}-{secrets.token_hex(2)}"


def is_stale(name: str, prefix: str) -> bool:
    """Whether `name` is `prefix`, then a tag of a process that is gone, then anything."""
    if not name.startswith(prefix):
        return False
    match = _TAG.match(name[len(prefix) :])
    return match is not None and _start_time(int(match[1])) != int(match[2], 16)
