"""Recordings of what a process did to a directory: how they are made, and their records.

The recorder is a small C library (recorder.c) that is compiled when it is first needed and
preloaded into the recorded process and those that it starts; so LMDB, Python and everything else
in them is seen as it is. Only io_uring passes by it: such writes are told of, or not made.
"""

from __future__ import annotations

import atexit
import ctypes
import enum
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dualpath.transfer.errors import Unavailable

_RECORD = struct.Struct("<IiqqI")
_SOURCE = Path(__file__).with_name("recorder.c")
_COMPILE_S_MAX = 60.0
LIBRARY_VARIABLE = "LD_PRELOAD"
"""Names the recorder in the environment of a process that is to be recorded."""


class Change(enum.IntEnum):
    """Kinds of records, as in recorder.c."""

    OPENED = 1
    WRITTEN = 2
    SIZED = 3
    SYNCED = 4
    RENAMED = 5
    UNLINKED = 6
    MADE_DIRECTORY = 7
    REMOVED_DIRECTORY = 8
    NOTE = 9
    UNKNOWN = 10
    SYNC_FAILED = 11


@dataclass(frozen=True, slots=True)
class Record:
    """One change; see recorder.c for the meaning of `a`, `b` and `data` by kind."""

    kind: Change
    handle: int
    a: int
    b: int
    data: bytes

    @property
    def path(self) -> str:
        """`data` as a path."""
        return os.fsdecode(self.data)


@dataclass(frozen=True, slots=True)
class Faults:
    """Which share of writes and syncs fails with EIO, of files whose path holds `files`. A write
    that fails may be done in part; what a sync that fails should have kept may be lost for good."""

    files: str
    writes: float
    syncs: float
    seed: int


@cache
def build_recorder() -> Path:
    """The recorder, compiled into a folder that lasts as long as this program: whatever was
    preloaded once preloads it into every program it starts. Raises Unavailable without a C
    compiler."""
    folder = Path(tempfile.mkdtemp(prefix="dualpath-recorder-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = folder / "recorder.so"
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Unavailable("power losses are recorded by a C library: install cc (gcc or clang)")
    arguments = [compiler, "-shared", "-fPIC", "-O2", str(_SOURCE), "-o", str(library)]
    done = subprocess.run(
        [*arguments, "-ldl", "-lpthread"],
        capture_output=True,
        text=True,
        timeout=_COMPILE_S_MAX,
        check=False,
    )
    if done.returncode:
        raise Unavailable(f"{compiler} cannot compile {_SOURCE.name}: {done.stderr[:500]}")
    return library


class Recording:
    """The recorder as the recorded process sees it; only where it is preloaded."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        try:
            self._note = library.dualpath_record_note
            self._begin = library.dualpath_record_begin
            self._cut = library.dualpath_record_cut
            self._write = library.dualpath_record_write
            self._fail = library.dualpath_record_fail
            self._end = library.dualpath_record_end
        except AttributeError as error:
            raise Unavailable("the recorder is not preloaded into this process") from error
        self._note.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
        self._begin.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long]
        self._write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
        self._end.argtypes = [ctypes.c_char_p, ctypes.c_long]
        self._fail.argtypes = [ctypes.c_char_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint64]

    def begin(self, root: Path, log: Path, cut: int = 0) -> None:
        """Record changes below `root` from now on; kill this process before change `cut`. Raises
        Unavailable, also where programs that this one starts would not be recorded."""
        library = os.environ.get(LIBRARY_VARIABLE, "")
        if not Path(library).is_file():
            raise Unavailable(f"the recorder {library!r} is gone: no child would be recorded")
        if self._begin(os.fsencode(root), os.fsencode(log), cut):
            raise Unavailable(f"cannot record {root} to {log}")

    def fail(self, faults: Faults) -> None:
        """Have files fail that are opened from now on."""
        million = 1_000_000
        writes, syncs = int(faults.writes * million), int(faults.syncs * million)
        if self._fail(faults.files.encode(), writes, syncs, faults.seed):
            raise Unavailable(f"{faults.files!r} is too long a part of a path")

    def end(self, files: str, syncs: int) -> None:
        """Kill this process before so many syncs of files whose path holds `files`."""
        if self._end(files.encode(), syncs):
            raise Unavailable(f"{files!r} is too long a part of a path")

    def note(self, text: bytes) -> None:
        """Say something, in order with the changes."""
        self._note(text, len(text))

    def may_be_cut(self) -> None:
        """A change that passes the recorder by is about to happen: it counts for the cut."""
        self._cut()

    def written(self, fd: int, offset: int, address: int, nbytes: int) -> None:
        """Tell of a write that went past libc, once it has happened."""
        self._write(fd, address, nbytes, offset)


@cache
def recording() -> Recording:
    """The recorder of this process. Raises Unavailable."""
    return Recording()


def read_log(path: Path) -> Iterator[Record]:
    """The records of a log; a last one that is cut ends it."""
    raw = path.read_bytes()
    at = 0
    while at + _RECORD.size <= len(raw):
        kind, handle, a, b, nbytes = _RECORD.unpack_from(raw, at)
        at += _RECORD.size
        if at + nbytes > len(raw):
            return
        yield Record(Change(kind), handle, a, b, raw[at : at + nbytes])
        at += nbytes
