"""The memory's limit: numpy copies of whole blocks between memory of a given kind of pages.

Also the cost of the checksum alone, which every verified read pays on top of its limit.
"""

from __future__ import annotations

import numpy as np
import xxhash
from dualpath.bench.rounds import Sample
from dualpath.bench.stopwatch import Stopwatch
from numpy.typing import NDArray


def copy_blocks(
    source: memoryview,
    target: memoryview,
    block_bytes: int,
    order: NDArray[np.int64],
) -> Sample:
    """Copy block `order[i]` of the source to place i of the target (as many as fit, in turn)."""
    blocks = np.frombuffer(source, dtype=np.uint8)
    places = np.frombuffer(target, dtype=np.uint8)
    room = len(places) // block_bytes
    starts = (order * block_bytes).tolist()
    with Stopwatch() as watch:
        for index, start in enumerate(starts):
            at = index % room * block_bytes
            np.copyto(places[at : at + block_bytes], blocks[start : start + block_bytes])
    return watch.sample(len(starts) * block_bytes)


def hash_blocks(source: memoryview, chunk_bytes: int) -> Sample:
    """xxh3-64 of every chunk of memory that is larger than the processor's caches."""
    with Stopwatch() as watch:
        for start in range(0, len(source), chunk_bytes):
            xxhash.xxh3_64_intdigest(source[start : start + chunk_bytes])
    return watch.sample(len(source))
