"""Where `get -o` writes to: a file that appears when it is complete, or what is written into.

Owns the choice. A regular file, or a name that is free, is written beside itself and takes the
name at the end, with the permissions of the file that it replaces; of a symbolic link, that is the
target. A device, a FIFO and a descriptor (/dev/stdout) are nothing that may be replaced: they get
the bytes as these come, as from cat. What cannot be written is a DualPathError, reason `output`.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from dualpath.transfer.errors import DualPathError, InvalidRequest

STDOUT = "-"
_STDOUT_FD = 1
_LINKS_MAX = 40


class OutputFile:
    """An open descriptor and the name that errors give it."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name

    def write(self, data: memoryview) -> None:
        """All of the bytes; keeps no reference to them."""
        done = 0
        with naming(self._name):
            while done < len(data):
                with data[done:] as rest:
                    done += os.write(self._descriptor, rest)


@contextlib.contextmanager
def open_output(name: str) -> Iterator[OutputFile]:
    """The output `name`; a regular file is there only if the body ends without an exception.
    Raises InvalidRequest if it cannot be opened."""
    if is_stdout(name):
        sys.stdout.flush()
        yield OutputFile(_STDOUT_FD, "stdout")
        return
    if not os.path.basename(name):
        raise InvalidRequest(f"cannot write {name!r}: it names no file")
    try:
        found = _status(name)
    except OSError as error:
        raise _unusable(name, error) from error
    if found is None or (stat.S_ISREG(found.st_mode) and not _is_descriptor(name)):
        with _replacing(name, found) as output:
            yield output
        return
    try:
        descriptor = os.open(name, os.O_WRONLY | os.O_TRUNC | os.O_NOCTTY)
    except OSError as error:
        raise _unusable(name, error) from error
    with _closing(descriptor, name):
        yield OutputFile(descriptor, name)


def is_stdout(name: str) -> bool:
    """Whether it is this process's own stdout: -, or a name of its descriptor."""
    if name == STDOUT:
        return True
    if not _is_descriptor(name):
        return False
    try:
        return os.path.samestat(os.stat(name), os.fstat(_STDOUT_FD))
    except OSError:
        return False


@contextlib.contextmanager
def _replacing(name: str, found: os.stat_result | None) -> Iterator[OutputFile]:
    target = Path(os.path.realpath(name))
    partial = target.with_name(f"{target.name}.part-{os.getpid()}")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise _unusable(name, error) from error
    try:
        with _closing(descriptor, name):
            if found is not None:
                with naming(name):
                    os.fchmod(descriptor, stat.S_IMODE(found.st_mode))
            yield OutputFile(descriptor, name)
        with naming(name):
            partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _closing(descriptor: int, name: str) -> Iterator[None]:
    """Some file systems tell only at the close that they have no room."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise
    with naming(name):
        os.close(descriptor)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """What cannot be written in the body is a DualPathError, reason `output`."""
    try:
        yield
    except OSError as error:
        raise DualPathError(f"cannot write {name}: {error.strerror}", reason="output") from error


def _unusable(name: str, error: OSError) -> InvalidRequest:
    return InvalidRequest(f"cannot write {name}: {error.strerror}")


def _status(name: str) -> os.stat_result | None:
    """Of what a link points at; None if nothing has that name."""
    try:
        return os.stat(name)
    except FileNotFoundError:
        return None


def _is_descriptor(name: str) -> bool:
    """Whether links lead from the name to a descriptor of a process. What is open there has
    perhaps no name any more, and who opened it wants to see the bytes."""
    path = Path(name)
    for _ in range(_LINKS_MAX):
        folder = Path(os.path.realpath(path.parent))
        if folder.is_relative_to("/proc"):
            return True
        if not path.is_symlink():
            return False
        path = folder / path.readlink()
    return False
