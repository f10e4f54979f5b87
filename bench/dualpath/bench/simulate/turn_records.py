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
_TIMES = COLUMNS[:8]
_ROUNDING_S = 1e-6


class TurnRecords:
    """`add` once a turn; `column` for figures."""

    def __init__(self) -> None:
        self._columns = {name: array("d") for name in COLUMNS}
        self._agent = array("l")
        self._generate = array("l")
        self._hit = array("l")
        self._appends = [self._columns[name].append for name in COLUMNS]

    def __len__(self) -> int:
        return len(self._generate)

    def add(self, job: Job) -> None:
        """A turn is done. A time before an earlier one's is a mistake of the simulator."""
        values = (
            job.arrive_s,
            job.assigned_s,
            job.read_begin_s,
            job.read_end_s,
            job.prefill_s,
            job.first_token_s,
            job.decode_s,
            job.done_s,
            job.bytes_by_prefill,
            job.bytes_by_decode,
        )
        last = 0.0
        for name, value in zip(_TIMES, values, strict=False):
            assert value >= last - _ROUNDING_S, f"turn {job.id}: {name} {value} before {last}"
            last = value
        for append, value in zip(self._appends, values, strict=True):
            append(value)
        self._agent.append(job.agent)
        self._generate.append(job.generate)
        self._hit.append(job.hit)

    def column(self, name: str) -> NDArray[np.float64]:
        """One of COLUMNS, a value a turn in the order of their ends."""
        return np.frombuffer(self._columns[name], dtype=np.float64)

    @property
    def agents(self) -> NDArray[np.int64]:
        """Whose each turn was; an agent's own are in their order."""
        return np.frombuffer(self._agent, dtype=np.int64)

    @property
    def generate(self) -> NDArray[np.int64]:
        """Tokens that each turn generated."""
        return np.frombuffer(self._generate, dtype=np.int64)

    @property
    def hit_tokens(self) -> int:
        """Of all turns."""
        return int(np.frombuffer(self._hit, dtype=np.int64).sum()) if len(self) else 0

    def ttft_s(self) -> NDArray[np.float64]:
        """From a request's arrival to its first token, which the prefill makes."""
        return self.column("first_token_s") - self.column("arrive_s")

    def tpot_s(self) -> NDArray[np.float64]:
        """Seconds a token after the first, of turns that have more than one: the way to the decode
        engine is part of it."""
        several = self.generate > 1
        took = self.column("done_s") - self.column("first_token_s")
        return took[several] / (self.generate[several] - 1)
