"""The running cluster: one daemon, an agent on every node, shaped or paced, and its end.

Owns the processes, their sockets and logs, and (in kernel mode) the namespaces they run in.
Addresses flow by the `ready` lines: the daemon first, then decode agents (relays), then prefill
agents, which are told of daemon and relays. Whatever goes wrong, `close` ends all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dualpath.bench.demo.namespaces import Namespaces
from dualpath.bench.demo.process import ChildProcess
from dualpath.bench.demo.shaping import LinkRates
from dualpath.bench.demo.topology import Node, Topology
from dualpath.transfer.errors import Unavailable

READY_S_MAX = 30.0
END_S_MAX = 5.0
FILLER = "filler"
_DUALPATH = (sys.executable, "-m", "dualpath.cli.main")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """`folder` takes sockets and logs (its path must be short: Unix sockets have 107 bytes).

    `namespaces` None: everything on loopback. `pacing` limits the agents in user space.
    """

    topology: Topology
    folder: Path
    data: Path
    disk_bytes: int
    dram_bytes: int
    staging_bytes: int
    namespaces: Namespaces | None = None
    pacing: LinkRates | None = None


class Cluster:
    """See the module docstring. `start` it, use it, `close` it."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._children: dict[str, ChildProcess] = {}
        self._relays: tuple[str, ...] = ()
        self._daemon_address = ""
        self._settings = config.folder / "cluster.toml"
        self.token = secrets.token_hex(16)

    async def __aenter__(self) -> Cluster:
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    @property
    def pids(self) -> Mapping[str, int]:
        """One process a node: its agent, or the daemon on the storage node."""
        return {name: child.pid for name, child in self._children.items()}

    def socket(self, node: str) -> str:
        """Where an engine of that node finds its agent."""
        return f"unix:{self._config.folder / node}.sock"

    def _argv(self, node: str, words: Sequence[str]) -> list[str]:
        argv = [*_DUALPATH, *words]
        spaces = self._config.namespaces
        return spaces.enter(node, argv) if spaces is not None else argv

    async def _launch(self, name: str, node: str, words: Sequence[str]) -> ChildProcess:
        log = self._config.folder / f"{name}.log"
        child = await ChildProcess.start(name, self._argv(node, words), log)
        self._children[name] = child
        await child.wait_ready(READY_S_MAX)
        return child

    def _serve_words(self) -> list[str]:
        config = self._config
        listen = f"{config.topology.storage.storage_address}:0"
        return [
            "serve",
            *("--data", str(config.data)),
            *("--listen", listen),
            *("--data-listen", listen),
            *("--disk-bytes", str(config.disk_bytes)),
            *("--dram-bytes", str(config.dram_bytes)),
            *("--config", str(self._settings)),
        ]

    def _agent_words(self, name: str, node: Node, *, paced: bool) -> list[str]:
        config = self._config
        # The storage node has no compute link; its agent only fills the store.
        listen = f"{node.compute_address or '127.0.0.1'}:0"
        words = [
            "agent",
            *("--name", name),
            *("--daemons", self._daemon_address),
            *("--listen", listen),
            *("--data-listen", listen),
            *("--unix", self.socket(name).removeprefix("unix:")),
            *("--staging-bytes", str(config.staging_bytes)),
            *("--config", str(self._settings)),
        ]
        for relay in self._relays:
            words += ["--relays", relay]
        if paced and config.pacing is not None:
            words += [
                *("--storage-limit-bytes-per-s", str(round(config.pacing.storage_bytes_per_s))),
                *("--compute-limit-bytes-per-s", str(round(config.pacing.compute_bytes_per_s))),
            ]
        return words

    async def _start(self) -> None:
        topology = self._config.topology
        storage = topology.storage
        # In a file, since other users can see the flags of a process.
        accepted = f'tokens = ["{self.token}"]\n'
        text = f'[serve]\n{accepted}[agent]\ntoken = "{self.token}"\n{accepted}'
        self._settings.write_text(text, encoding="ascii")
        daemon = await self._launch(storage.name, storage.name, self._serve_words())
        self._daemon_address = daemon.address("listen")
        filler = self._agent_words(FILLER, storage, paced=False)
        await self._launch_all([(FILLER, storage.name, filler)], topology.decode)
        self._relays = tuple(
            f"{node.name}={self._children[node.name].address('listen')}" for node in topology.decode
        )
        await self._launch_all([], topology.prefill)

    async def _launch_all(
        self, others: Sequence[tuple[str, str, Sequence[str]]], nodes: Sequence[Node]
    ) -> None:
        wanted = list(others)
        wanted += [
            (node.name, node.name, self._agent_words(node.name, node, paced=True)) for node in nodes
        ]
        async with asyncio.TaskGroup() as starting:
            for name, node, words in wanted:
                starting.create_task(self._launch(name, node, words))

    async def stop(self, name: str) -> None:
        """End one process that is not needed any more."""
        child = self._children.pop(name)
        child.terminate()
        await child.close(END_S_MAX)

    async def watch(self) -> None:
        """Wait until any process ends by itself; raises Unavailable with its last words."""
        waits = {
            asyncio.create_task(child.lost(), name=f"watch {name}")
            for name, child in self._children.items()
        }
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            raise Unavailable(done.pop().result())
        finally:
            for wait in waits:
                wait.cancel()

    async def close(self) -> None:
        """End every process, politely at first. Idempotent."""
        children = list(self._children.values())
        self._children.clear()
        for child in children:
            child.terminate()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*(child.close(END_S_MAX) for child in children))
