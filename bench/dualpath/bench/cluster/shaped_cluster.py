"""One topology that runs: namespaces, daemon, agents, engines, a filled store, its replays.

Owns their lives and the workload. It is measured without limits first (`baseline`), then shaped
(`shape`), then replayed under a policy as often as wanted (`replay`).
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from dualpath.bench.cluster.config import (
    BLOCK_BYTES,
    LAYER_BYTES,
    LAYERS,
    POLICIES,
    ClusterBenchConfig,
)
from dualpath.bench.progress import Progress
from dualpath.bench.testbed.cluster import FILLER, Cluster, ClusterConfig
from dualpath.bench.testbed.cpu_meter import CpuMeter
from dualpath.bench.testbed.decode_engine import DecodeEngine
from dualpath.bench.testbed.engine import NEW_BLOCKS, LoadOutcome, PrefillEngine
from dualpath.bench.testbed.engine_group import open_decode_engines, open_engines
from dualpath.bench.testbed.fill import fill_store
from dualpath.bench.testbed.link_meter import KernelCounters, LinkMeter, links_of
from dualpath.bench.testbed.namespaces import Namespaces
from dualpath.bench.testbed.replay import PolicyRun, Replay, load_deadline_s
from dualpath.bench.testbed.scheduled_replay import (
    ScheduledEngines,
    scheduled_replay,
)
from dualpath.bench.testbed.scheduler_runs import SCHEDULER_PREFIX
from dualpath.bench.testbed.shaping import LinkRates
from dualpath.bench.testbed.topology import Topology
from dualpath.bench.testbed.workload import Workload
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.errors import InvalidRequest

BASELINE_BYTES = 256 << 20
WARM_UP_BYTES = 32 << 20
STAGING_BYTES = 64 << 20
HOLD_BYTES = 64 << 20
HANDED_SHARE = 3
"""Memory of the engines in loads in flight: a load's pages stay until it has been handed off."""
STORE_SLACK_BYTES = 256 << 20
DRAM_BYTES_MAX = 2 << 30

Result = TypeVar("Result")


class ShapedCluster:
    """See the module docstring; made by `open_cluster`."""

    def __init__(
        self,
        config: ClusterBenchConfig,
        topology: Topology,
        workload: Workload,
        namespaces: Namespaces,
        cluster: Cluster,
        engines: Sequence[PrefillEngine],
        decode_engines: Sequence[Mapping[str, DecodeEngine]],
        counters: KernelCounters,
    ) -> None:
        self.topology = topology
        self.workload = workload
        self.namespaces = namespaces
        self.cluster = cluster
        self.engines = tuple(engines)
        self._decode_engines = decode_engines
        self.rates: LinkRates | None = None
        self._config = config
        self._counters = counters

    def shape(self, rates: LinkRates) -> None:
        """Limit the links; once."""
        self.namespaces.shape(rates)
        self.rates = rates

    @property
    def loads_in_flight(self) -> int:
        """How many loads run at once."""
        return self._config.loads_in_flight(self.topology)

    async def baseline(self) -> float:
        """Bytes a second of the same topology without limits, under the split policy."""
        assert self.rates is None
        rate = 0.0
        for nbytes in (WARM_UP_BYTES, BASELINE_BYTES):
            run = await self.replay("split", self.workload.limited(nbytes), lambda _outcome: None)
            rate = run.bytes_per_s
        return rate

    async def replay(
        self,
        policy: str,
        workload: Workload,
        on_outcome: Callable[[LoadOutcome], None],
        *,
        beside: Callable[[], Coroutine[None, None, None]] | None = None,
    ) -> PolicyRun:
        """Load the workload under a policy of the table, with `beside` (the faults) next to it."""
        if policy.startswith(SCHEDULER_PREFIX):
            return await self._scheduled(policy, workload, on_outcome)
        replay = Replay(
            self.engines,
            [node.name for node in self.topology.decode],
            concurrency=self.loads_in_flight,
            deadline_s=self._deadline_s(workload),
            decode_engines=self._decode_engines,
        )
        return await self.measure(
            policy, lambda: replay.run(workload, POLICIES[policy], on_outcome, beside=beside)
        )

    def _deadline_s(self, workload: Workload) -> float:
        rate = self.rates.storage_bytes_per_s if self.rates else 0.0
        return load_deadline_s(workload, self.loads_in_flight, rate)

    async def _scheduled(
        self, policy: str, workload: Workload, on_outcome: Callable[[LoadOutcome], None]
    ) -> PolicyRun:
        """The same through a scheduler of its own."""
        topology = self.topology
        takers = self._decode_engines[0] if self._decode_engines else {}
        engines = ScheduledEngines(
            prefill={
                node.name: engine
                for node, engine in zip(topology.prefill, self.engines, strict=True)
            },
            decode={node.name: takers.get(node.name) for node in topology.decode},
            block_bytes=BLOCK_BYTES,
        )
        async with scheduled_replay(
            self.cluster,
            policy,
            workload,
            engines,
            storage_bytes_per_s=self.rates.node_storage_bytes_per_s if self.rates else 0.0,
            concurrency=self.loads_in_flight,
            deadline_s=self._deadline_s(workload),
        ) as replay:
            return await self.measure(policy, lambda: replay.run(workload, on_outcome))

    async def measure(
        self,
        policy: str,
        work: Callable[[], Coroutine[None, None, tuple[float, tuple[LoadOutcome, ...]]]],
    ) -> PolicyRun:
        """What links and processor did while `work` ran."""
        cpu = CpuMeter(self.cluster.pids.values())
        async with LinkMeter(links_of(self.topology, self.rates), self._counters) as meter:
            seconds, outcomes = await self.cluster.watched(work())
        return PolicyRun(policy, seconds, outcomes, meter.uses, cpu.cores())


