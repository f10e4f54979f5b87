"""Which NUMA node memory should come from, and taking it from there."""

from __future__ import annotations

import os
from pathlib import Path

from dualpath.transfer.affinity import parse_processors
from dualpath.transfer.errors import InvalidRequest

try:
    from dualpath.kvstore import _native as native
except ImportError:
    native = None  # type: ignore[assignment]

ANY_NODE = -1
"""No node is asked for."""
_NODES = Path("/sys/devices/system/node")


def memory_nodes(root: Path = _NODES) -> tuple[int, ...]:
    """Nodes that have memory, lowest first; (0,) where the kernel tells of none."""
    return tuple(sorted(_numbers(root / "has_memory"))) or (0,)


def node_of_processors(processors: set[int], root: Path = _NODES) -> int:
    """The only node that these processors belong to; ANY_NODE if there are several."""
    nodes = {
        node
        for node in memory_nodes(root)
        if processors & _numbers(root / f"node{node}" / "cpulist")
    }
    return nodes.pop() if len(nodes) == 1 else ANY_NODE


def bind(view: memoryview, wanted: int, *, root: Path = _NODES) -> str:
    """Take the pages of a mapping, which must not be touched yet, from one node; say which.

    `wanted` is the node, or ANY_NODE: then that of the processors that we may run on, if it is
    one. Raises InvalidRequest for a node that does not exist, or that cannot be bound to though it
    was asked for.
    """
    nodes = memory_nodes(root)
    if wanted != ANY_NODE and wanted not in nodes:
        raise InvalidRequest(f"numa_node: {wanted} is none of this machine's: {list(nodes)}")
    if len(nodes) == 1:
        return "one NUMA node"
    node = wanted if wanted != ANY_NODE else node_of_processors(os.sched_getaffinity(0), root)
    if node == ANY_NODE:
        return f"not bound to one of {len(nodes)} NUMA nodes: set numa_node"
    try:
        if native is None:
            raise OSError("the native extension is not built")
        native.bind_node(view, node)
    except OSError as error:
        if wanted != ANY_NODE:
            raise InvalidRequest(f"numa_node: memory of node {node}: {error}") from error
        return f"not bound to NUMA node {node}: {error}"
    return f"NUMA node {node}"


def _numbers(path: Path) -> set[int]:
    """The numbers of a kernel list such as `0-3,8`."""
    try:
        return set(parse_processors(path.read_text()))
    except OSError:
        return set()
