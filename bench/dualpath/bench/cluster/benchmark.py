"""Runs `dualpath bench cluster` from beginning to end: topologies, rates, rounds, faults.

Owns the order of things. Each topology is measured without limits first; if the storage rate is to
be chosen, it is the lowest that any of them allows, so that their figures can be compared. Rounds
interleave the policies, and their order turns by one each round.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from dualpath.bench.cluster.config import (
    BLOCK_BYTES,
    FITTING_SHARE,
    LONE_WIDTHS,
    STORAGE_BYTES_PER_S_MAX,
    ClusterBenchConfig,
)
from dualpath.bench.cluster.fault import states_after
from dualpath.bench.cluster.fault_effects import effects_of, loaded_rate
from dualpath.bench.cluster.fault_script import FaultScript
from dualpath.bench.cluster.limits import limit_bytes_per_s
from dualpath.bench.cluster.lone import LoneLoad, lone_load, lone_workload
from dualpath.bench.cluster.report import (
    ClusterReport,
    FaultRun,
    LoneResult,
    TopologyResult,
)
from dualpath.bench.cluster.shaped_cluster import ShapedCluster, open_cluster
from dualpath.bench.machine import describe_machine, describe_versions
from dualpath.bench.progress import Progress
from dualpath.bench.testbed.engine import LoadOutcome
from dualpath.bench.testbed.namespaces import why_not_kernel
from dualpath.bench.testbed.replay import PolicyRun
from dualpath.bench.testbed.topology import Topology
from dualpath.bench.testbed.workload import Workload, generated
from dualpath.transfer.errors import Unavailable

FAULT_POLICY = "split"
AFTER_FAULTS_S = 6.0
"""How much longer than the last fault the loads go on, if nothing slows them."""
LONE_FITTING_SHARE = 0.2
"""The time of a single load feels a busy processor sooner than the throughput of many."""


class ClusterBenchmark:
    """One run of `dualpath bench cluster`; `folder` is empty, and its path short."""

    def __init__(self, config: ClusterBenchConfig, folder: Path, progress: Progress) -> None:
        self._config = config
        self._folder = folder
        self._progress = progress
        self._clusters = 0

    async def run(self) -> ClusterReport:
        """Measure everything. Raises Unavailable if the kernel cannot shape links here."""
        reason = why_not_kernel()
        if reason:
            raise Unavailable(f"the kernel cannot shape links here: {reason}")
        started_s, machine = time.monotonic(), describe_machine()
        topologies = [self._config.topology(*each) for each in self._config.topologies]
        unshaped = {}
        if len(topologies) > 1 and not self._config.snic_bytes_per_s:
            unshaped = {each.label: await self._unshaped(each) for each in topologies}
            fits = [self._config.fitting(each, unshaped[each.label]) for each in topologies]
            self._config = min(fits, key=lambda each: each.snic_bytes_per_s)
        results = [await self._measure(each) for each in topologies]
        return ClusterReport(
            config=self._config,
            results=tuple(results),
            machine=machine,
            versions=describe_versions(),
            seconds=time.monotonic() - started_s,
        )

    async def _unshaped(self, topology: Topology) -> float:
        workload = self._workload(topology)
        async with open_cluster(
            self._config, topology, workload, self._new_folder(), self._progress
        ) as cluster:
            return await self._baseline(cluster)

    async def _measure(self, topology: Topology) -> TopologyResult:
        workload = self._workload(topology)
        async with open_cluster(
            self._config, topology, workload, self._new_folder(), self._progress
        ) as cluster:
            unshaped = await self._baseline(cluster)
            self._config = config = self._config.fitting(topology, unshaped)
            self._progress.say(
                f"{topology.label}: storage links {config.rates.storage_bytes_per_s / 1e6:.0f} "
                f"MB/s, compute links {config.rates.compute_bytes_per_s / 1e6:.0f} MB/s"
            )
            cluster.shape(config.rates)
            runs: tuple[PolicyRun, ...] = ()
            faults: FaultRun | None = None
            lone: tuple[LoneResult, ...] = ()
            if config.lone:
                lone = await self._lone(cluster)
            elif config.faults:
                faults = await self._faults(cluster)
            else:
                runs = await self._rounds(cluster)
        return TopologyResult(config, topology, unshaped, runs, lone, faults)

    def _new_folder(self) -> Path:
        self._clusters += 1
        return self._folder / str(self._clusters)

    def _workload(self, topology: Topology) -> Workload:
        """Enough for the rate that is asked for, or the highest that may be chosen."""
        config = self._config
        rate = config.rates.node_storage_bytes_per_s or STORAGE_BYTES_PER_S_MAX
        if config.lone:
            return lone_workload(self._widths(topology), config.load_bytes, 64, config.seed)
        return generated(
            config.context,
            sessions=2 * config.loads_in_flight(topology),
            block_bytes=BLOCK_BYTES,
            load_bytes_mean=config.load_bytes,
            budget_bytes=round(self._seconds * rate * self._budget_links(topology)),
            seed=config.seed,
        )

    def _widths(self, topology: Topology) -> tuple[int, ...]:
        return tuple(width for width in LONE_WIDTHS if width <= topology.rails)

    @property
    def _seconds(self) -> float:
        faults = self._config.planned_faults() if self._config.faults else ()
        return faults[-1].at_s + AFTER_FAULTS_S if faults else self._config.seconds

    def _budget_links(self, topology: Topology) -> float:
        """Storage links' worth that is loaded in that time: by direct loads, or by all."""
        if not self._config.faults:
            return len(topology.prefill)
        return self._config.storage_links(topology)

    async def _baseline(self, cluster: ShapedCluster) -> float:
        self._progress.stage(f"measure {cluster.topology.label} without limits")
        if self._config.lone:
            width = max(self._widths(cluster.topology))
            loads = [
                await lone_load(cluster, "split", width, self._config.load_bytes) for _ in range(2)
            ]
            rate = loads[-1].nbytes / loads[-1].seconds * LONE_FITTING_SHARE / FITTING_SHARE
        else:
            # The better of two: what else the machine had to do is not what binds the cluster.
            rate = max([await cluster.baseline() for _ in range(2)])
        self._progress.done(f"{rate / 1e6:.0f} MB/s")
        return rate

    async def _rounds(self, cluster: ShapedCluster) -> tuple[PolicyRun, ...]:
        config, names = self._config, list(self._config.run_names)
        storage = config.rates.node_storage_bytes_per_s
        budget = config.seconds * storage * len(cluster.topology.prefill)
        workload = cluster.workload.limited(round(budget))
        runs = []
        for number in range(config.rounds):
            turn = number % len(names)
            for policy in names[turn:] + names[:turn]:
                title = f"{cluster.topology.label} round {number + 1}/{config.rounds} {policy}"
                runs.append(await self._replay(cluster, policy, workload, title))
        return tuple(runs)

    async def _replay(
        self,
        cluster: ShapedCluster,
        policy: str,
        workload: Workload,
        title: str,
        script: FaultScript | None = None,
    ) -> PolicyRun:
        self._progress.stage(title)
        run = await cluster.replay(
            policy,
            workload,
            self._on_outcome(workload.load_bytes),
            beside=script.run if script is not None else None,
        )
        self._progress.done(f"{run.nbytes >> 20} MiB, {run.bytes_per_s / 1e6:.1f} MB/s")
        return run

    def _on_outcome(self, total: int) -> Callable[[LoadOutcome], None]:
        loaded = 0

        def show(outcome: LoadOutcome) -> None:
            nonlocal loaded
            loaded += outcome.nbytes
            self._progress.move(loaded / total, f"{loaded >> 20} MiB")
            if outcome.failure:
                self._progress.say(
                    f"load {outcome.session}/{outcome.turn}: {outcome.failure} {outcome.detail}"
                )

        return show

    async def _faults(self, cluster: ShapedCluster) -> FaultRun:
        config, topology = self._config, cluster.topology
        faults, rates = config.planned_faults(), config.rates
        full = limit_bytes_per_s(topology, rates)
        workload = cluster.workload.limited(round(full * self._seconds))
        script = FaultScript(faults, cluster, self._progress.say)
        run = await self._replay(cluster, FAULT_POLICY, workload, "loads and faults", script)
        points = loaded_rate(run.links)
        started_s = run.links[0].started_s
        limits = [
            limit_bytes_per_s(topology, rates, states=states_after(faults[: index + 1], topology))
            for index in range(len(script.made))
        ]
        # The last loads to start end the backlog: one fewer is in flight from then on.
        last_start_s = max((o.ended_s - o.elapsed_s for o in run.outcomes), default=started_s)
        effects = effects_of(
            script.made,
            limits,
            run.outcomes,
            points,
            started_s=started_s,
            backlog_until_s=last_start_s - started_s,
        )
        return FaultRun(run, faults, effects, points, full)

    async def _lone(self, cluster: ShapedCluster) -> tuple[LoneResult, ...]:
        config = self._config
        policies = [name for name in config.policies if name in ("direct", "split")]
        loads: dict[tuple[str, int], list[LoneLoad]] = {}
        for number in range(config.rounds):
            for width in self._widths(cluster.topology):
                for policy in policies:
                    self._progress.stage(f"round {number + 1} width {width} {policy}")
                    load = await lone_load(cluster, policy, width, config.load_bytes)
                    self._progress.done(f"{load.seconds:.2f} s, {load.ratio:.3f} of the limit's")
                    loads.setdefault((policy, width), []).append(load)
        return tuple(
            LoneResult(policy, width, tuple(found)) for (policy, width), found in loads.items()
        )
