"""Which chunks in flight to take back from a slow path because an idle one would be sooner.

Owns that one decision. A path can turn slow after chunks were granted to it, or never answer at
all; then the end of a split load would wait for them while its other paths are idle. The newest
chunks are taken back, as many as lets both paths end together. Loads of a fixed policy, and those
whose sides have shares, stay where they are. Nothing is duplicated: the caller fences the chunks
first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dualpath.transfer.path_table import PathTable
from dualpath.transfer.queued_load import QueuedLoad


def overtaken(
    paths: PathTable, loads: Iterable[QueuedLoad], gain_s: float, now: float
) -> Iterator[tuple[QueuedLoad, str, tuple[int, ...]]]:
    """Yield (load, path, chunks) where taking back saves the load at least `gain_s`."""
    idle = {
        path.name: path.rate_bytes_per_s(now)
        for path in paths
        if not path.inflight_chunks and not path.queue and path.dependable(now)
    }
    slow = [path for path in paths if path.inflight_chunks and path.drains_after(gain_s, now)]
    if not slow or not any(idle.values()):
        return
    budgets: dict[str, float] = {}
    for load in loads:
        quick_rate = sum(idle.get(name, 0.0) for name in load.paths)
        if len(load.paths) < 2 or load.policy.direct_share is not None or not quick_rate:
            continue
        for path in slow:
            slow_rate = path.rate_while_busy(now)
            ends_in_s = path.inflight_bytes / slow_rate if slow_rate else 0.0
            part = quick_rate / (slow_rate + quick_rate)
            if ends_in_s * part < gain_s:
                continue
            left = budgets.setdefault(path.name, path.inflight_bytes * part)
            chunks = []
            for chunk, name in reversed(load.chunks.inflight.items()):
                nbytes = load.chunks.nbytes[chunk]
                if name == path.name and nbytes <= 2 * left:  # to the nearest chunk
                    chunks.append(chunk)
                    left -= nbytes
            budgets[path.name] = left
            if chunks:
                yield load, path.name, tuple(sorted(chunks))
