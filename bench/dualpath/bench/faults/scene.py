"""The cluster that faults are made on: its processes, links and store, and an engine at each agent.

Owns which engine is there now. An engine whose agent was killed is put aside with its memory, which
is looked at once more at the end of the round, and another one is opened when the agent is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from dualpath.bench.cluster.config import BLOCK_BYTES, LAYER_BYTES, LAYERS
from dualpath.bench.cluster.fault import Fault, FaultAction
from dualpath.bench.testbed.cluster import FILLER, Cluster, ClusterConfig
from dualpath.bench.testbed.decode_engine import DecodeEngine
from dualpath.bench.testbed.engine import NEW_BLOCKS, PrefillEngine
from dualpath.bench.testbed.fill import fill_store
from dualpath.bench.testbed.namespaces import Namespaces
from dualpath.bench.testbed.shaping import LinkRates
from dualpath.bench.testbed.topology import NodeKind, Topology
from dualpath.bench.testbed.workload import PlannedLoad, Workload
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.errors import DualPathError

CHAINS = 6
BLOCKS_MAX = 12
WORKERS = 3
"""Loads in flight at each prefill engine."""
RATES = LinkRates(40e6, 160e6)
STAGING_BYTES = 16 << 20
HOLD_BYTES = 24 << 20
DRAM_BYTES = 256 << 20
STORE_BYTES = 512 << 20
HOLD_S = 1.0
LEASE_S = 2.0
RECONNECT_S = 0.5
_SETTINGS = f"hold_s = {HOLD_S}\nlease_s = {LEASE_S}\nreconnect_s_max = {RECONNECT_S}\n"
"""Shorter than by default, so that a round sees them run out."""

Engine = PrefillEngine | DecodeEngine


def chains(seed: int) -> tuple[tuple[bytes, ...], ...]:
    """What is stored: CHAINS prompts of BLOCKS_MAX blocks."""
    found = []
    for number in range(CHAINS):
        chain = [hashlib.sha256(f"dualpath-faults/{seed}/{number}".encode()).digest()]
        while len(chain) < BLOCKS_MAX:
            chain.append(hashlib.sha256(chain[-1]).digest())
        found.append(tuple(chain))
    return tuple(found)


@dataclass(slots=True)
class FaultScene:
    """See the module docstring; made by `open_scene`. A `Faultable`."""

    topology: Topology
    namespaces: Namespaces
    cluster: Cluster
    namespace: Namespace
    chains: tuple[tuple[bytes, ...], ...]
    seed: int
    verifier: ThreadPoolExecutor
    rates: LinkRates | None = None
    engines: dict[str, Engine] = field(default_factory=dict)
    """By node; those of killed agents are absent."""
    retired: list[tuple[str, Engine]] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def open_engines(self, node: str = "") -> None:
        """One at each agent that has none, or only at that of `node`."""
        for place in self.topology.nodes:
            name, kind = place.name, place.kind
            if kind is NodeKind.STORAGE or name in self.engines or name != (node or name):
                continue
            engine = await self._open(name, kind)
            async with self.changed:
                self.engines[name] = engine
                self.changed.notify_all()

    async def _open(self, node: str, kind: NodeKind) -> Engine:
        engine_type = PrefillEngine if kind is NodeKind.PREFILL else DecodeEngine
        others = len(self.topology.prefill) if kind is NodeKind.DECODE else 2
        return await engine_type.open(
            self.cluster.socket(node),
            self.namespace,
            token=self.cluster.token,
            pages=WORKERS * others * (BLOCKS_MAX + NEW_BLOCKS),
            behind_compute_link=False,
            seed=self.seed,
            verifier=self.verifier,
        )

    async def on_fault(self, fault: Fault) -> None:
        """A fault was made: engines follow their agents."""
        if fault.action is FaultAction.KILL and fault.node in self.engines:
            self.retired.append((fault.node, self.engines.pop(fault.node)))
        elif fault.action is FaultAction.RESTORE and not fault.link:
            await self.open_engines(fault.node)

    async def prefill(self, node: str) -> PrefillEngine:
        """The engine of a prefill node, once it is there."""
        async with self.changed:
            await self.changed.wait_for(lambda: node in self.engines)
        engine = self.engines[node]
        assert isinstance(engine, PrefillEngine)
        return engine

    def decode(self, node: str) -> DecodeEngine | None:
        """The engine of a decode node, None while its agent is dead."""
        engine = self.engines.get(node)
        assert not isinstance(engine, PrefillEngine)
        return engine

    def all_engines(self) -> Iterator[tuple[str, Engine]]:
        """Those that are there, and those put aside."""
        yield from self.engines.items()
        yield from self.retired

    async def close_retired(self) -> None:
        """Let go of the engines that were put aside; nothing of theirs is under way any more."""
        retired, self.retired = self.retired, []
        for _, engine in retired:
            await _close(engine)

    async def close(self) -> None:
        """Close all engines."""
        self.retired += self.engines.items()
        self.engines.clear()
        await self.close_retired()


async def _close(engine: Engine) -> None:
    with contextlib.suppress(DualPathError, OSError):  # its agent may be dead
        await engine.close()


@contextlib.asynccontextmanager
async def open_scene(topology: Topology, folder: Path, seed: int) -> AsyncIterator[FaultScene]:
    """Start everything in a new `folder`, whose path must be short. Raises Unavailable if something
    does not start."""
    layout = KVLayout(
        layers=LAYERS, block_tokens=64, layer_bytes=LAYER_BYTES, dtype="fp8", attention="mla"
    )
    namespace = Namespace("dualpath-bench-faults", layout, salt=f"seed-{seed}")
    stored = chains(seed)
    loads = tuple((PlannedLoad(number, 0, chain),) for number, chain in enumerate(stored))
    workload = Workload("faults", 64, BLOCK_BYTES, loads, stored)
    data = folder / "data"
    data.mkdir(parents=True)
    async with contextlib.AsyncExitStack() as stack:
        namespaces = stack.enter_context(contextlib.closing(Namespaces(topology)))
        cluster = await stack.enter_async_context(
            Cluster(
                ClusterConfig(
                    topology=topology,
                    folder=folder,
                    data=data,
                    disk_bytes=STORE_BYTES,
                    dram_bytes=DRAM_BYTES,
                    staging_bytes=STAGING_BYTES,
                    hold_bytes=HOLD_BYTES,
                    namespaces=namespaces,
                    daemon_socket=True,
                    agent_settings=_SETTINGS,
                )
            )
        )
        filling = fill_store(
            cluster.socket(FILLER),
            namespace,
            workload,
            token=cluster.token,
            seed=seed,
            on_progress=lambda nbytes: None,
        )
        await cluster.watched(filling)
        await cluster.stop(FILLER)
        namespaces.shape(RATES)
        verifier = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="verify"))
        scene = FaultScene(topology, namespaces, cluster, namespace, stored, seed, verifier, RATES)
        stack.push_async_callback(scene.close)
        await scene.open_engines()
        yield scene
