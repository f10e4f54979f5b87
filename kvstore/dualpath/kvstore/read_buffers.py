"""The read buffers of an arena: pieces of frames, handed out and taken back by the batch.

Pure bookkeeping: offsets in, offsets out. A frame of 1 MiB, the largest read, is whole or cut into
equal pieces; it is whole again once all its pieces are back and another size needs it. The
pieces that came back last go out first: they are the likeliest to be in the caches.
"""

from __future__ import annotations

import numpy as np
from dualpath.kvstore.chunk_plan import distinct
from dualpath.kvstore.layout import ALIGN_BYTES, CHUNK_BYTES_MAX
from numpy.typing import NDArray

FRAME_BYTES = CHUNK_BYTES_MAX

_FREE = 0
_NOTHING: NDArray[np.int64] = np.empty(0, np.int64)


class ReadBuffers:
    """Bytes [base, base + nbytes), whole frames only. Not thread-safe."""

    def __init__(self, base: int, nbytes: int) -> None:
        frames = nbytes // FRAME_BYTES
        self._base = base
        self._cut: NDArray[np.int16] = np.zeros(frames, np.int16)
        """Pieces that each frame is cut into; _FREE if it is in nobody's hands."""
        self._taken: NDArray[np.int64] = np.zeros(frames, np.int64)
        """Pieces of each frame that are in use."""
        self._frames = list(range(frames - 1, -1, -1))
        self._pieces: dict[int, list[int]] = {}
        self.used_bytes = 0
        """Bytes of the pieces in use."""
        self.capacity_bytes = frames * FRAME_BYTES

    def __repr__(self) -> str:
        return f"<ReadBuffers {self.used_bytes} of {self.capacity_bytes} bytes in use>"

    def take(self, count: int, nbytes: int) -> NDArray[np.int64]:
        """Offsets of up to `count` buffers of at least `nbytes` each (at most FRAME_BYTES), in
        ascending order: what is read into neighbours can be read at once."""
        assert 0 < nbytes <= FRAME_BYTES, nbytes
        cut = FRAME_BYTES // (-(-nbytes // ALIGN_BYTES) * ALIGN_BYTES)
        pieces = self._pieces.setdefault(cut, [])
        if len(pieces) < count:
            self._cut_frames(cut, count)
        count = min(count, len(pieces))
        if count == 0:
            return _NOTHING
        taken = np.array(pieces[-count:], np.int64)
        del pieces[-count:]
        taken.sort()
        self._count((taken - self._base) // FRAME_BYTES, [cut], 1)
        self.used_bytes += count * _piece_bytes(cut)
        return taken

    def give(self, offsets: NDArray[np.int64]) -> None:
        """Take buffers back, of any sizes."""
        if not len(offsets):
            return
        frames = (offsets - self._base) // FRAME_BYTES
        of_each = self._cut[frames]
        cuts = distinct(of_each)
        self._count(frames, cuts, -1)
        for cut in cuts:
            back = (offsets if len(cuts) == 1 else offsets[of_each == cut]).tolist()
            self._pieces[cut] += back
            self.used_bytes -= len(back) * _piece_bytes(cut)

    def _count(self, frames: NDArray[np.int64], cuts: list[int], change: int) -> None:
        """Note that pieces of frames that are cut into so many went or came back."""
        if cuts == [1] or len(frames) == 1:
            self._taken[frames] += change
        else:
            self._taken += change * np.bincount(frames, minlength=len(self._taken))

    def _cut_frames(self, cut: int, count: int) -> None:
        """Have `count` pieces of this size, or as many as there are."""
        pieces = self._pieces[cut]
        if len(self._frames) * cut < count - len(pieces):
            self._join_frames()
        wanted = -(-(count - len(pieces)) // cut)
        if wanted <= 0 or not self._frames:
            return
        frames = self._frames[-wanted:]
        del self._frames[-wanted:]
        self._cut[frames] = cut
        step = _piece_bytes(cut)
        for frame in frames:
            start = self._base + frame * FRAME_BYTES
            pieces += range(start + (cut - 1) * step, start - 1, -step)

    def _join_frames(self) -> None:
        """Frames of which no piece is in use are whole again."""
        idle = (self._cut != _FREE) & (self._taken == 0)
        for cut in np.unique(self._cut[idle]).tolist():
            pieces = np.array(self._pieces[cut], np.int64)
            kept = ~idle[(pieces - self._base) // FRAME_BYTES]
            self._pieces[cut][:] = pieces[kept].tolist()
        self._cut[idle] = _FREE
        self._frames += np.flatnonzero(idle).tolist()


def _piece_bytes(cut: int) -> int:
    return FRAME_BYTES // cut // ALIGN_BYTES * ALIGN_BYTES
