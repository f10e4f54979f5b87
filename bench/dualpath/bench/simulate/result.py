"""What a run gives: times, rates and balances, as figures, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from dualpath.bench.simulate.turn_records import TurnRecords
from numpy.typing import NDArray

STEADY = (0.1, 0.8)
"""Part of the run over which balances are taken: neither the start of all agents at once nor the
end, when few are left."""
ATTENTION_PART = 0.05
"""First part of the run over which the balance of attention is taken, as the paper does."""
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """Seconds and bytes. `snic_windows`: bytes read, a row a storage NIC, a column a window.

    `attention_balance`: see the function.
    """

    system: str
    jct_s: float
    records: TurnRecords
    snic_names: Sequence[str]
    snic_windows: NDArray[np.float64]
    window_s: float
    bytes_read: float
    bytes_stored: float
    attention_balance: float
    prefill_busy: float
    prefill_compute: float
    decode_busy: float
    steps: int
    fetches: int
    events: int

    def snic_balance(self) -> float:
        """Most over mean of the storage NICs that read at all, mean over windows; 1 is even."""
        windows = self.snic_windows
        count = windows.shape[1]
        steady = windows[:, int(STEADY[0] * count) : max(1, int(STEADY[1] * count))]
        steady = steady[windows.any(axis=1)]
        if not steady.size:
            return 1.0
        means = steady.mean(axis=0)
        read = means > 0
        if not read.any():
            return 1.0
        return float((steady.max(axis=0)[read] / means[read]).mean())

    def to_json(self) -> dict[str, object]:
        """Figures only; the turns' records are not in it."""
        records = self.records
        return {
            "system": self.system,
            "jct_s": self.jct_s,
            "turns": len(records),
            "ttft_s": _summary(records.ttft_s()),
            "tpot_s": _summary(records.tpot_s()),
            "ttft_parts_s": self.ttft_parts_s(),
            "bytes_read": self.bytes_read,
            "bytes_read_by_decode_nodes": float(records.column("bytes_by_decode").sum()),
            "bytes_stored": self.bytes_stored,
            "snic_max_over_mean": self.snic_balance(),
            "attention_max_over_mean": self.attention_balance,
            "prefill_busy": self.prefill_busy,
            "prefill_compute": self.prefill_compute,
            "decode_busy": self.decode_busy,
            "events": self.events,
        }

    def ttft_parts_s(self) -> dict[str, float]:
        """Mean seconds of each part of the time to the first token."""
        records = self.records
        times = [
            records.column(name)
            for name in (
                "arrive_s",
                "assigned_s",
                "read_begin_s",
                "read_end_s",
                "prefill_s",
                "first_token_s",
            )
        ]
        names = ("scheduler", "read_queue", "read", "prefill_queue", "prefill")
        return {
            name: float((after - before).mean()) if len(records) else 0.0
            for name, before, after in zip(names, times, times[1:], strict=False)
        }


def attention_balance(steps: Sequence[Sequence[float]], jct_s: float) -> float:
    """The slowest engine's attention over the mean of its group, mean over the steps that begin in
    the first part of the run. `steps`: of each group, three numbers a step: begin, most, mean."""
    ratios = []
    for group in steps:
        table = np.asarray(group).reshape(-1, 3)
        early = table[(table[:, 0] <= ATTENTION_PART * jct_s) & (table[:, 2] > 0)]
        ratios.append(early[:, 1] / early[:, 2])
    found = np.concatenate(ratios) if ratios else np.zeros(0)
    return float(found.mean()) if found.size else 1.0


def _summary(values: NDArray[np.float64]) -> dict[str, float]:
    if not values.size:
        return {}
    found = {"mean": float(values.mean())}
    for percent in PERCENTILES:
        found[f"p{percent}"] = float(np.percentile(values, percent))
    return found
