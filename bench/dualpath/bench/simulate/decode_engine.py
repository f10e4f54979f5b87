"""A decode engine: continuous batching, within its memory.

All sequences make a token a step, and how long a step takes depends on how many there are and on
their context (`ComputeModel.decode_step_s`). Between two changes of the batch the time of a step
is taken as constant, so nothing has to be done a step: the engine counts steps as a real number,
a sequence joins at the next whole one, and leaves when the count has grown by its tokens.
"""

from __future__ import annotations

import heapq
import math

from dualpath.bench.models.compute_model import ComputeModel
from dualpath.bench.simulate.cluster import EnginePlace
from dualpath.bench.simulate.job import Job
from dualpath.bench.simulate.virtual_clock import Handler, VirtualClock

STEP_TOLERANCE = 1e-7
"""Parts of a step that rounding may lack at the end of a sequence."""


class DecodeEngine:
    """`promise` keeps memory from the assignment on; `join` begins; `done(job)` ends."""

    __slots__ = (
        "_clock",
        "_context",
        "_done",
        "_hbm_tokens",
        "_joined",
        "_model",
        "_planned_s",
        "_sequences",
        "_since_s",
        "_step_s",
        "_steps",
        "busy_s",
        "changed",
        "place",
        "requests",
        "reserved",
        "tokens",
    )

    def __init__(
        self,
        clock: VirtualClock,
        place: EnginePlace,
        model: ComputeModel,
        done: Handler,
    ) -> None:
        self.place = place
        self.requests = self.tokens = self.reserved = 0
        self.changed = True
        self.busy_s = 0.0
        self._clock = clock
        self._model = model
        self._hbm_tokens = model.hbm_tokens
        self._done = done
        self._sequences: list[tuple[float, int, Job]] = []
        self._joined = 0
        self._context = 0.0
        self._steps = 0.0
        self._step_s = 0.0
        self._since_s = 0.0
        self._planned_s = math.inf

    def promise(self, job: Job) -> None:
        """The scheduler has chosen this engine: room for prompt and output is kept."""
        self.requests += 1
        self.tokens += job.tokens
        self.reserved += job.tokens + job.generate
        self.changed = True
        assert self.reserved <= self._hbm_tokens, (
            f"{self.place.name} holds {self.reserved} tokens of {self._hbm_tokens}"
        )

    def join(self, job: Job) -> None:
        """The prompt's KV is in the engine's memory; the first token came of the prefill."""
        self._advance()
        steps = job.generate - 1
        if steps <= 0:
            self._leave(job)
            return
        self._joined += 1
        end = math.ceil(self._steps) + steps
        heapq.heappush(self._sequences, (end, self._joined, job))
        self._context += job.tokens
        self._replan()

    def _advance(self) -> None:
        now = self._clock.now
        if self._sequences:
            passed = (now - self._since_s) / self._step_s
            self._steps += passed
            self._context += passed * len(self._sequences)
            self.busy_s += now - self._since_s
        self._since_s = now

    def _replan(self) -> None:
        sequences = self._sequences
        if not sequences:
            # Small numbers keep their digits.
            self._steps = self._context = 0.0
            return
        self._step_s = self._model.decode_step_s(len(sequences), round(self._context))
        due = self._clock.now + max(0.0, sequences[0][0] - self._steps) * self._step_s
        if due < self._planned_s:
            self._planned_s = due
            self._clock.at(due, self._look, due)

    def _look(self, due: float) -> None:
        if due != self._planned_s:
            return
        self._planned_s = math.inf
        self._advance()
        sequences = self._sequences
        ended = []
        while sequences and sequences[0][0] <= self._steps + STEP_TOLERANCE:
            job = heapq.heappop(sequences)[2]
            self._context -= job.tokens + job.generate - 1
            ended.append(job)
        self._replan()
        for job in ended:
            self._leave(job)

    def _leave(self, job: Job) -> None:
        self.requests -= 1
        self.tokens -= job.tokens
        self.reserved -= job.tokens + job.generate
        self.changed = True
        self._done(job)
