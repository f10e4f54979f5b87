"""What a path is asked for at once, and the reasons for which chunks of it come back unblamed."""

from __future__ import annotations

from dataclasses import dataclass

OVERLOADED_REASON = "overloaded"
CANCELLED_REASON = "cancelled"
OVERTAKEN_REASON = "overtaken"
STALLED_REASON = "stalled"
UNBLAMED_REASONS = frozenset({OVERLOADED_REASON, CANCELLED_REASON, OVERTAKEN_REASON})
"""Reasons of `Dispatcher.failed` that are no attempt of the chunk."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Fetch these chunks of a load by this path, in this order; `nbytes` together."""

    load_id: str
    path: str
    chunks: tuple[int, ...]
    nbytes: int
