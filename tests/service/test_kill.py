"""kill -9 of a daemon while it is written to: what it serves afterwards is whole."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import DualPathError

WAIT_S = 30.0
BATCH = 4
WRITERS = 3

CHILD = """
import asyncio, json, sys
from dualpath.kvstore.service.config import DaemonConfig
from dualpath.kvstore.service.process import run_daemon
config = DaemonConfig(**json.loads(sys.argv[1]))
asyncio.run(run_daemon(config, lambda where: print(json.dumps(dict(where)), flush=True)))
"""


@dataclass
class Written:
    """One chain: what was sent, and how much of it was acknowledged as durable."""

    hashes: list[bytes] = field(default_factory=list)
    durable: int = 0


@contextlib.asynccontextmanager
async def _child(fields: dict[str, Any]) -> Any:
    """A daemon process; killed at the end, if it was not before."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, json.dumps(fields), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        line = await asyncio.wait_for(child.stdout.readline(), WAIT_S)
        yield child, json.loads(line)["listen"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


async def _keep_writing(
    lab: Any, client: Any, namespace_id: bytes, chain: Written, seed: str, durable: bool
) -> None:
    """Extend one chain, batch after batch, until the daemon is gone."""
    with contextlib.suppress(grpc.RpcError, DualPathError, AssertionError):
        for number in range(1000):
            start = len(chain.hashes)
            chain.hashes += lab.chain(BATCH, f"{seed}/{number}")
            batch = chain.hashes[start:]
            reserved = await client.call(
                "Reserve",
                store_pb2.ReserveRequest(
                    namespace_id=namespace_id,
                    hash=batch,
                    parent=[chain.hashes[start - 1] if start else b"", *batch[:-1]],
                    ttl_ms=60_000,
                    session=client.session,
                ),
            )
            for index, block_hash in enumerate(batch):
                data = lab.content(block_hash)
                for chunk in range(lab.layout.chunk_count):
                    await client.put_chunk(reserved, index, chunk, data)
            sealed = await client.call(
                "Seal",
                store_pb2.SealRequest(
                    reservation_id=reserved.reservation_id,
                    durable=durable,
                    session=client.session,
                ),
            )
            assert set(sealed.status) == {store_pb2.SEAL_STATUS_SEALED}
            if durable:
                chain.durable = len(chain.hashes)


async def _verify(lab: Any, client: Any, namespace_id: bytes, chains: list[Written]) -> int:
    """Load whatever is served, and compare it byte for byte with its key's content."""
    served = 0
    async with client.deliver() as delivery:
        for chain in chains:
            if not chain.hashes:
                continue
            hit = await client.lookup(namespace_id, chain.hashes)
            assert hit.blocks >= chain.durable, "a block acknowledged as durable is gone"
            served += hit.blocks
            for start in range(0, hit.blocks, 16):
                await _compare(lab, delivery, hit.lease_id, chain.hashes[: hit.blocks], start)
    return served


async def _compare(lab: Any, delivery: Any, lease_id: int, hashes: list[bytes], start: int) -> None:
    """Load up to 16 blocks from `start` on to the start of the memory, and compare them."""
    count = min(16, len(hashes) - start)
    window = delivery.window()
    pairs = [(b, c) for b in range(count) for c in range(lab.layout.chunk_count)]

    def shift(message: Any) -> None:
        moved = [block + start for block in message.block]
        del message.block[:]
        message.block.extend(moved)

    grant = await delivery.grant(pairs, window, lease_id=lease_id, change=shift, deadline_ms=30_000)
    outcome = await delivery.outcome(grant)
    assert not outcome.failed, outcome.detail
    for index in range(count):
        assert delivery.block(index) == lab.content(hashes[start + index])
    delivery.client.transport.revoke(window)


async def _rounds(lab: Any, count: int, seed: int) -> None:
    chance = random.Random(seed)
    chains: list[Written] = []
    fields = {
        "data": str(lab.folder / "killed"),
        "listen": "127.0.0.1:0",
        "disk_bytes": 4 << 30,
        "dram_bytes": 24 << 20,
        "segment_bytes": 32 << 20,
    }
    for number in range(count):
        async with _child(fields) as (child, target):
            clients = [await lab.client(target).attach() for _ in range(WRITERS)]
            namespace_id = await clients[0].namespace()
            await _verify(lab, clients[0], namespace_id, chains[-WRITERS:])
            fresh = [Written() for _ in clients]
            chains += fresh
            writers = [
                asyncio.ensure_future(
                    _keep_writing(lab, client, namespace_id, chain, f"{number}/{index}", index != 0)
                )
                for index, (client, chain) in enumerate(zip(clients, fresh, strict=True))
            ]
            await asyncio.sleep(chance.uniform(0.02, 0.6))
            child.kill()
            await asyncio.wait(writers, timeout=WAIT_S)
            assert all(writer.done() for writer in writers)
    async with _child(fields) as (_, target):
        client = await lab.client(target).attach()
        namespace_id = await client.namespace()
        served = await _verify(lab, client, namespace_id, chains)
        stats = await client.call("Stats", store_pb2.StatsRequest())
        assert stats.blocks >= served > 0
        assert stats.corrupt_blocks == 0


def test_after_kill_dash_nine_three_times_every_served_block_is_whole(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        await _rounds(lab, 3, seed=3)

    in_lab(body)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_after_kill_dash_nine_twenty_times_every_served_block_is_whole(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        await _rounds(lab, 20, seed=20)

    in_lab(body, 280)
