"""Huge pages as really obtained, NUMA nodes, locked memory, and sealed shared memory."""

from __future__ import annotations

import mmap
import os
import resource

from dualpath.cli.finding import Finding, Status
from dualpath.cli.sizes import format_bytes
from dualpath.kvstore.arena_memory import open_arena_memory
from dualpath.kvstore.numa import ANY_NODE, memory_nodes, node_of_processors
from dualpath.transfer.errors import DualPathError
from dualpath.transfer.region import HUGE_PAGE_BYTES, Region

_PROBE_BYTES = 8 * HUGE_PAGE_BYTES
_PRIVATE_COST = "reads into 4 KiB pages: about 1.7 times slower where it was measured"
_SHARED_COST = "the daemon's arena uses 4 KiB pages: reads from SSD into it cost more"


def memory_findings() -> list[Finding]:
    """Private huge pages, shared huge pages, NUMA nodes, memlock, sealing."""
    return [
        _huge_pages("huge pages, private", shared=False, cost=_PRIVATE_COST),
        _huge_pages("huge pages, shared", shared=True, cost=_SHARED_COST),
        _numa(),
        _memlock(),
        _sealed_memory(),
    ]


def _huge_pages(name: str, *, shared: bool, cost: str) -> Finding:
    """What an arena gets now: one is opened, on a small scale."""
    try:
        memory = open_arena_memory("dualpath-doctor", _PROBE_BYTES, shared=shared)
    except (OSError, DualPathError) as error:
        return Finding(
            name=name,
            status=Status.ABSENT,
            detail=str(error),
            cost="no arena can be opened like this",
            remedy="free memory; for shared memory Linux >= 5.1 with memfd_create",
        )
    memory.region.close()
    if not memory.remedy:
        return Finding(name=name, status=Status.OK, detail=memory.description)
    return Finding(
        name=name, status=Status.ABSENT, detail=memory.description, cost=cost, remedy=memory.remedy
    )


def _numa() -> Finding:
    nodes = memory_nodes()
    if len(nodes) == 1:
        return Finding(name="NUMA", status=Status.OK, detail="one node: nothing to bind")
    own = node_of_processors(os.sched_getaffinity(0))
    if own != ANY_NODE:
        detail = f"{len(nodes)} nodes; our processors are of node {own}: arenas are bound to it"
        return Finding(name="NUMA", status=Status.OK, detail=detail)
    return Finding(
        name="NUMA",
        status=Status.PARTIAL,
        detail=f"{len(nodes)} nodes; our processors are of several",
        cost="memory may lie on another node than the disk, the NIC or the engine that uses it",
        remedy="one daemon a node, with its numa_node set, or under numactl --cpunodebind=N",
    )


def _memlock() -> Finding:
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding(name="memlock", status=Status.OK, detail="unlimited")
    return Finding(
        name="memlock",
        status=Status.PARTIAL,
        detail=format_bytes(soft),
        cost="without CAP_IPC_LOCK a larger arena is not registered with io_uring, so that reads "
        "and writes cost more; RDMA can register no more memory than that",
        remedy="ulimit -l unlimited, LimitMEMLOCK=infinity in the systemd unit, or memlock -1 of "
        "the container",
    )


def _sealed_memory() -> Finding:
    try:
        region = Region.memfd("dualpath-doctor", mmap.PAGESIZE)
    except (OSError, AttributeError) as error:
        return Finding(
            name="sealed shared memory",
            status=Status.ABSENT,
            detail=str(error),
            cost="engines cannot share memory with their agent: only embedded use works",
            remedy="Linux >= 3.17, and in a container a seccomp profile that allows memfd_create",
        )
    try:
        region.forbid_new_writers()
    except OSError as error:
        return Finding(
            name="sealed shared memory",
            status=Status.PARTIAL,
            detail=f"F_SEAL_FUTURE_WRITE: {error.strerror}",
            cost="the daemon's arena cannot be shared read-only: its data goes over TCP",
            remedy="Linux >= 5.1",
        )
    finally:
        region.close()
    return Finding(name="sealed shared memory", status=Status.OK, detail="memfd with seals")
