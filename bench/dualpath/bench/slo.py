"""What a service promises of its turns, and its spelling: `ttft=4s,tpot=50ms`. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dualpath.cli.config_file import nearest
from dualpath.cli.sizes import parse_seconds
from dualpath.transfer.errors import InvalidRequest

_PROMISES = ("ttft", "tpot")


@dataclass(frozen=True, slots=True)
class Slo:
    """What a turn may take, seconds; infinite: no promise."""

    ttft_s: float = math.inf
    tpot_s: float = math.inf

    def excess(self, ttft_s: float, tpot_s: float) -> float:
        """The larger of both times over what is promised: at most 1 where the SLO is kept, 0
        without a promise. A time that is not known (nan) breaks none."""
        shares = (ttft_s / self.ttft_s, tpot_s / self.tpot_s)
        return max((share for share in shares if not math.isnan(share)), default=0.0)

    def to_json(self) -> dict[str, float | None]:
        """Seconds; None where nothing is promised."""
        return {
            "ttft_s": self.ttft_s if math.isfinite(self.ttft_s) else None,
            "tpot_s": self.tpot_s if math.isfinite(self.tpot_s) else None,
        }


PAPER_SLO = Slo(ttft_s=4.0, tpot_s=0.05)
"""Of the paper's online runs (arXiv 2602.21548)."""


def parse_slo(text: str) -> Slo:
    """`ttft=4s,tpot=50ms`, either or both. Raises InvalidRequest."""
    values = dict.fromkeys(_PROMISES, math.inf)
    for part in filter(None, (each.strip() for each in text.split(","))):
        key, separator, value = part.partition("=")
        key = key.strip()
        if key not in _PROMISES:
            raise InvalidRequest(
                f"--slo {text!r}: unknown promise '{key}'{nearest(key, _PROMISES)}"
            )
        if not separator or math.isfinite(values[key]):
            raise InvalidRequest(f"--slo {text!r}: give {key}=TIME once, such as {key}=50ms")
        try:
            values[key] = parse_seconds(value)
        except InvalidRequest as error:
            raise InvalidRequest(f"--slo {key}: {error}") from error
        if values[key] <= 0:
            raise InvalidRequest(f"--slo {key}={value}: nothing is answered in no time")
    return Slo(ttft_s=values["ttft"], tpot_s=values["tpot"])
