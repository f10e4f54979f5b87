"""Replays a workload under one policy: N sessions at a time, the turns of each one in order.

Owns the assignment of sessions to engines and decode peers (round robin), the pool of workers and
what is measured around them: time, links, processor.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass

from dualpath.bench.testbed.decode_engine import DecodeEngine
from dualpath.bench.testbed.engine import LoadOutcome, PrefillEngine
from dualpath.bench.testbed.link_meter import LinkUse
from dualpath.bench.testbed.workload import PlannedLoad, Workload

DEADLINE_S_MIN = 30.0
DEADLINE_S_MAX = 600.0
_DEADLINE_SLACK = 8.0

OnOutcome = Callable[[LoadOutcome], None]


@dataclass(frozen=True, slots=True)
class PolicyRun:
    """Everything measured while one policy ran. `seconds` is the completion of all loads."""

    policy: str
    seconds: float
    outcomes: tuple[LoadOutcome, ...]
    links: tuple[LinkUse, ...]
    cpu_cores: float

    @property
    def nbytes(self) -> int:
        """Verified bytes that were loaded."""
        return sum(outcome.nbytes for outcome in self.outcomes)

    @property
    def bytes_per_s(self) -> float:
        """Verified bytes a second of the whole run."""
        return self.nbytes / self.seconds if self.seconds else 0.0


def load_deadline_s(workload: Workload, concurrency: int, storage_bytes_per_s: float) -> float:
    """Several times what a load needs when all others share a single storage link with it."""
    largest_bytes = workload.load_blocks_max * workload.block_bytes
    expected_s = concurrency * largest_bytes / storage_bytes_per_s if storage_bytes_per_s else 0.0
    return min(DEADLINE_S_MAX, max(DEADLINE_S_MIN, _DEADLINE_SLACK * expected_s))


class Replay:
    """A workload on its engines; `run` may be called once a policy."""

    def __init__(
        self,
        engines: Sequence[PrefillEngine],
        decode_names: Sequence[str],
        *,
        concurrency: int,
        deadline_s: float,
        decode_engines: Sequence[Mapping[str, DecodeEngine]] = (),
    ) -> None:
        """`decode_engines`: of each engine, by the names of their nodes, those on its rail that it
        hands prompts off to; empty where nothing is handed off."""
        self._engines = tuple(engines)
        self._decode_engines = tuple(decode_engines) or ({},) * len(self._engines)
        self._decode_names = tuple(decode_names)
        self._concurrency = concurrency
        self.deadline_s = deadline_s

    def _place(self, session: int) -> tuple[PrefillEngine, str, DecodeEngine | None]:
        turn, number = divmod(session, len(self._engines))
        if not self._decode_names:
            return self._engines[number], "", None
        # Divided first, so that every engine meets every decode peer.
        peer = self._decode_names[turn % len(self._decode_names)]
        return self._engines[number], peer, self._decode_engines[number].get(peer)

    async def run(
        self,
        workload: Workload,
        policy: str,
        on_outcome: OnOutcome,
        *,
        beside: Callable[[], Coroutine[None, None, None]] | None = None,
    ) -> tuple[float, tuple[LoadOutcome, ...]]:
        """Return (seconds until the last load had ended, outcomes as they were verified). `beside`
        starts with the first load and is ended with the last one."""
        waiting: deque[tuple[PlannedLoad, ...]] = deque(workload.sessions)
        outcomes: list[LoadOutcome] = []

        async def keep(verification: asyncio.Task[LoadOutcome]) -> None:
            outcomes.append(await verification)
            on_outcome(outcomes[-1])

        async def work(tasks: asyncio.TaskGroup) -> None:
            while waiting:
                for planned in waiting.popleft():
                    engine, peer, decode = self._place(planned.session)
                    verification = await engine.load(
                        planned,
                        policy=policy,
                        decode_peer=peer,
                        deadline_s=self.deadline_s,
                        decode=decode,
                    )
                    # The next turn waits neither for the verification nor for the hand-off.
                    tasks.create_task(keep(verification))

        started_s = time.monotonic()
        async with asyncio.TaskGroup() as all_tasks:
            other = all_tasks.create_task(beside()) if beside is not None else None
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(self._concurrency, len(waiting))):
                    tasks.create_task(work(tasks))
            if other is not None:
                other.cancel()
        ended_s = max((each.ended_s for each in outcomes), default=started_s)
        return ended_s - started_s, tuple(outcomes)
