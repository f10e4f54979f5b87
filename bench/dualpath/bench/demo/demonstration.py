"""Runs a demo from beginning to end: cluster, fill, unshaped baseline, each policy, report.

Owns the order of things and the folders. In kernel mode the same cluster is measured without
limits first and then shaped; agents that pace themselves are started again with their limits.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from pathlib import Path

from dualpath.bench.demo import config as settings
from dualpath.bench.demo.config import DemoConfig, Destination, Shaping
from dualpath.bench.demo.report import DemoReport
from dualpath.bench.machine import describe_machine, describe_versions
from dualpath.bench.progress import Progress
from dualpath.bench.testbed.cluster import FILLER, Cluster, ClusterConfig
from dualpath.bench.testbed.cpu_meter import CpuMeter
from dualpath.bench.testbed.engine import LoadOutcome, PrefillEngine
from dualpath.bench.testbed.engine_group import open_engines
from dualpath.bench.testbed.fill import fill_store
from dualpath.bench.testbed.link_meter import (
    AgentCounters,
    KernelCounters,
    LinkCounters,
    LinkMeter,
    links_of,
)
from dualpath.bench.testbed.namespaces import Namespaces, why_not_kernel
from dualpath.bench.testbed.replay import OnOutcome, PolicyRun, Replay, load_deadline_s
from dualpath.bench.testbed.run_folder import make_run_folder
from dualpath.bench.testbed.scheduled_replay import ScheduledEngines, scheduled_replay
from dualpath.bench.testbed.scheduler_runs import SCHEDULER_PREFIX
from dualpath.bench.testbed.shaping import LinkRates
from dualpath.bench.testbed.topology import Topology
from dualpath.bench.testbed.trace_formats import read_trace
from dualpath.bench.testbed.workload import Workload, from_trace, generated
from dualpath.client.kv_client import KVClient
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.errors import InvalidRequest, Unavailable

BASELINE_BYTES = 384 << 20
WARM_UP_BYTES = 32 << 20
LOAD_BYTES_MEAN = 4 << 20
LONE_LOAD_BYTES_MEAN = 48 << 20
STAGING_BYTES = 64 << 20
STORE_SLACK_BYTES = 256 << 20
DRAM_BYTES_MAX = 2 << 30

FOLDER_PREFIX = "dualpath-demo-"


def plan(config: DemoConfig) -> Workload:
    """The workload of a config. Raises InvalidRequest (trace)."""
    block_bytes = settings.LAYERS * settings.LAYER_BYTES
    load_bytes_mean = LONE_LOAD_BYTES_MEAN if config.lone else LOAD_BYTES_MEAN
    sessions = config.sessions or max(2 * config.concurrency, 4)
    if config.trace:
        return from_trace(
            Path(config.trace).name,
            read_trace(config.trace),
            sessions=sessions,
            block_bytes=block_bytes,
            load_bytes_mean=load_bytes_mean,
            budget_bytes=config.planned_bytes,
            seed=config.seed,
        )
    return generated(
        config.context,
        sessions=sessions,
        block_bytes=block_bytes,
        load_bytes_mean=load_bytes_mean,
        budget_bytes=config.planned_bytes,
        seed=config.seed,
    )


def choose_shaping(wanted: Shaping) -> tuple[Shaping, str]:
    """(how, why). Raises Unavailable if the kernel was demanded and cannot."""
    if wanted is Shaping.NONE:
        return wanted, "as asked"
    if wanted is Shaping.PACING:
        return wanted, "as asked"
    reason = why_not_kernel()
    if not reason:
        return Shaping.KERNEL, "network namespaces with HTB"
    if wanted is Shaping.KERNEL:
        raise Unavailable(f"the kernel cannot shape links here: {reason}; try --shaping pacing")
    return Shaping.PACING, f"token buckets in the agents, because: {reason}"


class Demonstration:
    """One run of `dualpath demo`."""

    def __init__(self, config: DemoConfig, progress: Progress) -> None:
        self._config = config
        self._progress = progress
        self._workload = plan(config)
        layout = KVLayout(
            layers=settings.LAYERS,
            block_tokens=self._workload.block_tokens,
            layer_bytes=settings.LAYER_BYTES,
            dtype="uint8",
        )
        self._namespace = Namespace("dualpath-demo", layout, salt=f"seed-{config.seed}")

    async def run(self) -> DemoReport:
        """Measure everything. Raises DualPathError if it could not be measured at all."""
        started_s = time.monotonic()
        shaping, reason = choose_shaping(self._config.shaping)
        self._progress.say(f"shaping: {shaping.value} ({reason})")
        folder = make_run_folder(FOLDER_PREFIX, kept=self._config.keep)
        try:
            unshaped, runs = await self._measure(shaping, folder)
        finally:
            if self._config.keep:
                self._progress.say(f"kept: {folder}")
            else:
                shutil.rmtree(folder, ignore_errors=True)
        return DemoReport(
            config=self._config,
            topology=self._topology(shaping).label,
            shaping=shaping.value,
            shaping_reason=reason,
            unshaped_bytes_per_s=unshaped,
            workload=self._workload,
            runs=tuple(runs),
            machine=describe_machine(),
            versions=describe_versions(),
            seconds=time.monotonic() - started_s,
        )

    def _rates(self, unshaped_bytes_per_s: float = 0.0) -> LinkRates:
        """The links' limits; the first call settles them, and with them the budget."""
        self._config = self._config.fitting(unshaped_bytes_per_s)
        self._workload = self._workload.limited(self._config.planned_bytes)
        return LinkRates(self._config.storage_bytes_per_s, self._config.compute_bytes_per_s)

    def _topology(self, shaping: Shaping) -> Topology:
        make = Topology.of if shaping is Shaping.KERNEL else Topology.on_loopback
        return make(self._config.prefill, self._config.decode)

    def _cluster_config(
        self, shaping: Shaping, folder: Path, namespaces: Namespaces | None
    ) -> ClusterConfig:
        data = Path(self._config.data) if self._config.data else folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        stored_bytes = self._workload.stored_blocks * self._workload.block_bytes
        disk_bytes = stored_bytes * 5 // 4 + STORE_SLACK_BYTES
        free_bytes = shutil.disk_usage(data).free
        if disk_bytes > free_bytes:
            raise InvalidRequest(
                f"the workload needs {disk_bytes >> 20} MiB in {data}, {free_bytes >> 20} MiB are "
                "free; take a smaller --budget-mib or another --data"
            )
        return ClusterConfig(
            topology=self._topology(shaping),
            folder=folder,
            data=data,
            disk_bytes=disk_bytes,
            dram_bytes=min(DRAM_BYTES_MAX, disk_bytes),
            staging_bytes=STAGING_BYTES,
            namespaces=namespaces,
        )

    async def _measure(self, shaping: Shaping, folder: Path) -> tuple[float, list[PolicyRun]]:
        if shaping is not Shaping.KERNEL:
            return await self._measure_on_loopback(shaping, folder)
        topology = self._topology(shaping)
        with contextlib.closing(Namespaces(topology)) as namespaces:
            config = self._cluster_config(shaping, folder, namespaces)
            async with self._cluster(config) as cluster:
                await self._fill(cluster)
                async with self._engines(cluster) as engines:
                    unshaped = await self._baseline(cluster, engines)
                    namespaces.shape(self._rates(unshaped))
                    return unshaped, await self._policies(cluster, engines, shaping)

    async def _measure_on_loopback(
        self, shaping: Shaping, folder: Path
    ) -> tuple[float, list[PolicyRun]]:
        config = self._cluster_config(shaping, folder, None)
        async with self._cluster(config) as cluster:
            await self._fill(cluster)
            async with self._engines(cluster) as engines:
                unshaped = await self._baseline(cluster, engines)
                if shaping is Shaping.NONE:
                    return unshaped, await self._policies(cluster, engines, shaping)
        async with (
            self._cluster(replace(config, pacing=self._rates(unshaped))) as cluster,
            self._engines(cluster) as engines,
        ):
            return unshaped, await self._policies(cluster, engines, shaping)

    @contextlib.asynccontextmanager
    async def _cluster(self, config: ClusterConfig) -> AsyncIterator[Cluster]:
        topology = config.topology
        self._progress.stage(f"start daemon and {len(topology.nodes)} agents, {topology.label}")
        async with Cluster(config) as cluster:
            self._progress.done("ready")
            yield cluster

    def _engines(
        self, cluster: Cluster
    ) -> contextlib.AbstractAsyncContextManager[list[PrefillEngine]]:
        config = self._config
        return open_engines(
            cluster,
            [node.name for node in Topology.of(config.prefill, config.decode).prefill],
            self._namespace,
            loads=-(-config.concurrency // config.prefill),
            load_blocks_max=self._workload.load_blocks_max,
            behind_compute_link=config.destination is Destination.GPU,
            seed=config.seed,
        )

    async def _fill(self, cluster: Cluster) -> None:
        total = self._workload.stored_blocks * self._workload.block_bytes
        self._progress.stage(f"fill the store with {total >> 20} MiB")

        def moved(nbytes: int) -> None:
            self._progress.move(nbytes / total, f"{nbytes >> 20} MiB")

        started_s = time.monotonic()
        work = fill_store(
            cluster.socket(FILLER),
            self._namespace,
            self._workload,
            token=cluster.token,
            seed=self._config.seed,
            on_progress=moved,
        )
        nbytes = await cluster.watched(work)
        await cluster.stop(FILLER)
        rate = nbytes / max(1e-9, time.monotonic() - started_s)
        self._progress.done(f"{nbytes >> 20} MiB, {rate / 1e6:.0f} MB/s")

    def _replay(self, engines: list[PrefillEngine]) -> Replay:
        config = self._config
        return Replay(
            engines,
            [f"decode-{index}" for index in range(config.decode)],
            concurrency=config.concurrency,
            deadline_s=load_deadline_s(
                self._workload, config.concurrency, config.storage_bytes_per_s
            ),
        )

    async def _baseline(self, cluster: Cluster, engines: list[PrefillEngine]) -> float:
        """Bytes a second of the same topology without limits, under the split policy."""
        self._progress.stage("measure without limits")
        replay = self._replay(engines)
        rate = 0.0
        for nbytes in (WARM_UP_BYTES, BASELINE_BYTES):
            part = self._workload.limited(nbytes)
            work = replay.run(part, "split", lambda _outcome: None)
            seconds, outcomes = await cluster.watched(work)
            rate = sum(each.nbytes for each in outcomes) / max(1e-9, seconds)
        self._progress.done(f"{rate / 1e6:.0f} MB/s")
        return rate

    async def _policies(
        self, cluster: Cluster, engines: list[PrefillEngine], shaping: Shaping
    ) -> list[PolicyRun]:
        runs = []
        counters, clients = await self._counters(cluster, shaping)
        try:
            for policy in self._config.run_names:
                runs.append(await self._policy(policy, cluster, engines, shaping, counters))
        finally:
            for client in clients:
                await client.close()
        return runs

    async def _counters(
        self, cluster: Cluster, shaping: Shaping
    ) -> tuple[LinkCounters, list[KVClient]]:
        nodes = [node.name for node in self._topology(shaping).nodes[1:]]
        if shaping is Shaping.KERNEL:
            return KernelCounters({name: cluster.pids[name] for name in nodes}), []
        clients = {
            name: await KVClient.connect(cluster.socket(name), token=cluster.token)
            for name in nodes
        }
        return AgentCounters(clients), list(clients.values())

    async def _policy(
        self,
        policy: str,
        cluster: Cluster,
        engines: list[PrefillEngine],
        shaping: Shaping,
        counters: LinkCounters,
    ) -> PolicyRun:
        total, loaded = self._workload.load_bytes, 0
        started_s = time.monotonic()

        def on_outcome(outcome: LoadOutcome) -> None:
            nonlocal loaded
            loaded += outcome.nbytes
            rate = loaded / max(1e-9, time.monotonic() - started_s)
            self._progress.move(loaded / total, f"{loaded >> 20} MiB, {rate / 1e6:.0f} MB/s")
            if outcome.failure:
                self._progress.say(
                    f"load {outcome.session}/{outcome.turn} under {policy}: {outcome.failure} "
                    f"{outcome.detail}".rstrip()
                )

        self._progress.stage(policy)
        rates = None if shaping is Shaping.NONE else self._rates()
        async with contextlib.AsyncExitStack() as stack:
            work = await self._work(stack, policy, cluster, engines, on_outcome)
            cpu = CpuMeter(cluster.pids.values())
            meter = LinkMeter(links_of(self._topology(shaping), rates), counters)
            async with meter:
                seconds, outcomes = await cluster.watched(work)
        run = PolicyRun(policy, seconds, outcomes, meter.uses, cpu.cores())
        self._progress.done(f"{run.nbytes >> 20} MiB, {run.bytes_per_s / 1e6:.0f} MB/s")
        return run

    async def _work(
        self,
        stack: contextlib.AsyncExitStack,
        policy: str,
        cluster: Cluster,
        engines: list[PrefillEngine],
        on_outcome: OnOutcome,
    ) -> Coroutine[None, None, tuple[float, tuple[LoadOutcome, ...]]]:
        """The loads, and on the stack the scheduler that they may go through."""
        config, workload = self._config, self._workload
        replay = self._replay(engines)
        if not policy.startswith(SCHEDULER_PREFIX):
            return replay.run(workload, policy, on_outcome)
        nodes = Topology.of(config.prefill, config.decode)
        scheduled = await stack.enter_async_context(
            scheduled_replay(
                cluster,
                policy,
                workload,
                ScheduledEngines(
                    prefill={
                        node.name: engine
                        for node, engine in zip(nodes.prefill, engines, strict=True)
                    },
                    decode={node.name: None for node in nodes.decode},
                    block_bytes=workload.block_bytes,
                ),
                storage_bytes_per_s=config.storage_bytes_per_s,
                concurrency=config.concurrency,
                deadline_s=replay.deadline_s,
            )
        )
        return scheduled.run(workload, on_outcome)
