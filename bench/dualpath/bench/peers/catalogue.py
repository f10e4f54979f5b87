"""What is compared: environments with their pinned packages, and entries with their drivers.

Pinned, so that a table can be made again. An entry that cannot run here is skipped with the reason
that its installation or its driver gives; nothing of a peer is part of this project.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


class Reach(enum.Enum):
    """Where the blocks lie, seen from who reads them. Only entries of one kind are compared."""

    PROCESS = "in DRAM, in one process"
    MACHINE = "in DRAM, another process, shared memory"
    TCP = "in DRAM, another process, TCP over loopback"
    DISK = "on disk, page cache bypassed"


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
    """One row of the tables: a driver in an environment, with its settings. `environment` is "" for
    our own. `redis` asks for the program's place."""

    name: str
    title: str
    reach: Reach
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


def _ours(name: str, title: str, mode: str, reach: Reach) -> Entry:
    settings = {"mode": mode}
    return Entry(name, title, reach, "dualpath_store", settings=settings, fresh=True)


def _mooncake(name: str, mode: str, reach: Reach) -> Entry:
    return Entry(name, "Mooncake Store", reach, "mooncake_store", "mooncake", {"mode": mode})


def _nixl(name: str, title: str, mode: str, reach: Reach) -> Entry:
    return Entry(name, f"NIXL, {title}", reach, "nixl_agent", "nixl", {"mode": mode})


def _redhare(name: str, title: str, mode: str, reach: Reach) -> Entry:
    settings = {"mode": mode}
    return Entry(name, title, reach, "redhare_store", "redhare", settings, redis=True, fresh=True)


def _lmcache(name: str, title: str, mode: str, reach: Reach) -> Entry:
    return Entry(name, f"LMCache, {title}", reach, "lmcache_backend", "lmcache", {"mode": mode})


ENTRIES = (
    _ours("dualpath", "DualPath", "embedded", Reach.PROCESS),
    _mooncake("mooncake", "local", Reach.PROCESS),
    _redhare("redhare", "redhare", "local", Reach.PROCESS),
    _lmcache("lmcache", "local CPU backend", "cpu", Reach.PROCESS),
    _ours("dualpath-local", "DualPath, local socket", "local", Reach.MACHINE),
    _mooncake("mooncake-shm", "shm", Reach.MACHINE),
    _nixl("nixl-shm", "UCX", "shm", Reach.MACHINE),
    _ours("dualpath-tcp", "DualPath", "tcp", Reach.TCP),
    _mooncake("mooncake-tcp", "tcp", Reach.TCP),
    _nixl("nixl-tcp", "UCX", "tcp", Reach.TCP),
    _redhare("redhare-tcp", "redhare, cache node", "tcp", Reach.TCP),
    _lmcache("lmcache-server", "server (lm://)", "server", Reach.TCP),
    Entry("redis", "Redis", Reach.TCP, "redis_server", "redis", redis=True),
    _ours("dualpath-disk", "DualPath", "disk", Reach.DISK),
    _nixl("nixl-uring", "POSIX io_uring, one file", "uring", Reach.DISK),
    _nixl("nixl-aio", "POSIX libaio, one file", "aio", Reach.DISK),
    _lmcache("lmcache-disk", "local disk backend", "disk", Reach.DISK),
    Entry("block-files", "a file a block, O_DIRECT, 8 threads", Reach.DISK, "block_files"),
)


def chosen(names: Sequence[str]) -> tuple[Entry, ...]:
    """The named ones in their order, all if none is named. Raises KeyError with the bad name."""
    known = {entry.name for entry in ENTRIES}
    for name in names:
        if name not in known:
            raise KeyError(name)
    return tuple(entry for entry in ENTRIES if not names or entry.name in names)
