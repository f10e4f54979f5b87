"""The running cluster: one daemon, an agent at every compute link, shaped or paced, and its end.

Owns the processes, their sockets and logs, and (in kernel mode) the namespaces they run in.
Addresses flow by the `ready` lines: the daemon first, then decode agents (relays), then prefill
agents, which are told of daemon and relays; a prefill agent relays through those on its own rail,
under the names of their nodes. Whatever goes wrong, `close` ends all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dualpath.bench.testbed.namespaces import Namespaces
from dualpath.bench.testbed.process import ChildProcess
from dualpath.bench.testbed.shaping import LinkRates
from dualpath.bench.testbed.topology import Node, NodeKind, Topology
from dualpath.transfer.errors import Unavailable

READY_S_MAX = 30.0
END_S_MAX = 5.0
LAST_WORDS_S = 1.0
"""How long after a failure the end of a process may be heard of."""
FILLER = "filler"
SCHEDULER = "scheduler"
Result = TypeVar("Result")
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
    hold_bytes: int = 0
    """Of each agent, for hand-offs; nothing is kept there as a cache, which no link would bind."""
    daemon_socket: bool = False
    """Let the daemon answer at a Unix socket too; its memory is one that can be shared then."""
    agent_settings: str = ""
    """More lines of TOML for all agents."""
    namespaces: Namespaces | None = None
    pacing: LinkRates | None = None


class Cluster:
    """See the module docstring. `start` it, use it, `close` it."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._children: dict[str, ChildProcess] = {}
        self._relays: dict[str, str] = {}
        self._expected: set[str] = set()
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
        """By name: each agent, and the daemon on the storage node."""
        return {name: child.pid for name, child in self._children.items()}

    def socket(self, node: str) -> str:
        """Where an engine of that node finds its agent; on the storage node, the daemon."""
        return f"unix:{self._config.folder / node}.sock"

    def _argv(self, node: str, words: Sequence[str]) -> list[str]:
        argv = [*_DUALPATH, *words]
        spaces = self._config.namespaces
        return spaces.enter(node, argv) if spaces is not None else argv

    async def _launch(self, name: str, node: str, words: Sequence[str]) -> ChildProcess:
        child = await ChildProcess.start(name, self._argv(node, words), self.log(name))
        self._children[name] = child
        await child.wait_ready(READY_S_MAX)
        return child

    def _serve_words(self) -> list[str]:
        config = self._config
        storage = config.topology.storage
        at = self.socket(storage.name).removeprefix("unix:")
        first = f"{storage.storage_address}:0"
        listen = self._daemon_address or first
        further = ",".join(f"{address}:0" for address in storage.further_storage)
        if further:  # control by whichever of its links it is called
            listen = f"0.0.0.0:{listen.rpartition(':')[2]}"
        return [
            "serve",
            *("--data", str(config.data)),
            *("--listen", listen),
            *("--data-listen", first),
            *(("--data-rails", further) if further else ()),
            *(("--unix", at) if config.daemon_socket else ()),
            *("--disk-bytes", str(config.disk_bytes)),
            *("--dram-bytes", str(config.dram_bytes)),
            *("--config", str(self._settings)),
        ]

    def _agent_words(self, name: str, node: Node, rail: int, *, paced: bool) -> list[str]:
        config = self._config
        # The storage node has no compute link; its agent only fills the store.
        host = node.compute_addresses[rail] if node.compute_addresses else "127.0.0.1"
        listen = f"{host}:0"
        words = [
            "agent",
            *("--name", name),
            *("--daemons", self._daemon_address),
            *("--listen", listen),
            *("--data-listen", listen),
            *("--unix", self.socket(name).removeprefix("unix:")),
            *("--staging-bytes", str(config.staging_bytes)),
            *("--hold-bytes", str(config.hold_bytes)),
            *("--config", str(self._settings)),
        ]
        if node.kind is NodeKind.PREFILL:
            for relay in config.topology.decode:
                words += ["--relays", f"{relay.name}={self._relays[relay.agents[rail]]}"]
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
        text = f"[scheduler]\n{accepted}[serve]\n{accepted}[agent]\nhold_cache = false\n"
        text += f'token = "{self.token}"\n{accepted}'
        text += self._config.agent_settings
        self._settings.write_text(text, encoding="ascii")
        daemon = await self._launch(storage.name, storage.name, self._serve_words())
        port = daemon.address("listen").rpartition(":")[2]
        self._daemon_address = f"{storage.storage_address}:{port}"
        filler = self._agent_words(FILLER, storage, 0, paced=False)
        await self._launch_all([(FILLER, storage.name, filler)], topology.decode)
        self._relays = {
            agent: self._children[agent].address("listen")
            for node in topology.decode
            for agent in node.agents
        }
        await self._launch_all([], topology.prefill)

    async def _launch_all(
        self, others: Sequence[tuple[str, str, Sequence[str]]], nodes: Sequence[Node]
    ) -> None:
        wanted = list(others)
        wanted += [
            (agent, node.name, self._agent_words(agent, node, rail, paced=True))
            for node in nodes
            for rail, agent in enumerate(node.agents)
        ]
        async with asyncio.TaskGroup() as starting:
            for name, node, words in wanted:
                starting.create_task(self._launch(name, node, words))

    async def start_scheduler(self, words: Sequence[str]) -> str:
        """Run `dualpath scheduler` with these flags beside the nodes, as the engines do; where it
        listens. `stop(SCHEDULER)` ends it. Raises Unavailable."""
        listen = ("--listen", "127.0.0.1:0", "--config", str(self._settings))
        argv = [*_DUALPATH, "scheduler", *listen, *words]
        child = await ChildProcess.start(SCHEDULER, argv, self.log(SCHEDULER))
        self._children[SCHEDULER] = child
        await child.wait_ready(READY_S_MAX)
        return child.address("listen")

    async def stop(self, name: str) -> None:
        """End one process that is not needed any more."""
        child = self._children.pop(name)
        child.terminate()
        await child.close(END_S_MAX)

    async def kill(self, node: str) -> None:
        """End the processes of a node, as a crash would."""
        for name in self._agents(node):
            self._expected.add(name)
            self._children[name].kill()
            await self._children[name].lost()

    def freeze(self, node: str) -> None:
        """Stop the processes of a node where they are."""
        for name in self._agents(node):
            self._children[name].freeze()

    def thaw(self, node: str) -> None:
        """Let the processes of a node go on."""
        for name in self._agents(node):
            self._children[name].thaw()

    async def start_again(self, node: str) -> None:
        """Start the killed processes of a node, where peers look for them."""
        place = next(each for each in self._config.topology.nodes if each.name == node)
        for rail, name in enumerate(place.agents):
            if name not in self._expected:
                continue
            if place.kind is NodeKind.STORAGE:
                words = self._serve_words()
            else:
                words = self._agent_words(name, place, rail, paced=True)
                if name in self._relays:
                    words[words.index("--listen") + 1] = self._relays[name]
            self._expected.discard(name)
            await self._launch(name, node, words)

    def ended(self) -> tuple[str, ...]:
        """Last words of each process that ended by itself."""
        return tuple(
            child.last_words
            for name, child in self._children.items()
            if name not in self._expected and child.has_ended
        )

    def log(self, name: str) -> Path:
        """What a process, and those before it of its name, said on stderr."""
        return self._config.folder / f"{name}.log"

    def _agents(self, node: str) -> tuple[str, ...]:
        return next(each.agents for each in self._config.topology.nodes if each.name == node)

    async def watch(self) -> None:
        """Wait until any process ends by itself; raises Unavailable with its last words. Those that
        are started later are not watched; those that `kill` ends are not missed."""
        waits = {
            asyncio.create_task(self._missed(name, child), name=f"watch {name}")
            for name, child in self._children.items()
            if name not in self._expected
        }
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            raise Unavailable(done.pop().result())
        finally:
            for wait in waits:
                wait.cancel()

    async def _missed(self, name: str, child: ChildProcess) -> str:
        """The last words of a process that ended by itself; waits for ever for one that did not."""
        words = await child.lost()
        if name in self._expected:
            await asyncio.Event().wait()
        return words

    async def watched(self, work: Coroutine[None, None, Result]) -> Result:
        """Run `work`; a process of the cluster that ends meanwhile ends it with its reason."""
        watch = asyncio.create_task(self.watch(), name="watch")
        task = asyncio.create_task(work, name="work")
        try:
            await asyncio.wait({watch, task}, return_when=asyncio.FIRST_COMPLETED)
            failed = task.done() and not task.cancelled() and task.exception() is not None
            if failed:
                # It may have noticed a process's end before the watch has: that is the reason then.
                await asyncio.wait({watch}, timeout=LAST_WORDS_S)
            if watch.done() and (failed or not task.done()):
                watch.result()
            return await task
        finally:
            for each in (watch, task):
                each.cancel()
            await asyncio.gather(watch, task, return_exceptions=True)

    async def close(self) -> None:
        """End every process, politely at first. Idempotent."""
        children = list(self._children.values())
        self._children.clear()
        for child in children:
            child.thaw()
            child.terminate()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*(child.close(END_S_MAX) for child in children))