@contextlib.asynccontextmanager
async def open_cluster(
    config: ClusterBenchConfig,
    topology: Topology,
    workload: Workload,
    folder: Path,
    progress: Progress,
) -> AsyncIterator[ShapedCluster]:
    """Start everything in a new `folder`, whose path must be short, and fill the store. Raises
    InvalidRequest if the store does not fit the disk, Unavailable if something does not start."""
    layout = KVLayout(
        layers=LAYERS,
        block_tokens=workload.block_tokens,
        layer_bytes=LAYER_BYTES,
        dtype="fp8",
        attention="mla",
    )
    namespace = Namespace("dualpath-bench-cluster", layout, salt=f"seed-{config.seed}")
    progress.stage(f"start {topology.label} with {topology.rails} compute links a node")
    async with contextlib.AsyncExitStack() as stack:
        namespaces = stack.enter_context(contextlib.closing(Namespaces(topology)))
        cluster = await stack.enter_async_context(
            Cluster(_cluster_config(config, topology, workload, folder, namespaces))
        )
        progress.done("ready")
        progress.stage("fill the store")
        filling = fill_store(
            cluster.socket(FILLER),
            namespace,
            workload,
            token=cluster.token,
            seed=config.seed,
            on_progress=lambda nbytes: None,
        )
        nbytes = await cluster.watched(filling)
        await cluster.stop(FILLER)
        progress.done(f"{nbytes >> 20} MiB")
        engines, peers = await _open_engines(stack, cluster, config, topology, workload, namespace)
        counted = [agent for node in topology.nodes[1:] for agent in node.agents]
        counters = KernelCounters({name: cluster.pids[name] for name in counted})
        stack.callback(counters.close)
        yield ShapedCluster(
            config, topology, workload, namespaces, cluster, engines, peers, counters
        )


async def _open_engines(
    stack: contextlib.AsyncExitStack,
    cluster: Cluster,
    config: ClusterBenchConfig,
    topology: Topology,
    workload: Workload,
    namespace: Namespace,
) -> tuple[list[PrefillEngine], list[dict[str, DecodeEngine]]]:
    """The prefill engines, by rail, then by node; and of each the decode engines on its rail, by
    the names of their nodes, if prompts are handed off."""
    agents = [node.agents[rail] for rail in range(topology.rails) for node in topology.prefill]
    in_flight = config.loads_in_flight(topology) * (HANDED_SHARE if config.hands_off else 1)
    engines = await stack.enter_async_context(
        open_engines(
            cluster,
            agents,
            namespace,
            loads=-(-in_flight // len(agents)),
            load_blocks_max=workload.load_blocks_max + NEW_BLOCKS,
            behind_compute_link=not topology.converged,
            seed=config.seed,
        )
    )
    takers = [agent for node in topology.decode for agent in node.agents]
    takers = takers if config.hands_off else []
    decode_engines = await stack.enter_async_context(
        open_decode_engines(
            cluster,
            takers,
            namespace,
            prompts=-(-in_flight // max(1, len(takers))),
            prompt_blocks_max=workload.load_blocks_max + NEW_BLOCKS,
            behind_compute_link=not topology.converged,
            seed=config.seed,
        )
    )
    peers: list[dict[str, DecodeEngine]] = [
        {node.name: decode_engines[node.agents[rail]] for node in topology.decode}
        for rail in range(topology.rails if takers else 0)
        for _ in topology.prefill
    ]
    return engines, peers


def _cluster_config(
    config: ClusterBenchConfig,
    topology: Topology,
    workload: Workload,
    folder: Path,
    namespaces: Namespaces,
) -> ClusterConfig:
    folder.mkdir(mode=0o700)
    data = (Path(config.data) if config.data else folder) / "data"
    disk_bytes = workload.stored_blocks * BLOCK_BYTES * 5 // 4 + STORE_SLACK_BYTES
    free_bytes = shutil.disk_usage(data.parent).free
    if disk_bytes > free_bytes:
        raise InvalidRequest(
            f"the workload needs {disk_bytes >> 20} MiB in {data.parent}, {free_bytes >> 20} MiB "
            "are free; take fewer --seconds or another --data"
        )
    data.mkdir(exist_ok=True)
    return ClusterConfig(
        topology=topology,
        folder=folder,
        data=data,
        disk_bytes=disk_bytes,
        dram_bytes=min(DRAM_BYTES_MAX, disk_bytes),
        staging_bytes=STAGING_BYTES,
        hold_bytes=HOLD_BYTES if config.hands_off else 0,
        namespaces=namespaces,
    )
