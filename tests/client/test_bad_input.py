"""The caller's mistakes are InvalidRequest with the value and the remedy, and harm nobody."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from dualpath.agent.config import AgentConfig
from dualpath.agent.places import Places
from dualpath.agent.process import AgentServer
from dualpath.agent.region_socket import RegionClient
from dualpath.client.kv_client import KVClient
from dualpath.client.loopback_cluster import (
    LAYOUT,
    WAIT_S,
    LoopbackCluster,
    parents,
    stored,
)
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.service.config import DaemonConfig
from dualpath.transfer.errors import InvalidRequest, Unavailable
from dualpath.transfer.region import Region

Run: TypeAlias = Callable[..., None]


def test_places_out_of_bounds_and_other_mistakes_are_refused_by_name(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        await cluster.relay("decode-1")
        client = await cluster.remote()
        namespace_id, hashes = await stored(client, 3)
        memory = await client.allocate(3 * LAYOUT.block_bytes)
        good = Places.contiguous(LAYOUT, 3)

        async def refused(match: str, **changes: object) -> None:
            arguments = {"deadline_s": WAIT_S, **changes}
            places = arguments.pop("places", good)
            namespace = arguments.pop("namespace_id", namespace_id)

            async def ask() -> None:
                load = await client.load(namespace, hashes, memory, places, **arguments)  # type: ignore[arg-type]
                await load.result()

            with pytest.raises(InvalidRequest, match=match):
                await ask()

        block = LAYOUT.block_bytes
        await refused("end at byte", places=Places.contiguous(LAYOUT, 3, offset=1))
        await refused("end at byte", places=Places(LAYOUT.layer_bytes * 2, good.base_bytes))
        await refused("overlap", places=Places(1, good.base_bytes))
        await refused("same place", places=Places(LAYOUT.layer_bytes, (0, 0, block)))
        await refused("unknown placement policy 'best'", policy="best")
        await refused("unknown path 'relay:nobody'", paths=("relay:nobody",))
        await refused("unknown namespace", namespace_id=b"\x00" * 16)
        await refused("deadline_s", deadline_s=-1.0)
        await refused("deadline_s 1000", deadline_s=1000.0)
        with pytest.raises(InvalidRequest, match="hash 0 has 3 bytes"):
            await client.lookup(namespace_id, [b"abc"])
        with pytest.raises(InvalidRequest, match=r"1\.\.8192 hashes"):
            await client.lookup(namespace_id, [b"\x01" * 32] * 8193)
        with pytest.raises(InvalidRequest, match="2 places"):
            await client.save(
                namespace_id,
                hashes,
                parents(hashes),
                memory,
                Places.contiguous(LAYOUT, 2),
                deadline_s=WAIT_S,
            )
        memory.handle ^= 2
        await refused("unknown region handle")
        memory.handle ^= 2
        load = await client.load(namespace_id, hashes, memory, good, deadline_s=WAIT_S)
        assert (await load.result()).blocks == 3

    run_cluster(body)


def test_a_load_id_that_is_running_is_refused_and_free_again_afterwards(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        filler = await cluster.embedded("filler")
        namespace_id, hashes = await stored(filler, 12)
        client = await cluster.embedded(storage_limit_bytes_per_s=4e6)
        await client.open_namespace(Namespace("model", LAYOUT))
        places = Places.contiguous(LAYOUT, 12)
        memory = await client.allocate(12 * LAYOUT.block_bytes)
        first = await client.load(
            namespace_id, hashes, memory, places, deadline_s=WAIT_S, load_id="same"
        )
        await first.started()
        second = await client.load(
            namespace_id, hashes, memory, places, deadline_s=WAIT_S, load_id="same"
        )
        with pytest.raises(InvalidRequest, match="'same' is running"):
            await second.result()
        await first.abort()
        assert (await first.result()).blocks < 12
        third = await client.load(
            namespace_id,
            hashes[:1],
            memory,
            Places.contiguous(LAYOUT, 1),
            deadline_s=WAIT_S,
            load_id="same",
        )
        assert (await third.result()).blocks == 1

    run_cluster(body)


def test_memory_that_is_not_sealed_or_too_small_is_refused(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.remote()
        path = str(cluster.path / "prefill-1.sock.regions")
        sockets = RegionClient(path)
        fd = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, 1 << 20)
        unsealed = Region(memoryview(bytearray(1 << 20)), fd=fd)
        with pytest.raises(InvalidRequest, match="not sealed") as refusal:
            sockets.register(unsealed, behind_compute_link=False)
        assert refusal.value.reason == "unsealed"
        sealed = Region.memfd("small", 1 << 20)
        truncated = Region(memoryview(bytearray(2 << 20)), fd=sealed.fd)
        with pytest.raises(InvalidRequest, match="1048576 bytes, 2097152 were announced"):
            sockets.register(truncated, behind_compute_link=False)
        with open(cluster.path / "file", "w+b") as file:
            file.truncate(1 << 20)
            plain = Region(memoryview(bytearray(1 << 20)), fd=file.fileno())
            with pytest.raises(InvalidRequest, match=r"memfd|sealed"):
                sockets.register(plain, behind_compute_link=False)
        # The connection is still good, and so is the agent.
        handle = sockets.register(sealed, behind_compute_link=False)
        sockets.drop(handle)
        sockets.close()
        os.close(fd)
        sealed.close()
        assert (await client.stats()).name == "prefill-1"

    run_cluster(body)


def test_garbage_on_the_region_socket_costs_only_that_connection(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        client = await cluster.remote()
        path = str(cluster.path / "prefill-1.sock.regions")
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(WAIT_S)
            raw.connect(path)
            raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[:24])
            assert b"not a request" in raw.recv(4096)
        memory = await client.allocate(4096)
        await memory.aclose()
        await memory.aclose()
        memory.close()
        namespace_id, hashes = await stored(client, 1)
        load = await client.load(
            namespace_id, hashes, memory, Places.contiguous(LAYOUT, 1), deadline_s=WAIT_S
        )
        with pytest.raises(InvalidRequest, match=r"bytes|unknown region handle"):
            await load.result()

    run_cluster(body)


def test_memory_needs_the_unix_socket(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        server = await cluster.relay("decode-1")
        del server
        client = await KVClient.connect(cluster.relays["decode-1"])
        with pytest.raises(InvalidRequest, match="unix:/path"):
            await client.allocate(4096)
        await client.close()

    run_cluster(body)


def test_an_absent_agent_is_unavailable_with_the_remedy(run_cluster: Run) -> None:
    async def body(cluster: LoopbackCluster) -> None:
        with pytest.raises(Unavailable, match="dualpath agent"):
            await KVClient.connect(f"unix:{cluster.path}/nobody.sock")

    run_cluster(body)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": ""}, "1..64 characters"),
        ({"name": "a" * 65}, "1..64 characters"),
        ({"name": "decode 1"}, "not 'decode 1'"),
        ({"name": "d\u00e9code"}, "0-9, '.', '_' and '-'"),
        ({"name": "a=b"}, "not 'a=b'"),
        ({"name": "a\n"}, "choose another name"),
        ({"relays": ("decode/1=h:1",)}, "not 'decode/1'"),
        ({"daemons": ("nonsense",)}, "host:port"),
        ({"daemons": ("unix:",)}, "needs a path"),
        ({"relays": ("decode-1",)}, "name=host:port"),
        ({"relays": ("a=h:1", "a=h:2")}, "different names"),
        ({"listen": "127.0.0.1:99999"}, "host:port"),
        ({"data_listen": "0.0.0.0:0"}, "peers can dial"),
        ({"staging_bytes": 1}, "staging_bytes"),
        ({"storage_limit_bytes_per_s": -1.0}, "negative"),
        ({"stall_s": 0.0}, "stall_s"),
    ],
)
def test_a_bad_setting_is_refused_by_name(changes: dict[str, object], match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        AgentConfig(**{"name": "a", "daemons": (), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize(
    "name",
    [
        "hold_s",
        "stall_s",
        "deadline_s_max",
        "lookup_timeout_s",
        "lease_s",
        "reconnect_s_max",
        "compute_limit_bytes_per_s",
        "storage_limit_bytes_per_s",
    ],
)
def test_a_setting_is_a_number_within_its_range(name: str, value: float) -> None:
    settings: dict[str, object] = {"name": "a", "daemons": (), name: value}
    with pytest.raises(InvalidRequest, match=f"{name} must .*not {value}"):
        AgentConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["events_max", "mapped_client_bytes_max", "mapped_bytes_max", "read_ahead_bytes"]
)
def test_a_size_of_the_daemon_is_not_negative(name: str) -> None:
    settings: dict[str, object] = {"data": "/nowhere", name: -1}
    with pytest.raises(InvalidRequest, match=f"{name} must not be negative, not -1"):
        DaemonConfig(**settings)  # type: ignore[arg-type]


def test_every_documented_character_may_stand_in_a_name() -> None:
    for name in ("Prefill-1.rack_2", "a", "a" * 64):
        assert AgentConfig(name=name, daemons=(), relays=(f"r{name[1:]}=h:1",)).name == name


@pytest.mark.parametrize("field", ["listen", "data_listen", "metrics_listen"])
def test_an_agent_names_the_setting_whose_address_is_in_use(field: str) -> None:
    async def body() -> None:
        with socket.socket() as tcp:
            tcp.bind(("127.0.0.1", 0))
            tcp.listen()
            taken = f"127.0.0.1:{tcp.getsockname()[1]}"
            settings: dict[str, str] = {field: taken}
            config = dataclasses.replace(AgentConfig(name="a", daemons=()), **settings)  # type: ignore[arg-type]
            with pytest.raises(Unavailable, match=f"{field}: .*{taken}.*choose another") as caught:
                await AgentServer(config).start()
            assert caught.value.reason == "address_in_use"

    asyncio.run(asyncio.wait_for(body(), WAIT_S))


def test_an_agent_says_which_folder_of_its_socket_is_missing(tmp_path: Path) -> None:
    async def body() -> None:
        config = AgentConfig(name="a", daemons=(), unix=str(tmp_path / "gone" / "a.sock"))
        with pytest.raises(InvalidRequest, match=f"no folder '{tmp_path / 'gone'}'; create it"):
            await AgentServer(config).start()

    asyncio.run(asyncio.wait_for(body(), WAIT_S))


def test_listening_beyond_loopback_needs_tokens_or_insecure() -> None:
    config = AgentConfig(name="a", daemons=(), listen="10.1.2.3:0")
    with pytest.raises(InvalidRequest, match="--insecure"):
        config.check_trust()
    AgentConfig(name="a", daemons=(), listen="10.1.2.3:0", insecure=True).check_trust()
    AgentConfig(name="a", daemons=(), listen="10.1.2.3:0", tokens=("t" * 16,)).check_trust()
