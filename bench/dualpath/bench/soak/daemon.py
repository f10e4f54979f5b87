"""A real daemon with a witness inside, run in a child until it is killed or stopped."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dualpath.bench.soak import world
from dualpath.bench.soak.children import Tell
from dualpath.bench.soak.place import DeviceKind
from dualpath.bench.soak.witness import Witness, write_note
from dualpath.kvstore.block_store import BlockStore
from dualpath.kvstore.io_mode import IoMode
from dualpath.kvstore.service.config import DaemonConfig
from dualpath.kvstore.service.process import run_daemon
from dualpath.kvstore.store_api import Tier

SAMPLED_S = 1.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Of a daemon's process and store, at one moment."""

    memory_bytes: int
    descriptors: int
    threads: int
    leases: int
    reservations: int
    evicted_blocks: int


def daemon_config(data: Path, unix: Path, device: DeviceKind) -> DaemonConfig:
    """Of a daemon on a data directory, with the limits of the soak's world."""
    io = IoMode.AUTO if device is DeviceKind.RING else IoMode.PSYNC
    return DaemonConfig(
        data=str(data),
        listen="",
        unix=str(unix),
        disk_bytes=world.STORE.disk_bytes,
        dram_bytes=world.STORE.dram_bytes,
        segment_bytes=world.STORE.segment_bytes,
        io=io.value,
        drain_s=1.0,
    )


def witnessed_daemon(tell: Tell, config: DaemonConfig, notes: Path) -> None:
    """Serve; tell where once calls are answered. What the store promises goes to `notes`."""
    fd = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    note = partial(write_note, fd)

    def watch(store: BlockStore) -> None:
        Witness(store, note)

    _serve(tell, config, watch)


def sampled_daemon(tell: Tell, config: DaemonConfig) -> None:
    """Serve; tell where once calls are answered, then a `Sample` every second."""
    stores: list[BlockStore] = []

    def told(where: dict[str, object]) -> None:
        tell(where)
        threading.Thread(target=_sample, args=(tell, stores[0]), daemon=True).start()

    _serve(told, config, stores.append)


def _serve(tell: Tell, config: DaemonConfig, watch: Callable[[BlockStore], None]) -> None:
    open_store = BlockStore.open

    def opened(*arguments: Any, **options: Any) -> BlockStore:
        store = open_store(*arguments, **options)
        watch(store)
        return store

    def ready(where: Mapping[str, object]) -> None:
        tell(dict(where))

    # This process is only this daemon: its store is watched from its first moment on.
    BlockStore.open = opened  # type: ignore[method-assign]
    asyncio.run(run_daemon(config, ready))


def _sample(tell: Tell, store: BlockStore) -> None:
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    tick = threading.Event()
    while not tick.wait(SAMPLED_S):
        stats = store.stats()
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        tell(
            Sample(
                memory_bytes=resident * page_bytes,
                descriptors=len(os.listdir("/proc/self/fd")),
                threads=threading.active_count(),
                leases=stats.leases,
                reservations=stats.reservations,
                evicted_blocks=stats.evicted_blocks[Tier.SSD],
            )
        )
