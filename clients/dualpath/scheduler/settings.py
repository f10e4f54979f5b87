"""Numbers of the policies, and limits of the scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from dualpath.scheduler.checks import check_count, check_positive
from dualpath.transfer.errors import InvalidRequest

COLLECT_AFTER = 50_000
"""New objects between two passes of a scheduling process's garbage collector: with a million
requests in memory, one after each 700 would take more time than the decisions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySettings:
    """The paper's numbers (arXiv 2602.21548, "Scheduler").

    - `alpha_tokens`: a storage link with more tokens waiting is passed over while another is not:
      what it reads in 3 s.
    - `beta_tokens`: a prefill engine with more unfinished tokens gets no more: what one GPU
      computes in 5 s. 0: `beta_s` times what the nodes of a group say, the slowest of them
      (`NodeSpec.compute_tokens_per_s`). No default could stand for it: tokens of prompts include
      hits, so it depends on model, GPU and hit rate: many times as much at 98 % as at 40 %.
    - `alpha_s`, `beta_s`: the seconds that these stand for, by which queues of both are compared.
    - `decode_headroom`: how far above the mean a decode engine may be filled.

    alpha and beta are profiled; `profiled` makes them of two rates. Raises InvalidRequest.
    """

    alpha_tokens: float
    beta_tokens: float
    decode_headroom: float = 1.05
    alpha_s: float = 3.0
    beta_s: float = 5.0

    def __post_init__(self) -> None:
        check_positive("alpha_tokens", self.alpha_tokens)
        check_count("beta_tokens", self.beta_tokens)
        check_positive("decode_headroom", self.decode_headroom)
        check_positive("alpha_s", self.alpha_s)
        check_positive("beta_s", self.beta_s)

    @classmethod
    def profiled(
        cls,
        *,
        read_tokens_per_s: float,
        compute_tokens_per_s: float,
        alpha_s: float = 3.0,
        beta_s: float = 5.0,
    ) -> PolicySettings:
        """From what a node's storage links read and what one GPU computes, in tokens a second."""
        check_positive("read_tokens_per_s", read_tokens_per_s)
        check_positive("compute_tokens_per_s", compute_tokens_per_s)
        return cls(
            alpha_tokens=alpha_s * read_tokens_per_s,
            beta_tokens=beta_s * compute_tokens_per_s,
            alpha_s=alpha_s,
            beta_s=beta_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What one scheduler takes on.

    - `requests_max`: requests that it knows at once, queued and assigned.
    - `engines_max`, `groups_max`, `nodes_max`: registered at once.
    - `fetch_max`: assignments that one fetch returns; whoever gets so many fetches again at once.
    - `queue_s`: a request that has not been assigned for so long fails; 0: never.
    - `attempts_max`: how often a request is assigned in all, before the loss of its engine fails
      it.
    """

    requests_max: int = 1_000_000
    engines_max: int = 32_768
    groups_max: int = 8_192
    nodes_max: int = 8_192
    fetch_max: int = 256
    queue_s: float = 0.0
    attempts_max: int = 3

    def __post_init__(self) -> None:
        for name in ("requests_max", "engines_max", "groups_max", "nodes_max", "fetch_max"):
            value = getattr(self, name)
            if value < 1:
                raise InvalidRequest(f"{name} is {value}; give at least 1")
        check_count("queue_s", self.queue_s)
        check_positive("attempts_max", self.attempts_max)
