"""Which whole extent to empty, when a size class needs space that others hold. Pure.

An extent (a segment, a run of slabs) can be given to another size class only when it is empty.
Evicting block after block would empty none before nearly all had gone; so one extent is chosen, the
one whose blocks were used longest ago on average, and its blocks leave together.

Cost: numpy operations over all rows of the tier, once an extent, not once a block.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def coldest_extents(
    extents: NDArray[np.integer], used: NDArray[np.int64], blocked: NDArray[np.bool_]
) -> list[int]:
    """The extents of rows that were used longest ago first. `extents[i]` is where row i lies,
    `used[i]` rises with its last use; an extent with a blocked row is left out."""
    if not len(extents):
        return []
    count, cold = means(extents, used, blocked)
    order = np.argsort(cold, kind="stable")
    return [int(extent) for extent in order if count[extent] and np.isfinite(cold[extent])]


def coldest_window(
    run_of: NDArray[np.integer],
    runs: NDArray[np.integer],
    used: NDArray[np.int64],
    blocked: NDArray[np.bool_],
    length: int,
) -> tuple[int, int] | None:
    """(first, end) of the neighbouring slabs to empty, so that `length` are free in a row; None
    if there are none. `run_of[slab]` names the run that it belongs to, -1 if it is free; row i
    lies in `runs[i]`. A run that the window touches is emptied as a whole."""
    slabs = len(run_of)
    if length > slabs:
        return None
    _, cold = means(runs, used, blocked, at_least=slabs)
    # Free slabs and empty runs cost nothing.
    of_slab = np.where(run_of < 0, -np.inf, cold[np.maximum(run_of, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(of_slab, length)
    worst = windows.max(axis=1)
    first = int(worst.argmin())
    return (first, first + length) if worst[first] < np.inf else None


def means(
    extents: NDArray[np.integer],
    used: NDArray[np.int64],
    blocked: NDArray[np.bool_],
    at_least: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(rows, mean of `used`) of each extent; the mean is -inf where there is no row, inf where one
    is blocked."""
    count = np.bincount(extents, minlength=at_least)
    total = np.bincount(extents, weights=used, minlength=at_least)
    cold = np.where(count > 0, total / np.maximum(count, 1), -np.inf)
    cold[np.bincount(extents, weights=blocked, minlength=at_least) > 0] = np.inf
    return count, cold
