"""Limits and patience of the dispatcher, read once by whoever creates it."""

from __future__ import annotations

from dataclasses import dataclass, field

from dualpath.transfer.credit import CreditConfig
from dualpath.transfer.rates import RateConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchConfig:
    """Seconds and counts.

    - `loads_max` loads at once, `attempts_max` tries of a chunk.
    - `stall_s`: a path without progress for that long has stalled; slow ones get up to
      `stall_s_max`.
    - `backoff_s` after a loss, doubled for each further one up to `backoff_s_max`; `pause_s` and
      `pause_s_max` likewise after a path said that it is overloaded.
    - `trial_pause_s_max`: as `backoff_s_max`, after a trial failed that no load waits for.
    - `overtake_s`: chunks in flight are worth taking back from a slow path for an idle one if
      the load then ends that much sooner.
    - `recheck_s`: how often an idle path that left chunks to faster ones is asked again.
    - `report_ttl_s`: what a node said about its queue is forgotten then, so that a path which is
      not used gets another chance.
    """

    loads_max: int = 1024
    attempts_max: int = 2
    stall_s: float = 2.0
    stall_s_max: float = 20.0
    backoff_s: float = 0.25
    backoff_s_max: float = 8.0
    trial_pause_s_max: float = 0.5
    pause_s: float = 0.020
    pause_s_max: float = 1.0
    overtake_s: float = 0.25
    recheck_s: float = 0.020
    report_ttl_s: float = 2.0
    credit: CreditConfig = field(default_factory=CreditConfig)
    rate: RateConfig = field(default_factory=RateConfig)

    def __post_init__(self) -> None:
        assert self.loads_max >= 1
        assert self.attempts_max >= 1
        assert 0 < self.stall_s <= self.stall_s_max
        assert 0 < self.backoff_s <= self.backoff_s_max
        assert self.trial_pause_s_max > 0
        assert 0 < self.pause_s <= self.pause_s_max
        assert self.overtake_s > 0
        assert self.recheck_s > 0
        assert self.report_ttl_s >= 0
