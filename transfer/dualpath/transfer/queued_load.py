"""A load in the dispatcher's queue: its chunks, where it is placed, what happened to it."""

from __future__ import annotations

from collections import Counter

from dualpath.transfer.chunk_queue import ChunkQueue
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.placement import LoadView, PlacementPolicy


class QueuedLoad:
    """`seq` orders loads by arrival; `hint` names the only paths it may ever use (empty: all).

    `paths` may take its fresh chunks; `queued` are the paths in whose queue it stands now, which
    for chunks that have failed may be more. The dispatcher alone changes these.
    """

    __slots__ = (
        "accounted_bytes",
        "chunks",
        "events",
        "hint",
        "paths",
        "policy",
        "queued",
        "seq",
        "shares",
        "view",
    )

    def __init__(
        self,
        seq: int,
        view: LoadView,
        chunks: ChunkQueue,
        policy: PlacementPolicy,
        hint: frozenset[str],
    ) -> None:
        self.seq = seq
        self.view = view
        self.chunks = chunks
        self.policy = policy
        self.hint = hint
        self.paths: tuple[str, ...] = ()
        self.queued: frozenset[str] = frozenset()
        self.accounted_bytes = 0
        """Waiting bytes that the path table counts for `paths`."""
        self.shares: Counter[str] = Counter()
        """Verified bytes by path."""
        self.events: Counter[str] = Counter()

    def check(self, chunk: int) -> None:
        """Raise InvalidRequest unless the load has such a chunk."""
        count = len(self.chunks.nbytes)
        if not 0 <= chunk < count:
            raise InvalidRequest(
                f"chunk {chunk} is outside of 0..{count - 1} of load {self.view.load_id!r}"
            )
