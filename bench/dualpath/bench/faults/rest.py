"""Whether a cluster is at rest: nothing under way, nothing held, nothing that grows.

Asks agents and the daemon for their gauges until all of them are at rest or time is up, and reads
what each process has of descriptors, threads and memory.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
from dualpath.bench.faults.scene import FaultScene
from dualpath.proto.dial import open_channel
from dualpath.proto.status import translated
from dualpath.proto.tls import NO_TLS
from dualpath.proto.v1 import agent_pb2, store_pb2, store_pb2_grpc
from dualpath.transfer.errors import DualPathError

REST_S_MAX = 12.0
"""Leases and what is held for requests last two seconds at most; links come back in as many."""
LOOK_S = 0.05
CALL_S_MAX = 5.0
SAMPLES_MIN = 16
DESCRIPTORS_GROWTH_MAX = 6
THREADS_GROWTH_MAX = 4
MEMORY_GROWTH_MAX_BYTES = 48 << 20
"""Staging and holdings are touched for the first time, page by page; loads vary in their number."""
_LOUD = re.compile(r"Traceback|never retrieved|\b(?:ERROR|CRITICAL)\b")


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a process has now."""

    descriptors: int
    threads: int
    memory_bytes: int

    @staticmethod
    def of(pid: int) -> Footprint:
        """Of a living process. Raises OSError if it is gone."""
        status = dict(
            line.partition(":")[::2]
            for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        )
        descriptors = len(tuple(Path(f"/proc/{pid}/fd").iterdir()))
        anonymous = int(status["RssAnon"].split()[0]) << 10
        return Footprint(descriptors, int(status["Threads"]), anonymous)


def growth(name: str, samples: Sequence[Footprint]) -> Iterator[str]:
    """What a process has more of in the last quarter of its rounds than ever in the second; the
    first is its warm-up."""
    if len(samples) < SAMPLES_MIN:
        return
    quarter = len(samples) // 4
    for what, limit in (
        ("descriptors", DESCRIPTORS_GROWTH_MAX),
        ("threads", THREADS_GROWTH_MAX),
        ("memory_bytes", MEMORY_GROWTH_MAX_BYTES),
    ):
        early = max(getattr(each, what) for each in samples[quarter : 2 * quarter])
        late = min(getattr(each, what) for each in samples[-quarter:])
        if late - early > limit:
            yield f"{name}: {what} grew from at most {early} to at least {late}"


def agent_unrest(name: str, stats: agent_pb2.AgentStatsResponse) -> Iterator[str]:
    """What an agent has under way, or holds."""
    held = stats.holdings
    for what, value in (
        ("loads", stats.loads_active),
        ("bytes of staging in use", stats.staging_used_bytes),
        ("bytes waiting for its storage link", stats.read_queue_bytes),
        ("hand-offs", held.hand_offs_active),
        ("receives", held.receives_active),
        ("requests with held chunks", held.requests),
        ("bytes pinned", held.pinned_bytes),
        ("bytes held", held.used_bytes),
    ):
        if value:
            yield f"{name}: {value} {what}"


def daemon_unrest(stats: store_pb2.StatsResponse, agents: int) -> Iterator[str]:
    """What the daemon has under way, or leased."""
    for what, value, wanted in (
        ("leases", stats.leases, 0),
        ("reservations", stats.reservations, 0),
        ("bytes to deliver", stats.queue_bytes, 0),
        ("attachments", stats.attachments, agents),
    ):
        if value != wanted:
            yield f"storage: {value} {what}"


class RestWatch:
    """Looks at one scene, round after round."""

    def __init__(self, scene: FaultScene) -> None:
        self._scene = scene
        self._samples: dict[tuple[str, int], list[Footprint]] = {}
        self._read_bytes: dict[str, int] = {}

    async def unrest(self) -> tuple[list[str], float]:
        """What is not at rest when time is up, and how long it took otherwise, in seconds."""
        return await _settled(self._all, "at rest")

    async def strays(self) -> list[str]:
        """What is still attached to the daemon, or not again, when time is up."""
        found, _ = await _settled(self._daemon, "back", lambda text: "attachments" in text)
        return found

    async def _all(self) -> AsyncIterator[str]:
        async for each in self._agents():
            yield each
        async for each in self._daemon():
            yield each

    async def _agents(self) -> AsyncIterator[str]:
        scene = self._scene
        for node, engine in scene.engines.items():
            try:
                async with asyncio.timeout(CALL_S_MAX):
                    stats = await engine.client.stats()
            except (DualPathError, TimeoutError) as error:
                yield f"{node}: its agent does not answer: {error}"
            else:
                for each in agent_unrest(node, stats):
                    yield each

    async def _daemon(self) -> AsyncIterator[str]:
        scene = self._scene
        try:
            daemon = await self._daemon_stats()
        except DualPathError as error:
            yield f"storage: without attachments, the daemon does not answer: {error}"
        else:
            for each in daemon_unrest(daemon, len(scene.topology.nodes) - 1):
                yield each

    async def _daemon_stats(self) -> store_pb2.StatsResponse:
        scene = self._scene
        storage = scene.topology.storage.name
        channel: grpc.aio.Channel = open_channel(scene.cluster.socket(storage), NO_TLS)
        metadata = (("authorization", f"Bearer {scene.cluster.token}"),)
        try:
            with translated("Stats at the daemon"):
                answer = await store_pb2_grpc.StoreStub(channel).Stats(  # type: ignore[misc]
                    store_pb2.StatsRequest(), timeout=CALL_S_MAX, metadata=metadata
                )
        finally:
            await channel.close()
        assert isinstance(answer, store_pb2.StatsResponse)
        return answer

    def sample(self) -> None:
        """Note what each process has; once a round, at rest."""
        for name, pid in self._scene.cluster.pids.items():
            self._samples.setdefault((name, pid), []).append(Footprint.of(pid))

    def grown(self) -> list[str]:
        """What grew over the rounds in a process that lived through enough of them."""
        return [
            text for (name, _), samples in self._samples.items() for text in growth(name, samples)
        ]

    @property
    def footprints(self) -> Mapping[str, tuple[Footprint, Footprint]]:
        """First and last of the longest life of each process."""
        longest: dict[str, list[Footprint]] = {}
        for (name, _), samples in self._samples.items():
            if len(samples) > len(longest.get(name, ())):
                longest[name] = samples
        return {name: (samples[0], samples[-1]) for name, samples in longest.items()}

    def said(self) -> list[str]:
        """Errors in the logs that were not there before."""
        found = []
        for name in self._scene.cluster.pids:
            text = self._scene.cluster.log(name).read_text(encoding="utf-8", errors="replace")
            new = text[self._read_bytes.get(name, 0) :]
            self._read_bytes[name] = len(text)
            match = _LOUD.search(new)
            if match is not None:
                lines = new[max(0, match.start() - 300) : match.start() + 3000]
                found.append(f"{name} said: {lines}")
        return found


async def _settled(
    look: Callable[[], AsyncIterator[str]],
    word: str,
    matters: Callable[[str], bool] = lambda _: True,
) -> tuple[list[str], float]:
    """Look until nothing that matters is found, or REST_S_MAX; what was found, and the seconds."""
    started_s = time.monotonic()
    while True:
        found = [each async for each in look() if matters(each)]
        elapsed_s = time.monotonic() - started_s
        if not found or elapsed_s > REST_S_MAX:
            return [f"not {word} after {elapsed_s:.0f} s: {each}" for each in found], elapsed_s
        await asyncio.sleep(LOOK_S)
