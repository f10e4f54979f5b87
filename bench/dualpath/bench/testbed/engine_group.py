"""The engines of a cluster: at each prefill agent, and at decode agents that take hand-offs."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from dualpath.bench.testbed.cluster import Cluster
from dualpath.bench.testbed.decode_engine import DecodeEngine
from dualpath.bench.testbed.engine import PrefillEngine
from dualpath.kvstore.namespace import Namespace

POOL_BYTES_MAX = 2 << 30
"""Most memory of an engine's pool; loads wait for pages beyond."""


@contextlib.asynccontextmanager
async def open_engines(
    cluster: Cluster,
    agents: Sequence[str],
    namespace: Namespace,
    *,
    loads: int,
    load_blocks_max: int,
    behind_compute_link: bool,
    seed: int,
) -> AsyncIterator[list[PrefillEngine]]:
    """An engine at each of `agents`, in their order, with memory for `loads` of `load_blocks_max`
    blocks at once (within POOL_BYTES_MAX)."""
    pages = _pages(namespace, loads, load_blocks_max)
    engines: list[PrefillEngine] = []
    with ThreadPoolExecutor(1, thread_name_prefix="verify") as verifier:
        try:
            for agent in agents:
                engine = await PrefillEngine.open(
                    cluster.socket(agent),
                    namespace,
                    token=cluster.token,
                    pages=pages,
                    behind_compute_link=behind_compute_link,
                    seed=seed,
                    verifier=verifier,
                )
                engines.append(engine)
            yield engines
        finally:
            for engine in engines:
                await engine.close()


@contextlib.asynccontextmanager
async def open_decode_engines(
    cluster: Cluster,
    agents: Sequence[str],
    namespace: Namespace,
    *,
    prompts: int,
    prompt_blocks_max: int,
    behind_compute_link: bool,
    seed: int,
) -> AsyncIterator[dict[str, DecodeEngine]]:
    """A decode engine at each of `agents`, by their names, with memory for `prompts` at once
    (within POOL_BYTES_MAX)."""
    pages = _pages(namespace, prompts, prompt_blocks_max)
    engines: dict[str, DecodeEngine] = {}
    with ThreadPoolExecutor(1, thread_name_prefix="verify-decode") as verifier:
        try:
            for agent in agents:
                engines[agent] = await DecodeEngine.open(
                    cluster.socket(agent),
                    namespace,
                    token=cluster.token,
                    pages=pages,
                    behind_compute_link=behind_compute_link,
                    seed=seed,
                    verifier=verifier,
                )
            yield engines
        finally:
            for engine in engines.values():
                await engine.close()


def _pages(namespace: Namespace, prompts: int, blocks_max: int) -> int:
    most = max(blocks_max, POOL_BYTES_MAX // namespace.layout.block_bytes)
    return min(prompts * blocks_max, most)
