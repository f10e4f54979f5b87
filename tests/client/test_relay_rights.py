"""What a relay holds goes only to those whose ticket their daemon has confirmed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import grpc.aio
import pytest
from dualpath.agent import relay_rights
from dualpath.agent.agent import Agent
from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.places import Places
from dualpath.agent.slice_table import table_of
from dualpath.client.kv_client import KVClient
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    content,
    embedded_agent,
    stored,
    until,
    wrong_blocks,
)
from dualpath.kvstore.checksum import xxh3_64
from dualpath.kvstore.namespace import Namespace
from dualpath.proto.v1 import agent_pb2, agent_pb2_grpc, common_pb2, store_pb2
from dualpath.transfer.region import Region
from dualpath.transfer.slices import Slices
from dualpath.transfer.tcp_transport import TcpTransport

Run: TypeAlias = Callable[..., None]

BLOCKS = 6
BYTES = BLOCKS * LAYOUT.block_bytes
PLACES = Places.contiguous(LAYOUT, BLOCKS)
RELAYED = ("relay:decode-1",)
OFFSET, CHUNK_BYTES = LAYOUT.chunk_extent(0)
DENIED = common_pb2.CHUNK_FAILURE_DENIED
READER, RELAY = "reader-token-0123456789", "relay-token-0123456789"
ACCESS = f"""
[[token]]
name = "relay"
token = "{RELAY}"
[[token]]
name = "reader"
token = "{READER}"
[[rule]]
principal = ["token:relay", "uid:*"]
rights = ["read", "write", "admin"]
"""
READER_RULE = """
[[rule]]
principal = "token:reader"
rights = ["read", "write"]
"""


class Peer:
    """Asks a relay for the first chunk of blocks, with what it likes."""

    def __init__(self, cluster: LoopbackCluster, call: Any, transport: TcpTransport) -> None:
        self._cluster = cluster
        self._call = call
        self._transport = transport
        self._region = Region.anonymous(1 << 20)
        self.data = b""
        self._next_id = 1
        self._got: list[int] = []

    async def ask(self, ticket: bytes, namespace_id: bytes, block_hash: bytes) -> int | None:
        """Block 0 of the ticket's lease: None if it came, else the failure."""
        number, self._next_id = self._next_id, self._next_id + 1
        target = Slices.contiguous(0, CHUNK_BYTES)
        self._region.view[:CHUNK_BYTES] = bytes(CHUNK_BYTES)

        def arrived(arrival: Any) -> bool:
            self._got.append(arrival.tag)
            return True

        window = self._transport.expose(self._region, 0, 1 << 20, arrived)
        self._transport.arm(window, [(number, target)])
        grant = common_pb2.ChunkGrant(
            grant_id=number,
            window=window.to_bytes(),
            lane=1,
            deadline_ms=round(WAIT_S * 1000),
            block=[0],
            chunk=[0],
            tag=[number],
            target=table_of([target]),
        )
        data = content(block_hash)[OFFSET : OFFSET + CHUNK_BYTES]
        known = agent_pb2.KnownChunks(
            namespace_id=namespace_id, block=[0], hash=[block_hash], checksum=[xxh3_64(data)]
        )
        await self._call.write(
            agent_pb2.RelayRequest(
                daemon=self._cluster.address, ticket=ticket, grant=grant, known=known
            )
        )
        failure = None
        done = False
        while not done:
            answer = await asyncio.wait_for(self._call.read(), WAIT_S)
            assert answer is not grpc.aio.EOF
            for progress in answer.progress:
                if progress.grant_id == number:
                    failure = progress.failure[0] if progress.failure else failure
                    done = done or progress.done
        self._transport.revoke(window)
        assert (number in self._got) == (failure is None)
        self.data = bytes(self._region.view[:CHUNK_BYTES])
        return failure

    def close(self) -> None:
        """Leave."""
        self._transport.close()
        self._region.close()


@asynccontextmanager
async def attached(cluster: LoopbackCluster, agent: Agent) -> AsyncIterator[Peer]:
    transport = TcpTransport("peer", lambda *_: None)
    async with grpc.aio.insecure_channel(cluster.relays["decode-1"]) as channel:
        stub: Any = agent_pb2_grpc.AgentStub(channel)
        answer = await stub.Attach(common_pb2.AttachRequest(name="peer", transports=["tcp"]))
        await asyncio.to_thread(
            transport.connect, "decode-1", answer.address, answer.invitation, deadline_s=WAIT_S
        )
        call = stub.Relay()
        await call.write(agent_pb2.RelayRequest(session=answer.session, daemon=cluster.address))
        await asyncio.wait_for(call.read(), WAIT_S)
        peer = Peer(cluster, call, transport)
        try:
            yield peer
        finally:
            call.cancel()
            peer.close()


