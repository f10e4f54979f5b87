"""What is compared: environments with their pinned packages, and entries with their drivers.

Pinned, so that a table can be made again. An entry that cannot run here is skipped with the reason
that its installation or its driver gives; nothing of a peer is part of this project.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


class Medium(enum.Enum):
    """Where the blocks lie when they are read."""

    DRAM = "dram"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment: `requirements` in groups that are installed one after another,
    `alone` without what they depend on; `debian` packages are unpacked into it, not installed."""

    name: str
    requirements: Sequence[str] = ()
    alone: Sequence[str] = ()
    debian: Sequence[str] = ()
    install_s_max: float = 300.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the tables: a driver in an environment, with its settings. `processes` tells
    people who serves. `environment` is "" for our own. `redis` asks for the program's place."""

    name: str
    title: str
    medium: Medium
    driver: str
    environment: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    redis: bool = False
    fresh: bool = False
    """Start it anew for each size of block: what is removed is not free for another size."""

    @property
    def ours(self) -> bool:
        """Whether it is DualPath."""
        return self.driver == "dualpath_store"


REDIS = Environment(
    "redis", ("numpy",), debian=("redis-tools", "libjemalloc2", "liblzf1", "libatomic1")
)
ENVIRONMENTS = (
    REDIS,
    Environment("mooncake", ("mooncake-transfer-engine-non-cuda==0.3.13.post1", "numpy")),
    Environment("nixl", ("numpy",), alone=("nixl-cu12==1.5.1",)),
    Environment("redhare", ("redhare==0.6.0", "numpy")),
    Environment(
        "lmcache",
        (
            "torch==2.13.0",
            "numpy<=2.2.6",
            "aiofile",
            "aiofiles",
            "aiohttp",
            "blake3",
            "cachetools",
            "cryptography",
            "fastapi",
            "httpx",
            "msgspec",
            "numba",
            "nvtx",
            "opentelemetry-api<=1.40.0",
            "opentelemetry-sdk",
            "prometheus_client<=0.24.1",
            "psutil",
            "py-cpuinfo",
            "pyyaml",
            "pyzmq",
            "redis",
            "requests",
            "safetensors",
            "sortedcontainers",
            "transformers>=5.4",
            "uvicorn",
            "setuptools<81",
        ),
        alone=("lmcache==0.5.6",),
        install_s_max=600.0,
    ),
)


def _ours(name: str, title: str, mode: str, medium: Medium = Medium.DRAM) -> Entry:
    settings = {"mode": mode}
    title = f"DualPath, {title}"
    return Entry(name, title, medium, "dualpath_store", settings=settings, fresh=True)


def _mooncake(name: str, title: str, mode: str) -> Entry:
    title = f"Mooncake Store, {title}"
    return Entry(name, title, Medium.DRAM, "mooncake_store", "mooncake", {"mode": mode})


def _nixl(name: str, title: str, mode: str, medium: Medium) -> Entry:
    return Entry(name, f"NIXL, {title}", medium, "nixl_agent", "nixl", {"mode": mode})


def _redhare(name: str, title: str, mode: str) -> Entry:
    settings = {"mode": mode}
    return Entry(
        name, title, Medium.DRAM, "redhare_store", "redhare", settings, redis=True, fresh=True
    )


def _lmcache(name: str, title: str, mode: str, medium: Medium) -> Entry:
    return Entry(name, f"LMCache, {title}", medium, "lmcache_backend", "lmcache", {"mode": mode})


ENTRIES = (
    _ours("dualpath", "in process", "embedded"),
    _ours("dualpath-local", "local socket and shared arena", "local"),
    _ours("dualpath-tcp", "TCP", "tcp"),
    _mooncake("mooncake", "in process", "local"),
    _mooncake("mooncake-shm", "shared-memory client", "shm"),
    _mooncake("mooncake-tcp", "TCP", "tcp"),
    _nixl("nixl-shm", "UCX shared memory", "shm", Medium.DRAM),
    _nixl("nixl-tcp", "UCX TCP", "tcp", Medium.DRAM),
    _redhare("redhare", "redhare, in process", "local"),
    _redhare("redhare-tcp", "redhare, cache node, TCP", "tcp"),
    _lmcache("lmcache", "local CPU backend, in process", "cpu", Medium.DRAM),
    _lmcache("lmcache-server", "server (lm://), TCP", "server", Medium.DRAM),
    Entry("redis", "Redis, TCP", Medium.DRAM, "redis_server", "redis", redis=True),
    _ours("dualpath-disk", "in process", "disk", Medium.DISK),
    _nixl("nixl-uring", "POSIX io_uring, one file", "uring", Medium.DISK),
    _nixl("nixl-aio", "POSIX libaio, one file", "aio", Medium.DISK),
    _lmcache("lmcache-disk", "local disk backend", "disk", Medium.DISK),
    Entry("block-files", "a file a block, O_DIRECT, 8 threads", Medium.DISK, "block_files"),
)


def chosen(names: Sequence[str]) -> tuple[Entry, ...]:
    """The named ones in their order, all if none is named. Raises KeyError with the bad name."""
    known = {entry.name for entry in ENTRIES}
    for name in names:
        if name not in known:
            raise KeyError(name)
    return tuple(entry for entry in ENTRIES if not names or entry.name in names)
