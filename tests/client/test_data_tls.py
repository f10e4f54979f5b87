"""Blocks between a daemon and agents over TLS: loads by two paths, hand-offs, saves, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from dualpath.agent.agent import Agent
from dualpath.agent.config import AgentConfig
from dualpath.agent.places import Places
from dualpath.bench.testbed.authority import Authority
from dualpath.client.kv_client import KVClient
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    chain,
    embedded_agent,
    fill,
    stored,
    until,
    wrong_blocks,
)
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.service.config import DaemonConfig
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.tcp_transport import TcpTransport

Run: TypeAlias = Callable[..., None]

BLOCKS = 24
PLACES = Places.contiguous(LAYOUT, BLOCKS)
BYTES = BLOCKS * LAYOUT.block_bytes


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


def settings_of(authority: Authority, name: str) -> dict[str, Any]:
    """Of a daemon whose data connections need TLS."""
    pair = authority.pair(name)
    return {
        "tls_cert": pair.cert,
        "tls_key": pair.key,
        "tls_client_ca": authority.ca,
        "data_tls": True,
    }


def agent_settings(authority: Authority, name: str) -> dict[str, Any]:
    return {"tls_ca": authority.ca, **settings_of(authority, name)}


def encrypts(agent: Agent) -> bool:
    """Whether none of the agent's TCP transports takes anything in clear."""
    transports = [agent.compute.transport, *(each.transport for each in agent.storage.values())]
    found = [each for each in transports if isinstance(each, TcpTransport)]
    return len(found) >= 2 and all(each._config.tls is not None for each in found)


def test_saves_loads_by_two_paths_and_hand_offs_go_by_tls(
    run_cluster: Run, authority: Authority
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        # The decode node is a process of its own, with an engine on its socket.
        unix = str(cluster.path / "decode-1.sock")
        _, where = await cluster.spawn(
            "decode-1",
            daemons=(cluster.address,),
            unix=unix,
            **agent_settings(authority, "decode-1"),
        )
        cluster.relays["decode-1"] = where["listen"]
        prefill = await cluster.embedded(
            storage_limit_bytes_per_s=20e6, **agent_settings(authority, "prefill-1")
        )
        namespace_id, hashes = await stored(prefill, BLOCKS)
        memory = await prefill.allocate(BYTES)
        agent = embedded_agent(prefill)
        assert encrypts(agent)

        def relays_up() -> bool:
            return {path.path: path.up for path in agent.stats().path}.get("relay:decode-1", False)

        await until(relays_up, "the relay is up")
        load = await prefill.load(namespace_id, hashes, memory, PLACES, deadline_s=WAIT_S)
        result = await load.result()
        assert result.blocks == BLOCKS, result
        assert not wrong_blocks(memory, PLACES, hashes)
        moved = {path.path: path.bytes for path in agent.stats().path}
        assert moved["direct"] > 0
        assert moved["relay:decode-1"] > 0
        await handed_off(cluster, prefill, namespace_id, unix)

    run_cluster(body, unix="", **settings_of(authority, "daemon"))


async def handed_off(
    cluster: LoopbackCluster, prefill: KVClient, namespace_id: bytes, unix: str
) -> None:
    decode = await KVClient.connect(f"unix:{unix}")
    cluster.stack.push_async_callback(decode.close)
    prompt = chain(BLOCKS, "prompt")
    source, target = await prefill.allocate(BYTES), await decode.allocate(BYTES)
    fill(source, PLACES, prompt)
    own_id = await decode.open_namespace(Namespace("model", LAYOUT))
    receive = await decode.receive("r", own_id, prompt, target, PLACES, deadline_s=WAIT_S)
    given = await prefill.hand_off(
        "r", "decode-1", namespace_id, prompt, source, PLACES, deadline_s=WAIT_S
    )
    given.layer_done(LAYOUT.layers - 1)
    assert (await receive.result()).blocks == BLOCKS
    assert not (await given.result()).reason
    assert not wrong_blocks(target, PLACES, prompt)


@pytest.mark.parametrize("side", ["daemon", "agent"])
def test_a_daemon_and_an_agent_that_do_not_agree_say_so_in_time(
    run_cluster: Run, authority: Authority, side: str
) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        settings = agent_settings(authority, "prefill-1") | {"data_tls": side == "agent"}
        client = await cluster.embedded(**settings)
        agent = embedded_agent(client)

        def reason() -> str:
            return " ".join(each.link.reason for each in agent.daemons.values())

        await until(lambda: "data_tls must be set on both sides" in reason(), "a named reason")
        assert agent.storage["tcp"].received_bytes == 0

    settings = settings_of(authority, "daemon") | {"data_tls": side == "daemon"}
    run_cluster(body, unix="", **settings)


@pytest.mark.parametrize("missing", ["tls_ca", "tls_cert"])
def test_an_agent_is_told_which_file_its_data_connections_lack(missing: str) -> None:
    given = {"tls_ca": "a", "tls_cert": "c", "tls_key": "k"}
    AgentConfig(name="a", daemons=(), data_tls=True, **given)  # type: ignore[arg-type]
    del given[missing]
    given.pop("tls_key" if missing == "tls_cert" else "", None)
    with pytest.raises(InvalidRequest, match=missing):
        AgentConfig(name="a", daemons=(), data_tls=True, **given)  # type: ignore[arg-type]


def test_a_daemon_is_told_which_file_its_data_connections_lack() -> None:
    with pytest.raises(InvalidRequest, match="tls_cert"):
        DaemonConfig(data="d", data_tls=True)
    with pytest.raises(InvalidRequest, match="tls_client_ca"):
        DaemonConfig(data="d", data_tls=True, tls_cert="c", tls_key="k")


def test_rdma_between_agents_is_refused_with_data_tls() -> None:
    with pytest.raises(InvalidRequest, match="RDMA goes in clear"):
        AgentConfig(
            name="a",
            daemons=(),
            data_tls=True,
            tls_ca="a",
            tls_cert="c",
            tls_key="k",
            compute_transport="rdma",
        )
