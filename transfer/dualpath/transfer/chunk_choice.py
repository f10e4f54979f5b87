"""Which chunk of a load a path should take now: one of two decisions of the dispatcher.

Pure. A path may take a chunk that has failed by another, and the next fresh one if its part of the
load is not used up and the other paths would not be through sooner without it.
"""

from __future__ import annotations

from dualpath.transfer.path_state import PathState
from dualpath.transfer.path_table import PathTable
from dualpath.transfer.placement import relay_of
from dualpath.transfer.queued_load import QueuedLoad


def chunk_for(
    load: QueuedLoad, path: PathState, paths: PathTable, ahead_bytes: int, now: float
) -> int:
    """The chunk of `load` that `path` should take, -1: none. `ahead_bytes` wait before it."""
    if not paths.serves(path, load.hint):
        return -1
    queue = load.chunks
    retry = -1
    if queue.has_retries:
        others = paths.has_other_up(path, load.hint)
        retry = queue.next_retry(path.name, others)
    plain = queue.next_plain() if path.name in load.paths else -1
    if plain < 0 or 0 <= retry < plain:
        return retry
    if len(load.paths) > 1:
        nbytes = queue.nbytes[plain]
        names, left_bytes = load.paths, queue.waiting_bytes
        if load.policy.direct_share is not None:
            names, left_bytes = _side(load, path.name, nbytes)
        if not left_bytes or not paths.worth_taking(
            path, nbytes, names, ahead_bytes + left_bytes, now
        ):
            return retry
    return plain


def _side(load: QueuedLoad, path: str, nbytes: int) -> tuple[tuple[str, ...], int]:
    """The paths of a load that share its part with `path`, and the bytes that are left of that
    part; 0 if `nbytes` more exceed it, to the nearest chunk. While only one side is there, it has
    all that waits. What counts is in flight or verified, so one side always has some left."""
    queue, share = load.chunks, load.policy.direct_share
    assert share is not None
    direct = not relay_of(path)
    names = tuple(name for name in load.paths if direct is not bool(relay_of(name)))
    if len(names) == len(load.paths):
        return names, queue.waiting_bytes
    mine = total = 0
    for name, taken in queue.taken_bytes.items():
        total += taken
        if direct is not bool(relay_of(name)):
            mine += taken
    part = share if direct else 1 - share
    left = part * (total + queue.waiting_bytes) - mine
    return names, (max(nbytes, round(left)) if 2 * left >= nbytes else 0)
