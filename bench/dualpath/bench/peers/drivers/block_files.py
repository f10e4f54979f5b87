"""The plainest disk tier: one file a block, O_DIRECT, eight threads. No peer: a yardstick.

settings: folder.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness import serve

THREADS = 8


class Driver:
    """See harness."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.version = f"{THREADS} threads"
        self.server_pids: list[int] = []
        self._folder = Path(settings["folder"]) / "blocks"

    def start(self) -> None:
        self._folder.mkdir()
        self._threads = ThreadPoolExecutor(THREADS)

    def open(self, block_bytes: int, pieces: int, piece_blocks: int) -> None:
        """Files are made as blocks come."""

    def _write(self, key: str, block: memoryview) -> None:
        file = os.open(self._folder / key, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        try:
            if os.pwrite(file, block, 0) != block.nbytes:
                raise OSError("short write")
        finally:
            os.close(file)

    def _read(self, key: str, place: memoryview) -> None:
        file = os.open(self._folder / key, os.O_RDONLY | os.O_DIRECT)
        try:
            if os.preadv(file, [place], 0) != place.nbytes:
                raise OSError("short read")
        finally:
            os.close(file)

    def put(self, keys: list[str], blocks: list[memoryview]) -> None:
        list(self._threads.map(self._write, keys, blocks))

    def get(self, keys: list[str], places: list[memoryview]) -> None:
        list(self._threads.map(self._read, keys, places))

    def forget(self, keys: list[str]) -> None:
        for key in keys:
            (self._folder / key).unlink()

    def settle(self) -> None:
        """Not durable: like most of the others."""

    def chill(self) -> None:
        """O_DIRECT: nothing is in the page cache."""

    def close(self) -> None:
        self._threads.shutdown()


if __name__ == "__main__":
    serve(Driver)
