"""For which ratios of prefill to decode nodes both paths run with no bottleneck but storage's.

The formulas are those of arXiv 2602.21548, for balanced load with every storage NIC busy. With
s = storage bandwidth of a node / bandwidth of one CNIC, and g GPUs (and CNICs) a node:

    prefill CNIC write   P/D >= s / (g - s)
    decode CNIC read     P/D <= (g - 2s) / s
    decode CNIC write    P/D <= (g - s) / 2s
    decode DRAM          P/D <= (M / (B s) - 3) / 2      half duplex, M a node
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from dualpath.transfer.errors import InvalidRequest

GPUS_PER_NODE_MAX = 1024


@dataclass(frozen=True, slots=True)
class NodeRates:
    """Of one node, prefill or decode. Bytes a second, each direction; DRAM both together.

    Raises InvalidRequest for rates that are not positive and finite.
    """

    gpus: int
    snic_bytes_per_s: float
    cnic_bytes_per_s: float
    dram_bytes_per_s: float

    def __post_init__(self) -> None:
        if not 1 <= self.gpus <= GPUS_PER_NODE_MAX:
            raise InvalidRequest(f"a node has 1..{GPUS_PER_NODE_MAX} GPUs, not {self.gpus}")
        for name in ("snic", "cnic", "dram"):
            value = getattr(self, f"{name}_bytes_per_s")
            if not math.isfinite(value) or value <= 0:
                raise InvalidRequest(
                    f"the rate of the {name.upper()} is {value} bytes/s; it must be above 0: "
                    f"give --{name} as 400Gb or 50GB/s"
                )

    @property
    def storage_share(self) -> float:
        """s: the storage bandwidth of a node over that of one CNIC."""
        return self.snic_bytes_per_s / self.cnic_bytes_per_s


@dataclass(frozen=True, slots=True)
class RatioBound:
    """What one device allows: P/D at least (`least`) or at most `ratio`."""

    device: str
    ratio: float
    least: bool


@dataclass(frozen=True, slots=True)
class BottleneckRange:
    """`low` <= P/D <= `high`; none where `empty`. `bounds` has every device's."""

    bounds: tuple[RatioBound, ...]

    @property
    def low(self) -> float:
        """The greatest of the lower bounds; infinite where no ratio is enough."""
        return max(bound.ratio for bound in self.bounds if bound.least)

    @property
    def high(self) -> float:
        """The least of the upper bounds; 0 or less where no ratio is small enough."""
        return min(bound.ratio for bound in self.bounds if not bound.least)

    @property
    def empty(self) -> bool:
        """Whether some device binds before storage, whatever the ratio."""
        return self.high <= 0 or self.low > self.high

    def holds(self, prefill: int, decode: int) -> bool:
        """Whether P prefill and D decode nodes lie in it; on a bound counts."""
        ratio = prefill / decode
        return not self.empty and self.low * (1 - 1e-12) <= ratio <= self.high * (1 + 1e-12)


def bottleneck_range(rates: NodeRates) -> BottleneckRange:
    """See the module docstring."""
    share, gpus = rates.storage_share, rates.gpus
    room = gpus - share
    dram = rates.dram_bytes_per_s / rates.snic_bytes_per_s
    return BottleneckRange(
        (
            RatioBound("prefill CNIC write", share / room if room > 0 else math.inf, True),
            RatioBound("decode CNIC read", (gpus - 2 * share) / share, False),
            RatioBound("decode CNIC write", room / (2 * share), False),
            RatioBound("decode DRAM", (dram - 3) / 2, False),
        )
    )


def as_ratio(value: float) -> str:
    """`1/7`, `7/2`, `3`; decimals where no small fraction is near; `none` for infinite."""
    if not math.isfinite(value):
        return "none"
    near = Fraction(value).limit_denominator(16)
    return str(near) if abs(float(near) - value) <= 1e-6 * abs(value) else f"{value:.3g}"
