"""A peer that does not read its streams does not keep their handlers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeAlias

import grpc.aio
import pytest
from dualpath.agent import unread_call
from dualpath.client.loopback_cluster import LAYOUT, WAIT_S, LoopbackCluster, chain, until
from dualpath.kvstore.namespace import Namespace
from dualpath.proto.v1 import agent_pb2, agent_pb2_grpc, common_pb2
from dualpath.transfer.tcp_transport import TcpTransport

Run: TypeAlias = Callable[..., None]

STREAMS = 4
CHUNKS = 1 << 13
SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))


def readers() -> int:
    """Handlers of Take that still read."""
    return sum(
        getattr(task.get_coro(), "__qualname__", "") == "Intakes._read"
        for task in asyncio.all_tasks()
    )


def test_take_streams_that_are_never_read_end_after_their_hand_off(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unread_call, "UNREAD_S_MAX", 0.2)

    async def body(cluster: LoopbackCluster) -> None:
        agent = (await cluster.relay("decode-1", hold_bytes=256 << 20)).agent
        transport = TcpTransport("peer", lambda *_: None)
        async with grpc.aio.insecure_channel(
            cluster.relays["decode-1"], options=SMALL_WINDOW
        ) as channel:
            stub: Any = agent_pb2_grpc.AgentStub(channel)
            answer = await stub.Attach(common_pb2.AttachRequest(name="peer", transports=["tcp"]))
            await asyncio.to_thread(
                transport.connect, "decode-1", answer.address, answer.invitation, deadline_s=WAIT_S
            )
            relay = stub.Relay()
            await relay.write(agent_pb2.RelayRequest(session=answer.session))
            calls = []
            for number in range(STREAMS):
                calls.append(stub.Take())
                await calls[-1].write(
                    agent_pb2.TakeRequest(
                        session=answer.session,
                        request=f"r{number}",
                        namespace_id=Namespace("model", LAYOUT).id,
                        hash=chain(CHUNKS, str(number)),
                        chunk_bytes=[4096],
                        deadline_ms=2000,
                    )
                )
                for _ in range(2):
                    await calls[-1].write(agent_pb2.TakeRequest(checksum=range(CHUNKS // 2)))
            await until(lambda: len(agent.intakes) > 0, "they have begun")
            await until(lambda: len(agent.intakes) == 0, "their deadlines have passed")
            await until(lambda: readers() == 0, "their handlers are over")
            del calls
        transport.close()

    run_cluster(body)
