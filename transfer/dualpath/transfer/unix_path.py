"""Paths of Unix sockets: taken over from the dead, refused when somebody lives there."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator

from dualpath.transfer.errors import InvalidRequest, Unavailable

UNIX_PATH_CHARS_MAX = 96
"""The kernel takes 107; suffixes must still fit."""
PROBE_S_MAX = 1.0


def claim(path: str) -> None:
    """Remove a socket that nobody listens on. Raises InvalidRequest (too long, no folder, another
    kind of file), Unavailable (in use)."""
    if len(path) > UNIX_PATH_CHARS_MAX:
        raise InvalidRequest(
            f"unix: {path!r} is longer than {UNIX_PATH_CHARS_MAX} characters; shorten it"
        )
    check_folder(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise InvalidRequest(f"unix: {path!r} exists and is no socket; choose another path")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_S_MAX)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            remove(path)
            return
        except OSError as error:
            raise Unavailable(f"unix: {path!r}: {error}", reason="address_in_use") from error
    raise Unavailable(
        f"unix: {path!r} is in use by another process; stop it or choose another path",
        reason="address_in_use",
    )


def check_folder(path: str) -> None:
    """Raise InvalidRequest unless the folder of `path` exists."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise InvalidRequest(
            f"unix: {path!r} cannot be made: there is no folder {folder!r}; create it or choose "
            "another path"
        )


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Files made inside are our user's only: a socket's permissions are its access rule."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def remove(path: str) -> None:
    """Unlink, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
