"""The cluster and the load that the scheduler is measured under."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dualpath.transfer.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """`prefill` and `decode` nodes of `gpus` engines each, in groups of so many nodes; requests
    arrive at `rate` a second of virtual time for `seconds` of it, groups report and fetch every
    `interval_s`.

    Prompts have 1 to 2 x `mean_tokens` tokens, all but `append` of them hits: the paper's mean at
    64K by default (arXiv 2602.21548, "Setting of the evaluation"). `prefill_s` and `decode_s` are
    the times that a request stays with its engines, so that `rate` times them are there at once;
    `pressure` is the part of what the engines may have (beta, memory) that this fills.

    Raises InvalidRequest for numbers that are none.
    """

    prefill: int = 48
    decode: int = 96
    gpus: int = 8
    prefill_group: int = 2
    decode_group: int = 4
    rate: float = 50_000
    seconds: float = 2.0
    interval_s: float = 0.02
    mean_tokens: int = 32_721
    append: int = 429
    prefill_s: float = 0.3
    decode_s: float = 2.0
    pressure: float = 0.9
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("prefill", "decode", "gpus", "prefill_group", "decode_group", "mean_tokens"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; give at least 1")
        for name in ("rate", "seconds", "interval_s", "prefill_s", "decode_s", "pressure"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InvalidRequest(f"{name} is {value}; give a number above 0")
        if not 0 <= self.append <= self.mean_tokens:
            raise InvalidRequest(
                f"append is {self.append}; give 0 to mean_tokens ({self.mean_tokens})"
            )

    @property
    def engines(self) -> int:
        """GPUs in all."""
        return (self.prefill + self.decode) * self.gpus

    @property
    def beta_tokens(self) -> float:
        """So that the prefill engines are `pressure` full."""
        live = self.rate * self.prefill_s * self.mean_tokens
        return live / (self.prefill * self.gpus * self.pressure)

    @property
    def hbm_tokens(self) -> int:
        """So that the decode engines are `pressure` full."""
        live = self.rate * (self.prefill_s + self.decode_s) * self.mean_tokens
        return math.ceil(live / (self.decode * self.gpus * self.pressure))

    @property
    def alpha_tokens(self) -> float:
        """The tokens that a node's share of the requests of one interval reads, twice."""
        reads = self.rate * self.interval_s * self.mean_tokens
        return 2 * reads / (self.prefill + self.decode)
