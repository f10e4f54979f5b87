"""Lone loads: the time of one load into an engine of some width, against what the links allow.

An engine of width w spreads its KV over w GPUs, each behind a compute link of its own. So a load
into it is w loads of a w-th of the bytes each, one at each agent of the node, and it has ended when
the last of them has. Nothing else runs meanwhile.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass

from dualpath.bench.cluster.config import BLOCK_BYTES, POLICIES
from dualpath.bench.cluster.limits import limit_bytes_per_s
from dualpath.bench.cluster.shaped_cluster import ShapedCluster
from dualpath.bench.testbed.engine import LoadOutcome
from dualpath.bench.testbed.workload import HASH_BYTES, PlannedLoad, Workload

DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class LoneLoad:
    """One measured load. `limit_s` is bytes / min(sum of the links, width x compute link), 0
    without limits."""

    policy: str
    width: int
    nbytes: int
    seconds: float
    limit_s: float
    outcomes: tuple[LoadOutcome, ...]

    @property
    def ratio(self) -> float:
        """Time over the limit's, of shaped links."""
        return self.seconds / self.limit_s


def parts(width: int, load_bytes: int) -> int:
    """Blocks that each of `width` GPUs gets."""
    return max(1, round(load_bytes / BLOCK_BYTES / width))


def lone_workload(
    widths: tuple[int, ...], load_bytes: int, block_tokens: int, seed: int
) -> Workload:
    """What has to be stored: a chain for each GPU, as long as the narrowest engine needs it."""
    chains = []
    for gpu in range(max(widths)):
        blocks = max(parts(width, load_bytes) for width in widths if width > gpu)
        chain = [hashlib.sha256(f"dualpath-lone/{seed}/{gpu}".encode()).digest()]
        while len(chain) < blocks:
            chain.append(hashlib.sha256(chain[-1]).digest())
        chains.append(tuple(chain))
    assert all(len(each) == HASH_BYTES for chain in chains for each in chain)
    loads = tuple((PlannedLoad(gpu, 0, chain),) for gpu, chain in enumerate(chains))
    return Workload("lone loads", block_tokens, BLOCK_BYTES, loads, tuple(chains))


async def lone_load(cluster: ShapedCluster, policy: str, width: int, load_bytes: int) -> LoneLoad:
    """Run one load into the first node's engine of `width`."""
    blocks = parts(width, load_bytes)
    peers = [node.name for node in cluster.topology.decode]
    # Engines are ordered by rail, then by node.
    engines = cluster.engines[:: len(cluster.topology.prefill)][:width]

    async def work() -> tuple[float, tuple[LoadOutcome, ...]]:
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        verifications = await asyncio.gather(
            *(
                engine.load(
                    PlannedLoad(gpu, 0, cluster.workload.chains[gpu][:blocks]),
                    policy=POLICIES[policy],
                    decode_peer=peers[0] if peers else "",
                    deadline_s=DEADLINE_S,
                )
                for gpu, engine in enumerate(engines)
            )
        )
        outcomes = await asyncio.gather(*verifications)
        return max(each.ended_s for each in outcomes) - started_s, tuple(outcomes)

    seconds, outcomes = await cluster.cluster.watched(work())
    nbytes = blocks * BLOCK_BYTES * width
    if cluster.rates is None:
        return LoneLoad(policy, width, nbytes, seconds, 0.0, outcomes)
    limit = limit_bytes_per_s(
        cluster.topology,
        cluster.rates,
        relays=policy != "direct",
        rails_used=width,
        prefill_used=1,
    )
    return LoneLoad(policy, width, nbytes, seconds, nbytes / limit, outcomes)
