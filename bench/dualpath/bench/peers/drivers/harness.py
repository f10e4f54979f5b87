"""What every driver does alike: the line protocol, the bytes, the clock, the comparison.

A driver is a script that runs in its peer's own environment and imports, beside its peer, only this
module, the standard library and numpy. It calls `serve(Driver)`, where Driver(settings) has

    version                  of the peer, a string
    start()                  once; may replace `source` and `target`
    server_pids              processes whose processor time counts as the server's
    open(block_bytes, pieces, piece_blocks)   before the first put of a size
    put(keys, blocks)        store memory views under keys (strings of hexadecimal digits)
    get(keys, places)        bring them into memory views
    forget(keys)             remove what was put, so that a second put finds memory that was used
    settle()                 after the puts: all is stored
    chill()                  before the gets: what a disk's driver has in the page cache is dropped
    close()

`source` and `target` are the two buffers in which all blocks and places lie: peers that want
registered memory register these. One JSON object a line on stdin, one in answer on stdout:
{"do": "open", ...}, {"do": "run", "block_bytes": n, "total_bytes": n}, {"do": "close"}.

Bytes go in pieces of PIECE_BYTES: the clock runs only inside of put, settle and get. Everything is
put twice, forgotten in between, and the second time counts: memory that was never touched is slow.
After each piece every byte that a get brought is compared with what was put the second time;
before it the places are wiped. What a peer checks by itself is in its time.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import resource
import sys
import time
import traceback
from typing import Any

import numpy as np

PIECE_BYTES = int(os.environ["PEERS_PIECE_BYTES"])
"""What one put or get moves at once."""
_CPUCLOCK_SCHED = 2
_PAGE_WORDS = 512
_GOLDEN = 0x9E3779B97F4A7C15


def buffer(nbytes: int) -> np.ndarray:
    """Zeroed memory on transparent huge pages, every page touched."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, dtype=np.uint8)
    array[:] = 0
    return array


def process_cpu_s(pid: int) -> float:
    """Processor time of another process, all threads."""
    try:
        return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
    except OSError:
        return 0.0


def key_of(block_bytes: int, index: int) -> str:
    """The key of a block."""
    return f"{block_bytes:08x}{index:08x}" * 2


class Content:
    """Bytes of every block: one random page, each page of each block combined with its number."""

    def __init__(self) -> None:
        generator = np.random.Generator(np.random.PCG64(20261122))
        self._page = generator.integers(0, 1 << 63, _PAGE_WORDS, dtype=np.uint64)

    def fill(self, into: np.ndarray, first: int) -> None:
        """Pages numbered from `first` on."""
        pages = into.view(np.uint64).reshape(-1, _PAGE_WORDS)
        numbers = np.arange(first + 1, first + 1 + len(pages), dtype=np.uint64)
        np.bitwise_xor(self._page, (numbers * np.uint64(_GOLDEN))[:, None], out=pages)


class Harness:
    """Runs one driver for one parent."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._content = Content()

    def run(self, block_bytes: int, total_bytes: int) -> dict[str, float]:
        """Put everything, then get everything; seconds and processor seconds of both."""
        driver = self._driver
        piece_bytes = min(PIECE_BYTES, total_bytes)
        pieces = total_bytes // piece_bytes
        count = piece_bytes // block_bytes
        driver.open(block_bytes, pieces, count)
        source, target = driver.source, driver.target
        cut = [slice(at, at + block_bytes) for at in range(0, piece_bytes, block_bytes)]
        blocks = [memoryview(source)[part] for part in cut]
        places = [memoryview(target)[part] for part in cut]
        keys = [
            [key_of(block_bytes, piece * count + i) for i in range(count)]
            for piece in range(pieces)
        ]
        put, get = _Clock(driver), _Clock(driver)
        for number, clock in enumerate((_Clock(driver), put)):
            for piece in range(pieces):
                self._content.fill(source[:piece_bytes], piece * piece_bytes + number)
                clock.measure(driver.put, keys[piece], blocks)
            clock.measure(driver.settle)
            if clock is not put:
                for piece_keys in keys:
                    driver.forget(piece_keys)
        driver.chill()
        for piece in range(pieces):
            target[:piece_bytes] = 0
            get.measure(driver.get, keys[piece], places)
            self._content.fill(source[:piece_bytes], piece * piece_bytes + 1)
            if not np.array_equal(source[:piece_bytes], target[:piece_bytes]):
                raise RuntimeError(f"wrong bytes came back in piece {piece} of {pieces}")
        return {"put_" + name: value for name, value in put.figures().items()} | {
            "get_" + name: value for name, value in get.figures().items()
        }


class _Clock:
    """Sums wall and processor time over calls."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._s = self._client_s = self._server_s = 0.0

    def measure(self, call: Any, *args: Any) -> None:
        client_s, server_s = _own_cpu_s(), self._servers_s()
        began = time.perf_counter()
        call(*args)
        self._s += time.perf_counter() - began
        self._client_s += _own_cpu_s() - client_s
        self._server_s += self._servers_s() - server_s

    def _servers_s(self) -> float:
        return sum(process_cpu_s(pid) for pid in self._driver.server_pids)

    def figures(self) -> dict[str, float]:
        return {"s": self._s, "client_cpu_s": self._client_s, "server_cpu_s": self._server_s}


def _own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def serve(make_driver: Any) -> None:
    """Answer the parent until it closes the input. Peers write to stdout as they like: that goes to
    stderr, the answers go to the descriptor that was stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    driver: Any = None
    harness: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if asked["do"] == "open":
                driver = make_driver(asked["settings"])
                driver.source, driver.target = buffer(PIECE_BYTES), buffer(PIECE_BYTES)
                driver.start()
                # As engines do: nobody pays for a look at all that was imported.
                gc.collect()
                gc.freeze()
                harness = Harness(driver)
                found: dict[str, Any] = {"version": driver.version}
            elif asked["do"] == "run":
                found = harness.run(asked["block_bytes"], asked["total_bytes"])
            else:
                driver.close()
                found = {}
            answer = {"ok": True, **found}
        except BaseException as error:  # noqa: BLE001 - told to the parent, which decides
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # some peers hang in their destructors
