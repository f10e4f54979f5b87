"""All rounds of a run, several on each cluster, and what they came to together.

A cluster on which something went wrong is given up: what follows there proves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dualpath.bench.cluster.fault import Fault
from dualpath.bench.faults.freezes import FreezeMeter
from dualpath.bench.faults.report import FaultsReport
from dualpath.bench.faults.rest import RestWatch
from dualpath.bench.faults.rounds import FaultRound, RoundResult
from dualpath.bench.faults.scene import FaultScene, open_scene
from dualpath.bench.faults.schedule import random_faults
from dualpath.bench.progress import Progress
from dualpath.bench.testbed.topology import Topology
from dualpath.transfer.errors import DualPathError

BAD_MAX = 5
"""After so many bad rounds the run ends."""


class Campaign:
    """See the module docstring."""

    def __init__(
        self,
        topology: Topology,
        folder: Path,
        progress: Progress,
        *,
        seed: int,
        seconds: float,
        fresh: int,
        faults: Sequence[Fault] = (),
    ) -> None:
        """`faults`: in every round, instead of random ones."""
        self._topology = topology
        self._folder = folder
        self._progress = progress
        self._seed = seed
        self._seconds = seconds
        self._fresh = fresh
        self._faults = tuple(faults)

    async def run(self, numbers: Sequence[int]) -> FaultsReport:
        """Run the rounds of these numbers. Raises Unavailable if no cluster can be started."""
        report = FaultsReport(self._topology.label, self._seed, len(numbers))
        self._progress.say(f"seed {self._seed}")
        self._progress.stage(f"random faults on {self._topology.label}")
        waiting = list(numbers)
        clusters = 0
        while waiting and len(report.bad) < BAD_MAX:
            clusters += 1
            folder = self._folder / str(clusters)
            async with open_scene(self._topology, folder, self._seed) as scene:
                with FreezeMeter(lambda: scene.cluster.pids) as freezes:
                    await self._on_one_cluster(scene, freezes, waiting, report)
        self._progress.done(f"{len(report.bad)} bad")
        return report

    async def _on_one_cluster(
        self,
        scene: FaultScene,
        freezes: FreezeMeter,
        waiting: list[int],
        report: FaultsReport,
    ) -> None:
        watch = RestWatch(scene)
        for _ in range(self._fresh):
            if not waiting:
                break
            number = waiting.pop(0)
            result = RoundResult(number, self._faults_of(number))
            said: list[str] = []
            freezes.reset()
            done = FaultRound(scene, watch, freezes, result, self._seed, said.append)
            try:
                await done.run()
            except* DualPathError as group:
                result.wrong += [f"{each.reason}: {each}" for each in _leaves(group)]
            report.add(result)
            self._progress.move(len(report.rounds) / report.planned, f"{len(report.bad)} bad")
            if result.wrong:
                self._progress.say(f"BAD: seed {self._seed} round {number}: {result.schedule}")
                for text in result.wrong:
                    self._progress.say(f"  {text}")
                break
        report.grown += watch.grown()
        report.footprints.update(watch.footprints)

    def _faults_of(self, number: int) -> tuple[Fault, ...]:
        return self._faults or random_faults(self._seed, number, self._topology, self._seconds)


def _leaves(group: BaseExceptionGroup[DualPathError]) -> list[DualPathError]:
    found: list[DualPathError] = []
    for each in group.exceptions:
        if isinstance(each, BaseExceptionGroup):
            found += _leaves(each)
        else:
            found.append(each)
    return found
