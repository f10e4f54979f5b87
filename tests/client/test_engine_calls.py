"""Engines' calls are for engines of the node; how many namespaces they open does not matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import grpc.aio
import pytest
from dualpath.agent import namespaces as module
from dualpath.agent.namespaces import Namespaces
from dualpath.agent.places import Places
from dualpath.client.kv_client import KVClient
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    stored,
    wrong_blocks,
)
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.service.namespace_message import namespace_message
from dualpath.proto.status import error_of
from dualpath.proto.v1 import agent_pb2, agent_pb2_grpc, store_pb2

Run: TypeAlias = Callable[..., None]


def named(salt: str) -> Namespace:
    return Namespace("model", LAYOUT, salt=salt)


def calls_of(stub: Any) -> dict[str, Any]:
    """Each call of an engine, with an empty request."""
    load = agent_pb2.LoadRequest()
    return {
        "OpenNamespace": stub.OpenNamespace(
            store_pb2.OpenNamespaceRequest(namespace=namespace_message(named("peer")))
        ),
        "Lookup": stub.Lookup(store_pb2.LookupRequest()),
        "Load": stub.Load(load).read(),
        "Receive": stub.Receive(load).read(),
        "HandOff": stub.HandOff(iter([agent_pb2.HandOffRequest()])),
        "Save": stub.Save(agent_pb2.SaveRequest()),
        "Abort": stub.Abort(agent_pb2.AbortRequest(load_id=["x"])),
    }


@pytest.mark.parametrize("allowed", [False, True])
def test_over_the_network_nobody_is_an_engine_unless_it_is_allowed(
    run_cluster: Run, allowed: bool
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = (await cluster.relay("decode-1", engine_tcp=allowed)).agent
        async with grpc.aio.insecure_channel(cluster.relays["decode-1"]) as channel:
            stub: Any = agent_pb2_grpc.AgentStub(channel)
            refused, calls = [], calls_of(stub)
            for name, call in calls.items():
                try:
                    await call
                except grpc.RpcError as error:
                    if error_of(error).reason == "engine_socket":
                        refused.append(name)
            assert refused == ([] if allowed else list(calls))
            assert len(agent.namespaces) == int(allowed)
            assert (await stub.Stats(agent_pb2.AgentStatsRequest())).name == "decode-1"

    run_cluster(body)


@pytest.mark.parametrize("remote", [False, True], ids=["embedded", "remote"])
def test_a_namespace_that_made_way_is_told_again(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    monkeypatch.setattr(module.Namespaces.__init__, "__defaults__", (3,))

    async def body(cluster: LoopbackCluster) -> None:
        if remote:
            socket = str(cluster.path / "agent.sock")
            await cluster.relay("node", unix=socket)
            client = await KVClient.connect(f"unix:{socket}")
            cluster.stack.push_async_callback(client.close)
        else:
            client = await cluster.embedded("node")
        namespace_id, hashes = await stored(client, 2)
        for salt in range(5):
            await client.open_namespace(named(str(salt)))
        assert (await client.lookup(namespace_id, hashes)).blocks == 2
        for salt in range(5, 10):
            await client.open_namespace(named(str(salt)))
        memory, places = await client.allocate(2 * LAYOUT.block_bytes), Places.contiguous(LAYOUT, 2)
        load = await client.load(namespace_id, hashes, memory, places, deadline_s=WAIT_S)
        assert (await load.result()).blocks == 2
        assert wrong_blocks(memory, places, hashes) == []

    run_cluster(body)


def test_the_namespace_that_was_used_longest_ago_makes_way() -> None:
    known = Namespaces(2)
    first, second, third = map(named, "abc")
    known.add(first)
    known.add(second)
    assert known.get(first.id) is first
    known.add(third)
    assert set(known) == {first.id, third.id}
    known.forget(third.id)
    known.forget(third.id)
    assert list(known.values()) == [first]
