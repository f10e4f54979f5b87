"""What a prefill engine computes next: the requests of one forward batch.

The paper's rule inside a prefill engine: in the order of arrival, while the predicted attention
time stays under the compute quota; the last request's new tokens are cut by binary search, and the
rest of them goes into a later batch (chunked prefill).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dualpath.scheduler.checks import check_positive
from dualpath.transfer.errors import InvalidRequest

PAPER_QUOTA_S = 0.3
"""The paper's compute quota of a forward batch."""


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """What is left of one request: `new` tokens to compute behind `cached` ones."""

    request: str
    cached: int
    new: int

    def __post_init__(self) -> None:
        if self.cached < 0 or self.new < 1:
            raise InvalidRequest(
                f"request '{self.request}' has {self.cached} cached and {self.new} new tokens; "
                f"give at least 0 and 1"
            )


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The works that go in, the last one perhaps cut, and the attention time they are predicted to
    take."""

    works: tuple[PrefillWork, ...]
    attention_s: float


class QuotaBatching:
    """Fills batches under `quota_s` of attention.

    `attention_s(cached, new)` predicts the seconds of one request's attention; it must not fall
    when either grows, and those of a batch add up. The quota holds for every batch, except that
    one new token of the first request goes in whatever it takes, since nothing would ever follow.
    """

    def __init__(
        self,
        attention_s: Callable[[int, int], float],
        *,
        quota_s: float = PAPER_QUOTA_S,
        requests_max: int = 1024,
    ) -> None:
        check_positive("quota_s", quota_s)
        check_positive("requests_max", requests_max)
        self._attention_s = attention_s
        self._quota_s = quota_s
        self._requests_max = requests_max

    def fill(self, waiting: Iterable[PrefillWork]) -> ForwardBatch:
        """The next batch of what waits, in its order; empty if nothing does.

        Raises InvalidRequest if a prediction is negative or no number.
        """
        works: list[PrefillWork] = []
        spent = 0.0
        for work in waiting:
            if len(works) == self._requests_max:
                break
            cost = self._cost(work.cached, work.new)
            if spent + cost <= self._quota_s:
                works.append(work)
                spent += cost
                continue
            new = self._cut(work, spent)
            if new == 0 and not works:
                new = 1
            if new:
                works.append(PrefillWork(work.request, work.cached, new))
                spent += self._cost(work.cached, new)
            break
        return ForwardBatch(tuple(works), spent)

    def _cut(self, work: PrefillWork, spent: float) -> int:
        """The most new tokens, fewer than all, that fit beside `spent`; 0 if none does."""
        fits, exceeds = 0, work.new
        while exceeds - fits > 1:
            middle = (fits + exceeds) // 2
            if spent + self._cost(work.cached, middle) <= self._quota_s:
                fits = middle
            else:
                exceeds = middle
        return fits

    def _cost(self, cached: int, new: int) -> float:
        seconds = self._attention_s(cached, new)
        if not (math.isfinite(seconds) and seconds >= 0):
            raise InvalidRequest(
                f"attention_s({cached}, {new}) is {seconds}; it must predict at least 0 seconds"
            )
        return seconds
