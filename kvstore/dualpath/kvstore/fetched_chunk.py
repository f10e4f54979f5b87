"""A chunk of a block in the arena, held until it is released."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from dualpath.transfer.region import Region
from dualpath.transfer.slices import Slices


class ArenaChunk:
    """See store_api.FetchedChunk. `on_release` is called once, on the first release."""

    __slots__ = ("_on_release", "_region", "_slices")

    def __init__(self, region: Region, slices: Slices, on_release: Callable[[], None]) -> None:
        self._region = region
        self._slices = slices
        self._on_release: Callable[[], None] | None = on_release

    @property
    def region(self) -> Region:
        """The arena."""
        return self._region

    @property
    def slices(self) -> Slices:
        """Where in the arena."""
        return self._slices

    def release(self) -> None:
        """Give the memory back. Idempotent."""
        on_release, self._on_release = self._on_release, None
        if on_release is not None:
            on_release()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release."""
        self.release()