async def held(
    cluster: LoopbackCluster, client: KVClient, namespace_id: bytes, hashes: Sequence[bytes]
) -> None:
    """Load a chain so that the relay keeps it."""
    memory = await client.allocate(BYTES)
    load = await client.load(
        namespace_id,
        hashes,
        memory,
        PLACES,
        deadline_s=WAIT_S,
        paths=RELAYED,
        decode_peer="decode-1",
        request="held",
    )
    assert (await load.result()).blocks == BLOCKS
    assert wrong_blocks(memory, PLACES, hashes) == []
    await memory.aclose()


async def ticket_of(client: KVClient, agent: Agent, namespace_id: bytes, block: bytes) -> bytes:
    """One that lets the relay read a block under a lease of the client's."""
    (link,) = embedded_agent(client).daemons.values()
    hit = await link.lookup(namespace_id, [block], lease_s=60.0, timeout_s=WAIT_S)
    assert hit.blocks == 1, hit.detail
    (relaying,) = agent.daemons.values()
    return (await link.delegate(hit.lease_id, [relaying.peer_id], 60.0))[0]


def test_without_a_ticket_of_that_namespace_nothing_held_is_handed_out(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        agent = (await cluster.relay("decode-1")).agent
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, BLOCKS)
        other_id, others = await stored(client, 1, seed="other", salt="other")
        await held(cluster, client, namespace_id, hashes)
        assert agent.relay.retained_bytes == BYTES
        foreign = await ticket_of(client, agent, other_id, others[0])
        good = await ticket_of(client, agent, namespace_id, hashes[0])
        served = agent.relay.served_bytes
        async with attached(cluster, agent) as peer:
            assert await peer.ask(b"", namespace_id, hashes[0]) is not None
            assert await peer.ask(b"garbage", namespace_id, hashes[0]) == DENIED
            # Block 0 of the other namespace is read: its bytes, not those that are held.
            assert await peer.ask(foreign, namespace_id, hashes[0]) is None
            assert peer.data == content(others[0])[OFFSET : OFFSET + CHUNK_BYTES]
            assert agent.relay.served_bytes == served
            for _ in range(3):
                assert await peer.ask(good, namespace_id, hashes[0]) is None
                assert peer.data == content(hashes[0])[OFFSET : OFFSET + CHUNK_BYTES]
            assert agent.relay.served_bytes == served + 3 * CHUNK_BYTES

    run_cluster(body)


def test_a_right_that_is_taken_away_ends_what_a_relay_serves(
    run_cluster: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_rights, "CONFIRMED_S", 0.5)
    file = tmp_path / "access.toml"
    file.write_text(ACCESS + READER_RULE)

    async def body(cluster: LoopbackCluster) -> None:
        agent = (await cluster.relay("decode-1", token=RELAY)).agent
        client = await cluster.embedded(token=READER)
        namespace_id, hashes = await stored(client, BLOCKS)
        await held(cluster, client, namespace_id, hashes)
        ticket = await ticket_of(client, agent, namespace_id, hashes[0])
        async with attached(cluster, agent) as peer:
            assert await peer.ask(ticket, namespace_id, hashes[0]) is None
            file.write_text(ACCESS)
            assert cluster.daemon is not None
            cluster.daemon.reload.now()
            deadline = asyncio.get_running_loop().time() + WAIT_S
            while await peer.ask(ticket, namespace_id, hashes[0]) != DENIED:
                assert asyncio.get_running_loop().time() < deadline
            assert agent.holdings.used_bytes >= BYTES  # it is held as before

    run_cluster(body, access_file=str(file))


def test_a_load_asks_for_its_ticket_once_and_an_old_daemon_confirms_none(
    run_cluster: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = DaemonLink._locate
    old = False

    async def locate(self: DaemonLink, *arguments: Any) -> store_pb2.LocateResponse:
        asked.append(arguments)
        answer = await real(self, *arguments)
        if old:
            answer.ClearField("namespace_id")
        return answer

    monkeypatch.setattr(DaemonLink, "_locate", locate)
    monkeypatch.setattr(relay_rights, "CONFIRMED_S", 2 * WAIT_S)

    async def body(cluster: LoopbackCluster) -> None:
        nonlocal old
        agent = (await cluster.relay("decode-1")).agent
        client = await cluster.embedded()
        namespace_id, hashes = await stored(client, BLOCKS)
        await held(cluster, client, namespace_id, hashes)
        assert asked == []
        other = await cluster.embedded("prefill-2")
        await other.open_namespace(Namespace("model", LAYOUT))
        await held(cluster, other, namespace_id, hashes)
        assert len(asked) == 1
        await until(lambda: agent.relay.served_bytes == BYTES, "all is served")
        old = True
        await held(cluster, other, namespace_id, hashes)
        assert len(asked) > 1
        await until(
            lambda: not (agent.relay.staging.used_bytes or agent.holdings.in_use),
            "nothing in flight",
        )
        assert agent.relay.served_bytes == BYTES

    run_cluster(body)
