"""Reads a durable index without trusting it: in a child process, with a deadline.

LMDB believes its file. A damaged one can end its reader by a signal or lead it in circles, so a
child walks it and sends what it sees; the parent takes what comes in the order of keys, and knows
by a last frame whether that was all. Never writes to the index.

A frame: u16 bytes of the key, u32 bytes of the value, key, value. The last one: 0xFFFF, count.
"""

from __future__ import annotations

import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import lmdb

_FRAME = struct.Struct("<HI")
_END = 0xFFFF
_READ_BYTES = 1 << 20
_SILENCE_S_MAX = 60.0
"""How long the child may say nothing."""


class IndexDump:
    """One walk through the index in `path`. Iterate, then look at `failure`. An index whose bytes
    are known to be good (`trusted`) is walked in this process."""

    def __init__(self, path: Path, *, trusted: bool = False) -> None:
        self._path = path
        self._trusted = trusted
        self.failure = ""
        """Why the walk did not come to its end; "" if it did."""

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        """(key, value) in the order of keys, as far as the walk comes."""
        if self._trusted:
            with _opened(self._path) as env, env.begin() as txn:
                yield from txn.cursor()
            return
        with subprocess.Popen(
            [sys.executable, "-m", __name__, str(self._path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as child:
            assert child.stdout is not None
            try:
                yield from self._frames(child.stdout)
            finally:
                child.kill()
            if self.failure:
                assert child.stderr is not None
                said = child.stderr.read(500).decode(errors="replace").strip().splitlines()
                self.failure += f" ({said[-1]})" if said else ""

    def _frames(self, pipe: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
        buffer = bytearray()
        before = b""
        count = 0
        while True:
            at = 0
            while len(buffer) - at >= _FRAME.size:
                key_bytes, value_bytes = _FRAME.unpack_from(buffer, at)
                if key_bytes == _END:
                    if value_bytes != count & 0xFFFFFFFF:
                        self.failure = f"{count} of {value_bytes} records arrived"
                    return
                start = at + _FRAME.size
                end = start + key_bytes + value_bytes
                if end > len(buffer):
                    break
                key = bytes(buffer[start : start + key_bytes])
                if key <= before:
                    self.failure = f"keys are out of order after {count} records"
                    return
                before = key
                count += 1
                yield key, bytes(buffer[start + key_bytes : end])
                at = end
            del buffer[:at]
            more = _read(pipe, time.monotonic() + _SILENCE_S_MAX)
            if more is None:
                self.failure = f"the walk stood still for {_SILENCE_S_MAX:.0f} s"
                return
            if not more:
                self.failure = f"the walk ended after {count} records"
                return
            buffer += more


def _read(pipe: IO[bytes], deadline: float) -> bytes | None:
    """Some bytes, b"" at the end, None when the time is over."""
    ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
    return os.read(pipe.fileno(), _READ_BYTES) if ready else None


def _opened(path: Path) -> lmdb.Environment:
    size = max((path / "data.mdb").stat().st_size, 1 << 20)
    return lmdb.open(str(path), readonly=True, lock=False, create=False, map_size=size)


def _walk(path: Path) -> None:
    """The child: send every record."""
    out = sys.stdout.buffer
    count = 0
    with _opened(path).begin(buffers=True) as txn:
        for key, value in txn.cursor():
            out.write(_FRAME.pack(len(key), len(value)))
            out.write(key)
            out.write(value)
            count += 1
    out.write(_FRAME.pack(_END, count & 0xFFFFFFFF))
    out.flush()


if __name__ == "__main__":
    _walk(Path(sys.argv[1]))
