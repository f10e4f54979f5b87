"""What each turn left behind, in columns: times and bytes. Checks each turn as it comes in."""

from __future__ import annotations

from array import array

import numpy as np
from dualpath.bench.simulate.job import Job
from numpy.typing import NDArray

COLUMNS = (
    "arrive_s",
    "assigned_s",
    "read_begin_s",
    "read_end_s",
    "prefill_s",
    "first_token_s",
    "decode_s",
    "done_s",
    "bytes_by_prefill",
    "bytes_by_decode",
)
_WIDTH = len(COLUMNS) + 3
_ROUNDING_S = 1e-6


class TurnRecords:
    """`add` once a turn; `column` for figures. A row of numbers a turn, one after the other."""

    def __init__(self) -> None:
        self._rows = array("d")

    def __len__(self) -> int:
        return len(self._rows) // _WIDTH

    def add(self, job: Job) -> None:
        """A turn is done. A time before an earlier one's is a mistake of the simulator."""
        arrive, assigned, begin = job.arrive_s, job.assigned_s, job.read_begin_s
        end, prefill, first = job.read_end_s, job.prefill_s, job.first_token_s
        decode, done = job.decode_s, job.done_s
        if not (
            0.0 <= arrive <= assigned + _ROUNDING_S
            and assigned <= begin + _ROUNDING_S
            and begin <= end + _ROUNDING_S
            and end <= prefill + _ROUNDING_S
            and prefill <= first + _ROUNDING_S
            and first <= decode + _ROUNDING_S
            and decode <= done + _ROUNDING_S
        ):
            times = (arrive, assigned, begin, end, prefill, first, decode, done)
            said = ", ".join(f"{name} {at}" for name, at in zip(COLUMNS, times, strict=False))
            raise AssertionError(f"turn {job.id} went back in time: {said}")
        bytes_read = (job.bytes_by_prefill, job.bytes_by_decode)
        row = (arrive, assigned, begin, end, prefill, first, decode, done, *bytes_read)
        self._rows.extend((*row, job.generate, job.hit, job.agent))

    def column(self, name: str) -> NDArray[np.float64]:
        """One of COLUMNS, a value a turn in the order of their ends."""
        return self._column(COLUMNS.index(name))

    @property
    def agents(self) -> NDArray[np.int64]:
        """Whose each turn was; an agent's own are in their order."""
        return self._column(len(COLUMNS) + 2).astype(np.int64)

    @property
    def generate(self) -> NDArray[np.float64]:
        """Tokens that each turn generated."""
        return self._column(len(COLUMNS))

    @property
    def hit_tokens(self) -> int:
        """Of all turns."""
        return int(self._column(len(COLUMNS) + 1).sum())

    def _column(self, index: int) -> NDArray[np.float64]:
        rows = np.frombuffer(self._rows, dtype=np.float64) if self._rows else np.empty(0)
        return rows[index::_WIDTH].copy()

    def ttft_s(self) -> NDArray[np.float64]:
        """From a request's arrival to its first token, which the prefill makes."""
        return self.column("first_token_s") - self.column("arrive_s")

    def tpot_s(self) -> NDArray[np.float64]:
        """Seconds a token after the first, of turns that have more than one: the way to the decode
        engine is part of it."""
        generate = self.generate
        several = generate > 1
        took = self.column("done_s") - self.column("first_token_s")
        return took[several] / (generate[several] - 1)
