"""Which chunk goes by which path, and when: all loads of one agent.

Owns the queue of loads, the credit of each path, and what happens when a chunk or a path fails.
A pure state machine: no I/O, no threads, no clock; `now` (seconds, monotonic) is passed in.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from dualpath.transfer.credit import CreditConfig
from dualpath.transfer.placement import PathKind, PathView, PlacementPolicy
from dualpath.transfer.rates import RateConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchConfig:
    """Limits; bytes, seconds, counts."""

    loads_max: int = 1024
    attempts_max: int = 2
    stall_s: float = 2.0
    stall_s_max: float = 20.0
    backoff_s: float = 0.25
    backoff_s_max: float = 8.0
    pause_s: float = 0.020
    pause_s_max: float = 1.0
    report_ttl_s: float = 2.0
    credit: CreditConfig = field(default_factory=CreditConfig)
    rate: RateConfig = field(default_factory=RateConfig)


@dataclass(frozen=True, slots=True)
class Grant:
    """Fetch these chunks of a load by this path, in this order; `nbytes` together."""

    load_id: str
    path: str
    chunks: tuple[int, ...]
    nbytes: int


class Dispatcher:
    """Signatures first: bodies follow in the next commit."""

    def __init__(self, config: DispatchConfig) -> None:
        raise NotImplementedError

    def add_path(self, name: str, kind: PathKind, now: float, limit_bytes_per_s: float = 0) -> None:
        """Register a path, up. Raises InvalidRequest if known."""
        raise NotImplementedError

    def remove_path(self, name: str, now: float) -> dict[str, tuple[int, ...]]:
        """Forget a path; returns by load the chunks that it had in flight (given back)."""
        raise NotImplementedError

    def set_up(self, name: str, up: bool, now: float) -> None:
        """up: use it again at once, forget its backoff. Not up: no new grants until set up again;
        what is in flight stays (use path_lost to give it back)."""
        raise NotImplementedError

    def report_queue(self, name: str, queue_bytes: int, now: float) -> None:
        """What the path's node says waits there for others."""
        raise NotImplementedError

    def add_load(
        self,
        load_id: str,
        chunk_nbytes: Sequence[int],
        policy: PlacementPolicy,
        now: float,
        *,
        decode_peer: str = "",
        allowed: Collection[str] = (),
    ) -> None:
        """Queue a load. InvalidRequest: duplicate id, bad chunk, no such path; Overloaded."""
        raise NotImplementedError

    def grants(self, now: float) -> list[Grant]:
        """What to fetch now; call after every event and when next_event_s has passed."""
        raise NotImplementedError

    def verified(self, load_id: str, chunk: int, path: str, now: float) -> bool:
        """A chunk has landed and its checksum holds. False: it was not in flight there (late)."""
        raise NotImplementedError

    def failed(self, load_id: str, chunk: int, path: str, reason: str, now: float) -> bool:
        """True: it will be tried again (or the report is late); False: attempts are used up."""
        raise NotImplementedError

    def path_lost(self, name: str, reason: str, now: float) -> dict[str, tuple[int, ...]]:
        """The path is down for a backoff; returns by load the chunks given back."""
        raise NotImplementedError

    def drop(self, load_id: str, chunks: Collection[int]) -> dict[str, tuple[int, ...]]:
        """Never load these; returns by path those in flight."""
        raise NotImplementedError

    def remove_load(self, load_id: str) -> dict[str, tuple[int, ...]]:
        """Forget a load; returns by path what was in flight. Unknown: {}."""
        raise NotImplementedError

    def is_done(self, load_id: str) -> bool:
        """Whether every chunk is verified or dropped. Raises InvalidRequest if unknown."""
        raise NotImplementedError

    def inflight(self, load_id: str) -> dict[str, tuple[int, ...]]:
        """Chunks in flight by path."""
        raise NotImplementedError

    def shares(self, load_id: str) -> Mapping[str, int]:
        """Verified bytes of the load by path."""
        raise NotImplementedError

    def events(self, load_id: str) -> Mapping[str, int]:
        """Failures and fallbacks of one load by reason, as in `counters`."""
        raise NotImplementedError

    def stalled(self, now: float) -> tuple[str, ...]:
        """Paths with grants in flight and no progress for stall_s (longer for slow paths)."""
        raise NotImplementedError

    def next_event_s(self, now: float) -> float:
        """Seconds from `now` until `stalled` or `grants` may answer anew; inf if never."""
        raise NotImplementedError

    def views(self, now: float) -> tuple[PathView, ...]:
        """All paths in the order of add_path."""
        raise NotImplementedError

    @property
    def counters(self) -> Mapping[str, int]:
        """Events of all loads by reason since the start."""
        raise NotImplementedError
