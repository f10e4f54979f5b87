"""One round: faults at random times while engines load and hand off; then rest, and a verdict.

Owns the loads in flight and the order: faults until all is restored, the end of every load, whole
loads and hand-offs again by everybody, memory that is not in use, rest. What was wrong is text.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from dualpath.bench.cluster.fault import Fault
from dualpath.bench.cluster.fault_script import FaultScript
from dualpath.bench.faults.freezes import FreezeMeter
from dualpath.bench.faults.judgement import LoadRecord, Outages, overrun_s, wrong_with_load
from dualpath.bench.faults.rest import RestWatch
from dualpath.bench.faults.scene import BLOCKS_MAX, WORKERS, FaultScene
from dualpath.bench.faults.schedule import LONG_S, LoadOrder, load_orders
from dualpath.bench.testbed.engine import PrefillEngine
from dualpath.bench.testbed.workload import PlannedLoad
from dualpath.client.remote_session import GRACE_S

NEVER_S = 2 * LONG_S[1] + GRACE_S + 10.0
"""After which a load, with its hand-off, counts as one that never ends."""
PROBE_S = 10.0
"""Deadline of the loads that show that everything works again."""
PAUSE_S = 0.02
"""Of a worker whose agent is gone."""
WRONG_MAX = 20


@dataclass(slots=True)
class RoundResult:
    """What one round came to; `wrong` is empty if all held."""

    number: int
    faults: tuple[Fault, ...]
    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    overrun_s: float = -math.inf
    """The latest end of a load, after its deadline."""
    frozen_s: float = 0.0
    rest_s: float = 0.0
    elapsed_s: float = 0.0

    @property
    def schedule(self) -> str:
        """The faults as they are written."""
        return ",".join(str(fault) for fault in self.faults)


class FaultRound:
    """See the module docstring; `run` it once."""

    def __init__(
        self,
        scene: FaultScene,
        watch: RestWatch,
        freezes: FreezeMeter,
        result: RoundResult,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self._scene = scene
        self._watch = watch
        self._freezes = freezes
        self._result = result
        self._seed = seed
        self._say = say
        self._over = asyncio.Event()
        self._records: list[LoadRecord] = []

    async def run(self) -> None:
        """Fill in the result. Raises Unavailable if a fault could not be made or undone."""
        result, started_s = self._result, time.monotonic()
        script = FaultScript(result.faults, self._scene, self._say, self._scene.on_fault)
        try:
            await self._loads_beside(script)
        except TimeoutError:  # of the limit; all others are values
            result.wrong.append(f"a load or a hand-off did not end within {NEVER_S:g} s")
        result.frozen_s = self._freezes.frozen_s(started_s, time.monotonic())
        self._judge(Outages.of(script.made))
        if not result.wrong:
            await self._aftermath()
        result.wrong += self._scene.cluster.ended()
        result.wrong += self._watch.said()
        del result.wrong[WRONG_MAX:]
        result.elapsed_s = time.monotonic() - started_s

    async def _loads_beside(self, script: FaultScript) -> None:
        async with asyncio.timeout(None) as limit:
            async with asyncio.TaskGroup() as tasks:
                for node in self._scene.topology.prefill:
                    for worker in range(WORKERS):
                        tasks.create_task(self._work(node.name, worker, tasks))
                await script.run()
                self._over.set()
                limit.reschedule(asyncio.get_running_loop().time() + NEVER_S)

    async def _work(self, node: str, worker: int, tasks: asyncio.TaskGroup) -> None:
        scene = self._scene
        decodes = [each.name for each in scene.topology.decode]
        orders = load_orders(
            self._seed,
            self._result.number,
            f"{node} {worker}",
            chains=len(scene.chains),
            blocks_max=BLOCKS_MAX,
            decodes=len(decodes),
        )
        for order in orders:
            if self._over.is_set():
                return
            engine, begun_s = await scene.prefill(node), time.monotonic()
            peer = decodes[order.decode] if decodes else ""
            await self._load(engine, node, peer, order, tasks)
            if time.monotonic() - begun_s < PAUSE_S:
                await asyncio.sleep(PAUSE_S)

    async def _load(
        self,
        engine: PrefillEngine,
        node: str,
        peer: str,
        order: LoadOrder,
        tasks: asyncio.TaskGroup,
    ) -> None:
        """Run one load; its verification and hand-off go on in `tasks`."""
        task = await engine.load(
            PlannedLoad(order.chain, 0, self._scene.chains[order.chain][: order.blocks]),
            policy=order.policy,
            decode_peer=peer,
            deadline_s=order.deadline_s,
            decode=self._scene.decode(peer) if order.hand_off else None,
            abort_s=order.abort_s,
        )

        async def keep() -> None:
            outcome = await task
            started_s = outcome.ended_s - outcome.elapsed_s
            self._records.append(LoadRecord(node, peer, order, started_s, outcome))

        tasks.create_task(keep())

    def _judge(self, outages: Outages) -> None:
        result = self._result
        for record in self._records:
            result.wrong += wrong_with_load(record, outages, self._freezes.frozen_s)
            late_s = overrun_s(record, outages, self._freezes.frozen_s)
            result.overrun_s = max(result.overrun_s, late_s)
            result.counts.update(_counted(record))

    async def _aftermath(self) -> None:
        """With everything restored: whole loads, undisturbed memory, rest."""
        result = self._result
        result.wrong += await self._watch.strays()
        outages = Outages({}, {})
        self._records.clear()
        try:
            async with asyncio.timeout(NEVER_S), asyncio.TaskGroup() as tasks:
                for place in self._scene.topology.prefill:
                    await self._probe(place.name, tasks)
        except TimeoutError:
            result.wrong.append(f"a load after all was restored did not end within {NEVER_S:g} s")
        for record in self._records:
            outcome, handed = record.outcome, record.outcome.handed_off
            result.wrong += wrong_with_load(record, outages, self._freezes.frozen_s)
            if outcome.failure or (handed is not None and handed.failure):
                what = f"load: {outcome.failure} {outcome.detail}"
                if handed is not None:
                    what = f"hand-off to {record.decode}: {handed.failure} {handed.detail}"
                result.wrong.append(f"after all was restored, {record.node}: {what}")
        unrest, result.rest_s = await self._watch.unrest()
        result.wrong += unrest
        for node, engine in self._scene.all_engines():
            pages = await engine.disturbed_pages()
            if pages:
                result.wrong.append(f"late writes into {len(pages)} free pages of {node}")
        await self._scene.close_retired()
        self._watch.sample()

    async def _probe(self, node: str, tasks: asyncio.TaskGroup) -> None:
        """Load a whole chain, and hand it off to each decode node in turn."""
        engine = await self._scene.prefill(node)
        for number, decode in enumerate(self._scene.topology.decode):
            order = LoadOrder(number, BLOCKS_MAX // 2, "split", number, True, PROBE_S, math.inf)
            await self._load(engine, node, decode.name, order, tasks)


def _counted(record: LoadRecord) -> Iterator[str]:
    """What a load counts as."""
    outcome = record.outcome
    yield "loads"
    if not outcome.failure:
        yield "loads whole"
    else:
        yield f"loads {'failed' if outcome.raised else 'shorter'}: {outcome.failure}"
    handed = outcome.handed_off
    if handed is not None:
        yield "hand-offs"
        yield f"hand-offs ended: {handed.failure}" if handed.failure else "hand-offs whole"
