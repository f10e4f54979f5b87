"""`FetchedBatch`: many chunks in memory, or on their way there. The port, and what becomes of each.

Arrays throughout: index i is the i-th chunk that was asked for.
"""

from __future__ import annotations

from types import TracebackType
from typing import Final, Protocol, Self

import numpy as np
from dualpath.transfer.region import Region
from numpy.typing import NDArray


class FetchStatus:
    """What became of a chunk. Plain integers: they live in an array."""

    OK: Final = 0
    UNDER_WAY: Final = 1
    CORRUPT: Final = 2
    """The medium failed or the bytes are wrong: the block was dropped, now or earlier."""
    UNAVAILABLE: Final = 3
    """The medium did not answer in time; nothing was dropped: ask again."""
    GONE: Final = 4
    """The block left since its lease was given, and not for its bytes: look up again."""


class FetchedBatch(Protocol):
    """Chunks that stay in place until released; a context manager that releases all.

    One thread at a time may call, but chunks that were told may be released from any. `offsets`
    lie in `region`; a chunk's bytes may be looked at once its `status` is OK.
    """

    @property
    def region(self) -> Region:
        """The memory that holds the chunks."""

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where each chunk begins."""

    @property
    def nbytes(self) -> NDArray[np.int64]:
        """Bytes of each chunk."""

    @property
    def status(self) -> NDArray[np.uint8]:
        """A FetchStatus each."""

    @property
    def ok(self) -> bool:
        """Whether every chunk is there."""

    def __len__(self) -> int:
        """Chunks of the batch: the leading ones of those asked for, as many as buffers allow."""

    def arrived(self, timeout_s: float) -> NDArray[np.int32]:
        """Chunks that are no longer UNDER_WAY and were not told before, as soon as there is one;
        none when the time is over or all were told. Keeps the reads going: a batch that nobody
        asks stands still."""

    def finish(self) -> None:
        """Wait for all, at most the store's `read_wait_s` seconds: what is missing then is
        UNAVAILABLE."""

    def release(self, chunks: NDArray[np.int32] | None = None) -> None:
        """Give back some chunks (each once), or all that are left. Reads under way are given up:
        their memory follows when the medium has let go of it."""

    def __enter__(self) -> Self:
        """Return self."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release all."""
