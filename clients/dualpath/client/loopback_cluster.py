"""A daemon, relays and clients on loopback, for tests and examples.

Owns what it starts: everything ends with the stack. Also the keyed content of blocks, by which a
receiver can tell right bytes from wrong ones without our checksums. Not for production.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from dualpath.agent.agent import Agent
from dualpath.agent.config import AgentConfig
from dualpath.agent.network import MakeTransport
from dualpath.agent.places import Places
from dualpath.agent.process import AgentServer
from dualpath.client.embedded_session import EmbeddedSession
from dualpath.client.kv_client import KVClient
from dualpath.client.memory import EngineMemory
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.service.config import DaemonConfig
from dualpath.kvstore.service.process import Daemon

WAIT_S = 10.0
LAYOUT = KVLayout(layers=8, block_tokens=16, layer_bytes=80_000, dtype="bf16")
"""Three chunks a block, the last one short; layers are not page-aligned."""

assert LAYOUT.chunk_count == 3


_PROGRAM = """\
import asyncio, json, sys
from dualpath.{module}.config import {config} as Config
from dualpath.{module}.process import {run} as run
settings = {{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(sys.argv[1]).items()}}
ready = lambda where: print(json.dumps(dict(where)), flush=True)
asyncio.run(run(Config(**settings), ready))
"""
_AGENT = _PROGRAM.format(module="agent", config="AgentConfig", run="run_agent")
_DAEMON = _PROGRAM.format(module="kvstore.service", config="DaemonConfig", run="run_daemon")


def content(block_hash: bytes, layout: KVLayout = LAYOUT) -> bytes:
    """The bytes of a block, made from its key."""
    seed = np.frombuffer(block_hash[:16], dtype=np.uint64)
    generator = np.random.Generator(np.random.PCG64(seed.tolist()))
    return generator.bytes(layout.block_bytes)


def chain(count: int, seed: str = "") -> list[bytes]:
    """Hashes of a chain."""
    return [hashlib.sha256(f"{seed}/{index}".encode()).digest() for index in range(count)]


def parents(hashes: Sequence[bytes]) -> list[bytes]:
    """The parent of each hash of a chain from its first block on."""
    return [b"", *hashes[:-1]]


def fill(
    memory: EngineMemory, places: Places, hashes: Sequence[bytes], layout: KVLayout = LAYOUT
) -> None:
    """Write the content of blocks where they belong."""
    for index, block_hash in enumerate(hashes):
        data = memoryview(content(block_hash, layout))
        done = 0
        for offset, nbytes in places.block(layout, index).pieces():
            memory.view[offset : offset + nbytes] = data[done : done + nbytes]
            done += nbytes


def wrong_blocks(
    memory: EngineMemory, places: Places, hashes: Sequence[bytes], layout: KVLayout = LAYOUT
) -> list[int]:
    """Blocks whose bytes are not those of their key."""
    wrong = []
    for index, block_hash in enumerate(hashes):
        pieces = places.block(layout, index).pieces()
        data = b"".join(bytes(memory.view[offset : offset + n]) for offset, n in pieces)
        if data != content(block_hash, layout):
            wrong.append(index)
    return wrong


async def until(condition: Callable[[], bool], what: str, wait_s: float = WAIT_S) -> None:
    """Wait for a state of this process."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_s
    while not condition():
        assert loop.time() < deadline, f"waited {wait_s} s for: {what}"
        await asyncio.sleep(0.005)


