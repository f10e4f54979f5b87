"""Fills the store with every block of a workload, by saves through the storage node's agent.

Owns the order (parents first, each block once) and two buffers: one is generated while the other
is being saved. Content is the keyed content that loads are verified against.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from dualpath.agent.places import Places
from dualpath.bench.testbed.keyed_content import KeyedContent
from dualpath.bench.testbed.workload import Workload
from dualpath.client.kv_client import KVClient
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.errors import Unavailable

FILL_BATCH_BYTES = 16 << 20
FILL_DEADLINE_S = 120.0


async def fill_store(
    agent: str,
    namespace: Namespace,
    workload: Workload,
    *,
    token: str,
    seed: int,
    on_progress: Callable[[int], None],
) -> int:
    """Save all blocks of the workload through the agent; return how many bytes that were.

    Two buffers: one is generated while the other is being saved. Raises Unavailable, naming what
    the store said, if a block could not be stored.
    """
    layout = namespace.layout
    batch_blocks = max(1, FILL_BATCH_BYTES // layout.block_bytes)
    content = KeyedContent(layout, seed)
    done_bytes = 0
    saving: asyncio.Task[int] | None = None
    async with await KVClient.connect(agent, token=token) as client:
        await client.open_namespace(namespace)
        buffers = [await client.allocate(batch_blocks * layout.block_bytes) for _ in range(2)]

        async def save(hashes: Sequence[bytes], parents: Sequence[bytes], half: int) -> int:
            result = await client.save(
                namespace.id,
                hashes,
                parents,
                buffers[half],
                Places.contiguous(layout, len(hashes)),
                deadline_s=FILL_DEADLINE_S,
            )
            if result.present_blocks < len(hashes):
                raise Unavailable(
                    f"the store took {result.present_blocks} of {len(hashes)} blocks: "
                    f"{result.reason or 'refused'} {result.detail}".strip()
                )
            return len(hashes) * layout.block_bytes

        def generate(hashes: Sequence[bytes], half: int) -> None:
            for index, key in enumerate(hashes):
                content.fill(
                    key, buffers[half].view, index * layout.block_bytes, layout.layer_bytes
                )

        half = 0
        for hashes, parents in fill_batches(workload, batch_blocks):
            await asyncio.to_thread(generate, hashes, half)
            if saving is not None:
                done_bytes += await saving
                on_progress(done_bytes)
            saving = asyncio.create_task(save(hashes, parents, half))
            half = 1 - half
        if saving is not None:
            done_bytes += await saving
            on_progress(done_bytes)
        for buffer in buffers:
            buffer.close()
    return done_bytes


def fill_batches(
    workload: Workload, batch_blocks: int
) -> list[tuple[tuple[bytes, ...], tuple[bytes, ...]]]:
    """(hashes, parents) of each batch: every distinct block once, parents first."""
    stored: set[bytes] = set()
    batches = []
    for chain in workload.chains:
        new = [
            (each, chain[index - 1] if index else b"")
            for index, each in enumerate(chain)
            if each not in stored
        ]
        stored.update(each for each, _ in new)
        for start in range(0, len(new), batch_blocks):
            part = new[start : start + batch_blocks]
            batches.append((tuple(each for each, _ in part), tuple(parent for _, parent in part)))
    return batches
