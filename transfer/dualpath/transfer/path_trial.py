"""Which chunk to fetch once more by a path on trial, so that it can prove itself.

Owns that one decision. A path that was lost may still be silent: a chunk that is granted to it
would hold up its load. So a *copy* is fetched, of a chunk that goes by another path as well; it
lands in scratch and is thrown away. Nobody waits for it, and it takes nothing from the load but its
bytes on the path that is tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from dualpath.transfer.path_state import PathCondition, PathState
from dualpath.transfer.path_table import PathTable
from dualpath.transfer.queued_load import QueuedLoad


def chunk_to_try(
    path: PathState, paths: PathTable, loads: Iterable[QueuedLoad]
) -> tuple[QueuedLoad, int] | None:
    """The first load that may use `path` and goes by another meanwhile, and one of its chunks that
    has not failed; None if `path` is not to be tried, or there is none."""
    if path.condition is not PathCondition.TRIAL or path.tried_at_s < math.inf:
        return None
    if path.inflight_chunks:
        return None  # these try it: they were granted while there was no other
    for load in loads:
        if load.hint and path.name not in load.hint:
            continue
        if load.chunks.over or paths.serves(path, load.hint):
            continue
        chunk = load.chunks.next_plain()
        if chunk < 0:
            plain = (each for each in load.chunks.inflight if not load.chunks.failures(each))
            chunk = next(plain, -1)
        if chunk >= 0:
            return load, chunk
    return None