@dataclass
class LoopbackCluster:
    """What runs, and how to start more."""

    path: Path
    stack: AsyncExitStack
    daemon: Daemon | None
    daemon_config: DaemonConfig
    address: str
    unix: str
    relays: dict[str, str] = field(default_factory=dict)
    servers: dict[str, AgentServer] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    async def stop_daemon(self) -> None:
        """Stop the daemon; its data stays."""
        daemon, self.daemon = self.daemon, None
        if daemon is not None:
            await daemon.stop()

    async def start_daemon(self) -> None:
        """Start it again, at the same address, with the same data."""
        assert self.daemon is None
        self.daemon = Daemon(dataclasses.replace(self.daemon_config, listen=self.address))
        await self.daemon.start()

    async def daemon_process(self) -> subprocess.Popen[bytes]:
        """Start the daemon as a process of its own, at the same address, with the same data."""
        assert self.daemon is None
        config = dataclasses.replace(self.daemon_config, listen=self.address)
        process, _ = await self._process(_DAEMON, "daemon", dataclasses.asdict(config))
        return process

    async def relay(
        self, name: str, *, make_compute: MakeTransport | None = None, **settings: Any
    ) -> AgentServer:
        """Start an agent that relays."""
        settings = {"daemons": (self.address,), **settings}
        server = AgentServer(AgentConfig(name=name, **settings), make_compute=make_compute)
        where = await server.start()
        self.stack.push_async_callback(server.stop)
        self.servers[name] = server
        self.relays[name] = str(where["listen"])
        return server

    async def relay_process(self, name: str, **settings: Any) -> subprocess.Popen[bytes]:
        """Start an agent that relays, as a process of its own."""
        process, where = await self.spawn(name, daemons=(self.address,), **settings)
        self.relays[name] = str(where["listen"])
        return process

    async def spawn(
        self, name: str, **settings: Any
    ) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
        """Start an agent process; returns it and what it said when it was ready."""
        return await self._process(_AGENT, name, {"name": name, **settings})

    async def _process(
        self, program: str, name: str, settings: dict[str, Any]
    ) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
        process = subprocess.Popen(
            [sys.executable, "-c", program, json.dumps(settings)], stdout=subprocess.PIPE
        )
        self.processes[name] = process
        self.stack.callback(end_process, process)
        assert process.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), WAIT_S)
        assert line, f"{name} ended with {process.poll()} before it was ready"
        return process, json.loads(line)

    def config(self, name: str, **settings: Any) -> AgentConfig:
        """Configuration of an agent that knows the daemon and all relays."""
        relays = tuple(f"{relay}={address}" for relay, address in self.relays.items())
        return AgentConfig(
            **{"name": name, "daemons": (self.address,), "relays": relays, **settings}
        )

    async def embedded(
        self,
        name: str = "prefill-1",
        *,
        make_storage: MakeTransport | None = None,
        make_compute: MakeTransport | None = None,
        **settings: Any,
    ) -> KVClient:
        """A client with an agent in this process."""
        session = await EmbeddedSession.start(
            self.config(name, **settings), make_storage=make_storage, make_compute=make_compute
        )
        client = KVClient(session)
        self.stack.push_async_callback(client.close)
        return client

    async def remote(self, name: str = "prefill-1", **settings: Any) -> KVClient:
        """A client of an agent process, over its Unix socket."""
        config = self.config(name, unix=str(self.path / f"{name}.sock"), **settings)
        fields = dataclasses.asdict(config)
        _, where = await self.spawn(fields.pop("name"), **fields)
        client = await KVClient.connect(f"unix:{where['unix']}")
        self.stack.push_async_callback(client.close)
        return client


def embedded_agent(client: KVClient) -> Agent:
    """The agent inside of a client."""
    session = client._session
    assert isinstance(session, EmbeddedSession)
    return session.agent


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Stop a child of this test, for sure."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
    if process.stdout is not None:
        process.stdout.close()


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a child of this test as a crash would."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)


async def stored(
    client: KVClient, count: int, *, seed: str = "", layout: KVLayout = LAYOUT, salt: str = ""
) -> tuple[bytes, list[bytes]]:
    """Save a chain of keyed blocks; returns the namespace's id and the hashes."""
    namespace_id = await client.open_namespace(Namespace("model", layout, salt=salt))
    hashes = chain(count, seed)
    memory = await client.allocate(layout.block_bytes * count)
    places = Places.contiguous(layout, count)
    fill(memory, places, hashes, layout)
    result = await client.save(
        namespace_id, hashes, parents(hashes), memory, places, deadline_s=WAIT_S
    )
    assert result.sealed_blocks == count, result
    await memory.aclose()
    return namespace_id, hashes


@asynccontextmanager
async def loopback_cluster(path: Path, **settings: Any) -> AsyncIterator[LoopbackCluster]:
    """A daemon with its data in `path`; `settings` are fields of DaemonConfig."""
    async with AsyncExitStack() as stack:
        unix = str(path / "daemon.sock")
        defaults = {
            "data": str(path / "data"),
            "listen": "127.0.0.1:0",
            "unix": unix,
            "disk_bytes": 256 << 20,
            "dram_bytes": 64 << 20,
            "segment_bytes": 16 << 20,
            "drain_s": 0.5,
        }
        config = DaemonConfig(**{**defaults, **settings})
        daemon = Daemon(config)
        where = await daemon.start()
        cluster = LoopbackCluster(path, stack, daemon, config, str(where["listen"]), unix)
        stack.push_async_callback(cluster.stop_daemon)
        yield cluster
