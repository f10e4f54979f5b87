"""A hand-off that is asked for wrongly is refused, by the value."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
from dualpath.agent.places import Places
from dualpath.client.loopback_cluster import LAYOUT, WAIT_S, LoopbackCluster, chain
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.errors import InvalidRequest

Run: TypeAlias = Callable[..., None]

BLOCKS = 8
PLACES = Places.contiguous(LAYOUT, BLOCKS)


def test_bad_input_is_refused_at_once(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await cluster.relay("decode-1")
        prefill = await cluster.embedded()
        namespace_id = await prefill.open_namespace(Namespace("model", LAYOUT))
        hashes = chain(BLOCKS)
        source = await prefill.allocate(BLOCKS * LAYOUT.block_bytes)

        async def refused(match: str, **changed: object) -> None:
            arguments = {
                "request": "r17",
                "decode_peer": "decode-1",
                "namespace_id": namespace_id,
                "hashes": hashes,
                "memory": source,
                "places": PLACES,
                "deadline_s": WAIT_S,
                **changed,
            }
            with pytest.raises(InvalidRequest, match=match):
                await (await prefill.hand_off(**arguments)).result()  # type: ignore[arg-type]

        await refused("characters", request="")
        await refused("characters", request="x" * 129)
        await refused("unknown decode peer 'nobody'", decode_peer="nobody")
        await refused("unknown namespace", namespace_id=b"?" * 16)
        await refused("same hash", hashes=[hashes[0]] * BLOCKS)
        await refused("places", places=Places.contiguous(LAYOUT, 1))
        await refused("region of", places=Places.contiguous(LAYOUT, BLOCKS, offset=1))
        await refused("deadline", deadline_s=0.0)
        await refused("ask for less", deadline_s=1e6)
        hand_off = await prefill.hand_off(
            "r17", "decode-1", namespace_id, hashes, source, PLACES, deadline_s=0.1
        )
        with pytest.raises(InvalidRequest, match="from 0 on"):
            hand_off.layer_done(-1)
        assert (await hand_off.result()).reason == "deadline"

    run_cluster(body)
