"""The blocking facade does what the async client does, from plain threads."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeAlias

import pytest
from dualpath.agent.outcome import MissReason
from dualpath.agent.places import Places
from dualpath.client.blocking import BlockingKVClient
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    chain,
    fill,
    parents,
    wrong_blocks,
)
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.errors import InvalidRequest, Unavailable

Run: TypeAlias = Callable[..., None]

BLOCKS = 6
PLACES = Places.contiguous(LAYOUT, BLOCKS)


def use(client: BlockingKVClient, seed: str) -> None:
    namespace_id = client.open_namespace(Namespace("model", LAYOUT))
    hashes = chain(BLOCKS, seed)
    memory = client.allocate(BLOCKS * LAYOUT.block_bytes)
    fill(memory, PLACES, hashes)
    saved = client.save(namespace_id, hashes, parents(hashes), memory, PLACES, deadline_s=WAIT_S)
    assert saved.sealed_blocks == BLOCKS
    assert client.lookup(namespace_id, hashes).blocks == BLOCKS
    memory.view[:] = bytes(memory.nbytes)
    load = client.load(namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S)
    assert load.started().hit_blocks == BLOCKS
    assert load.wait_layer(0) == BLOCKS
    assert load.result().miss is MissReason.NONE
    assert load.done
    load.abort()
    assert wrong_blocks(memory, PLACES, hashes) == []
    bad = client.load(
        namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S, paths=("relay:nobody",)
    )
    with pytest.raises(InvalidRequest, match="relay:nobody"):
        bad.result()
    assert client.stats().loads_done >= 1
    with pytest.raises(InvalidRequest, match="5 hashes"):
        client.load(namespace_id, hashes[:-1], memory, PLACES, deadline_s=WAIT_S)
    short = client.load(namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S)
    short.abort()
    assert short.result() is short.result()
    assert short.done
    memory.close()


def test_it_saves_and_loads_embedded_and_remote_and_from_several_threads(
    run_cluster: Run,
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await cluster.remote()
        address = f"unix:{cluster.path}/prefill-1.sock"

        def work() -> None:
            with BlockingKVClient.embedded(cluster.config("embedded")) as client:
                use(client, "embedded")
            with BlockingKVClient.connect(address) as client:
                late = client.allocate(LAYOUT.block_bytes)
                errors: list[BaseException] = []

                def thread(seed: str) -> None:
                    try:
                        use(client, seed)
                    except BaseException as error:  # noqa: BLE001 - shown below
                        errors.append(error)

                threads = [threading.Thread(target=thread, args=(f"t{n}",)) for n in range(3)]
                for item in threads:
                    item.start()
                for item in threads:
                    item.join(WAIT_S)
                assert not errors, errors
            with pytest.raises(Unavailable, match="closed"):
                client.stats()
            client.close()
            # Closing the client has taken all memory back already.
            late.close()
            late.close()

        await asyncio.to_thread(work)

    run_cluster(body)


def test_a_wait_for_a_load_ends_with_its_client(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        def work() -> None:
            with BlockingKVClient.embedded(cluster.config("embedded")) as client:
                namespace_id = client.open_namespace(Namespace("model", LAYOUT))
                hashes = chain(BLOCKS, "left behind")
                memory = client.allocate(BLOCKS * LAYOUT.block_bytes)
                loads = [
                    client.load(namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S)
                    for _ in range(4)
                ]
            for load in loads:
                with contextlib.suppress(Unavailable):
                    assert load.result().blocks == 0
            with pytest.raises(Unavailable, match="closed"):
                client.load(namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S)

        await asyncio.wait_for(asyncio.to_thread(work), WAIT_S)

    run_cluster(body)
