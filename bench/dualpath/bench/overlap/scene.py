"""Loads whose layers are computed as they come: the daemon, an agent and an engine on timers.

Daemon and agent are processes of their own; the link is the agent's storage limit, paced in user
space. The engine computes nothing: it waits on a timer for each layer, as it would for a GPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from dualpath.agent.places import Places
from dualpath.bench.overlap.figures import Case, Run, Shape
from dualpath.bench.testbed.run_folder import make_run_folder
from dualpath.client.kv_client import KVClient
from dualpath.client.load import Load
from dualpath.client.loopback_cluster import loopback_cluster, stored, wrong_blocks
from dualpath.client.memory import EngineMemory
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.errors import Corrupt, Unavailable

LAYERS = 32
BLOCK_TOKENS = 64
LAYER_BYTES = (256 << 10, 40 << 10)
DEADLINE_S = 120.0
SPARE_BYTES = 64 << 20
FOLDER_PREFIX = "dualpath-overlap-"


def shape_of(layer_bytes: int, nbytes: int) -> Shape:
    """As many blocks as `nbytes` hold, at least one."""
    layout = _layout(layer_bytes)
    blocks = max(1, nbytes // layout.block_bytes)
    ends = [sum(layout.chunk_extent(chunk)) for chunk in range(layout.chunk_count)]
    opens = (
        next(end for end in ends if end >= (layer + 1) * layer_bytes) / layout.block_bytes
        for layer in range(LAYERS)
    )
    return Shape(layer_bytes, blocks, tuple(opens))


def _layout(layer_bytes: int) -> KVLayout:
    return KVLayout(LAYERS, BLOCK_TOKENS, layer_bytes, "float16")


class Engine:
    """One shape's chain, and memory for it."""

    def __init__(
        self,
        client: KVClient,
        shape: Shape,
        namespace_id: bytes,
        hashes: Sequence[bytes],
        memory: EngineMemory,
    ) -> None:
        self._client = client
        self._shape = shape
        self._namespace_id = namespace_id
        self._hashes = hashes
        self._memory = memory
        self._places = Places.contiguous(_layout(shape.layer_bytes), shape.blocks)

    def check(self) -> None:
        """Raise Corrupt unless the last load brought the right bytes."""
        layout = _layout(self._shape.layer_bytes)
        wrong = wrong_blocks(self._memory, self._places, self._hashes, layout)
        if wrong:
            raise Corrupt(f"blocks {wrong[:8]} have other bytes than were stored")

    async def run(self, case: Case) -> Run:
        """One round of a case. Raises Unavailable for a load that is not whole."""
        load_s, _ = await self._timed(self._whole)
        layer_s = case.part * load_s / self._shape.layers
        overlapped_s, compute_s = await self._timed(
            lambda load: self._layer_by_layer(load, layer_s)
        )
        serial_s, _ = await self._timed(lambda load: self._afterwards(load, layer_s))
        return Run(load_s, compute_s, overlapped_s, serial_s)

    async def _timed(self, use: Callable[[Load], Awaitable[float]]) -> tuple[float, float]:
        """Seconds of a load with what its engine does, and those in which that computed."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        load = await self._client.load(
            self._namespace_id, self._hashes, self._memory, self._places, deadline_s=DEADLINE_S
        )
        compute_s = await use(load)
        took_s = loop.time() - started_s
        result = await load.result()
        if result.blocks != self._shape.blocks:
            raise Unavailable(
                f"{result.blocks} of {self._shape.blocks} blocks were loaded: {result.detail}"
            )
        return took_s, compute_s

    async def _whole(self, load: Load) -> float:
        await load.result()
        return 0.0

    async def _layer_by_layer(self, load: Load, layer_s: float) -> float:
        compute_s = 0.0
        for layer in range(self._shape.layers):
            await load.wait_layer(layer)
            compute_s += await _compute(layer_s)
        return compute_s

    async def _afterwards(self, load: Load, layer_s: float) -> float:
        await load.result()
        return sum([await _compute(layer_s) for _ in range(self._shape.layers)])


async def _compute(seconds: float) -> float:
    """Wait as for a GPU; how long it took by the clock."""
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    await asyncio.sleep(seconds)
    return loop.time() - started_s


@asynccontextmanager
async def scene(shapes: Sequence[Shape], rate_bytes_per_s: float) -> AsyncIterator[list[Engine]]:
    """An engine a shape, whose blocks are stored and were loaded once. Raises Unavailable."""
    total = sum(shape.nbytes for shape in shapes)
    folder = make_run_folder(FOLDER_PREFIX)
    try:
        sizes = {"disk_bytes": 2 * total + SPARE_BYTES, "dram_bytes": total + SPARE_BYTES}
        async with loopback_cluster(folder, **sizes) as cluster:
            filler = await cluster.embedded("filler")
            chains = [
                await stored(filler, shape.blocks, layout=_layout(shape.layer_bytes))
                for shape in shapes
            ]
            await filler.close()
            await cluster.stop_daemon()
            await cluster.daemon_process()
            client = await cluster.remote(storage_limit_bytes_per_s=rate_bytes_per_s)
            engines = []
            async with contextlib.AsyncExitStack() as stack:
                for shape, (namespace_id, hashes) in zip(shapes, chains, strict=True):
                    await client.open_namespace(Namespace("model", _layout(shape.layer_bytes)))
                    memory = await client.allocate(shape.nbytes)
                    stack.push_async_callback(memory.aclose)
                    engine = Engine(client, shape, namespace_id, hashes, memory)
                    await engine.run(Case(shape, 0.0))  # which brings it into DRAM
                    engine.check()
                    engines.append(engine)
                yield engines
                for engine in engines:
                    engine.check()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
