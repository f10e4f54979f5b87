"""Loads from a daemon's DRAM over loopback TCP, against one stream that hashes at both ends.

Ours: a daemon process; the agent with its engine in this process. Every chunk is verified at its
destination inside of the timed part, as always; every byte is compared once more outside of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dualpath.agent.config import AgentConfig
from dualpath.agent.places import Places
from dualpath.bench import serving
from dualpath.bench.rounds import Sample, interleave
from dualpath.bench.stopwatch import Stopwatch
from dualpath.bench.store.keyed_blocks import KeyedBlocks
from dualpath.bench.store.section import Figures, is_trial, turns_in
from dualpath.bench.store.socket_copy import SocketCopy
from dualpath.client.blocking import BlockingKVClient
from dualpath.client.memory import EngineMemory
from dualpath.transfer.errors import Unavailable

BLOCK_BYTES = 1 << 20
DEADLINE_S = 120.0
_SPARE_BYTES = 64 << 20


def measure(scratch: Path, rounds: int, progress: Callable[[str], None]) -> Figures:
    """Figures of the section `tcp`."""
    blocks = KeyedBlocks(BLOCK_BYTES, 16 if is_trial(rounds) else 512)
    total = blocks.total_bytes
    with (
        serving.daemon(
            scratch, dram_bytes=total + _SPARE_BYTES, disk_bytes=2 * total + _SPARE_BYTES
        ) as daemon,
        BlockingKVClient.embedded(
            AgentConfig(name="bench", daemons=(daemon.address("listen"),))
        ) as client,
        SocketCopy(total, BLOCK_BYTES) as limit,
    ):
        memory = client.allocate(total)
        try:
            loading = Loading(client, blocks, memory, daemon.pid)
            loading.save()
            loading.check()
            series = interleave(
                {
                    "ours": loading.load,
                    "hashing copy": lambda: limit.copy(hashing=True),
                    "bare copy": lambda: limit.copy(hashing=False),
                },
                turns_in(rounds),
                progress,
            )
        finally:
            memory.close()
    ours, hashing, bare = series["ours"], series["hashing copy"], series["bare copy"]
    return {
        "turns": len(ours.samples),
        "ours_gibs": ours.gibs,
        "hashing_copy_gibs": hashing.gibs,
        "bare_copy_gibs": bare.gibs,
        "ratio": ours.ratio_to(hashing),
        "ratio_to_bare": ours.ratio_to(bare),
        "ours_cpu_s_per_gib": ours.cpu_s_per_gib,
        "daemon_cpu_s_per_gib": ours.median("daemon_cpu_s_per_gib"),
        "hashing_copy_cpu_s_per_gib": hashing.cpu_s_per_gib,
        "spread": ours.spread,
        "hashing_copy_spread": hashing.spread,
    }


class Loading:
    """Saves blocks once and loads them again and again into one memory."""

    def __init__(
        self, client: BlockingKVClient, blocks: KeyedBlocks, memory: EngineMemory, daemon_pid: int
    ) -> None:
        self._client = client
        self._blocks = blocks
        self._memory = memory
        self._daemon_pid = daemon_pid
        self._places = Places.contiguous(blocks.layout, blocks.count)
        self._namespace_id = client.open_namespace(blocks.namespace)

    def save(self) -> None:
        """Store them. Raises Unavailable unless all are sealed."""
        blocks = self._blocks
        for index in range(blocks.count):
            blocks.fill(index, self._memory.view, index * blocks.block_bytes)
        saved = self._client.save(
            self._namespace_id,
            blocks.hashes,
            blocks.parents,
            self._memory,
            self._places,
            deadline_s=DEADLINE_S,
        )
        if saved.sealed_blocks != blocks.count:
            raise Unavailable(
                f"{saved.sealed_blocks} of {blocks.count} blocks were saved: {saved.reason} "
                f"{saved.detail} {dict(saved.events)}"
            )

    def check(self) -> None:
        """Load into wiped memory and compare every byte. Raises Corrupt."""
        self._memory.view[:] = bytes(self._memory.view.nbytes)
        self.load()
        for index in range(self._blocks.count):
            self._blocks.check(index, self._memory.view, index * self._blocks.block_bytes)

    def load(self) -> Sample:
        """One load of everything. Raises Unavailable if the prefix is shorter."""
        with Stopwatch([self._daemon_pid]) as watch:
            result = self._client.load(
                self._namespace_id,
                self._blocks.hashes,
                self._memory,
                self._places,
                deadline_s=DEADLINE_S,
            ).result()
        if result.blocks != self._blocks.count:
            raise Unavailable(f"{result.blocks} of {self._blocks.count} blocks came: {result.miss}")
        total = self._blocks.total_bytes
        return watch.sample(total, daemon_cpu_s_per_gib=watch.others_cpu_s / (total / (1 << 30)))
