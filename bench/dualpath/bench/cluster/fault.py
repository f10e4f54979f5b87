"""Faults to be made at given times: what they are, and how they are written.

    ACTION:NODE[.LINK]@TIME[:FACTOR]      kill:decode1@5s,slow:decode0.snic@8s:0.25

Pure: making them is `fault_script.py`'s. `kill` ends the agents of a decode node as a crash would,
`stop` freezes them, `cut` pulls the plug of a link, `slow` sets it to FACTOR of its rate, and
`restore` undoes whatever was done to the node or the link. Without LINK all links of the node are
meant. TIME counts from the first load.

Where loads may end early (`everywhere`), the agents of prefill nodes can be killed and stopped as
well, and so can the daemon, on the node `storage`, whose link can be cut but not slowed.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from dualpath.bench.testbed.topology import Node, NodeKind, Topology
from dualpath.transfer.errors import InvalidRequest

FAULTS_MAX = 64
TIME_S_MAX = 600.0
SNIC_LINK = "snic"
CNIC_LINK = "cnic"

_FORM = re.compile(
    r"(?P<action>[a-z]+):(?P<kind>[a-z]+)(?:-?(?P<number>[0-9]{1,3}))?"
    r"(?:\.(?P<link>[a-z]+[0-9]{0,2}))?@(?P<at>[0-9]+(?:\.[0-9]+)?)s?(?::(?P<factor>[0-9.]+))?"
)
_EXAMPLE = "write for example kill:decode1@5s or slow:decode0.snic@8s:0.25"


class FaultAction(enum.Enum):
    """What is done."""

    KILL = "kill"
    STOP = "stop"
    CUT = "cut"
    SLOW = "slow"
    RESTORE = "restore"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is done to a node at `at_s` seconds. `link` is "" for all of its links,
    `snic` or `cnic` with the number of any but the first; `factor` is 1 unless slowed."""

    action: FaultAction
    node: str
    link: str
    at_s: float
    factor: float = 1.0

    def __str__(self) -> str:
        where = f"{self.node}.{self.link}" if self.link else self.node
        factor = f":{self.factor:g}" if self.action is FaultAction.SLOW else ""
        return f"{self.action.value}:{where}@{self.at_s:g}s{factor}"


def parse_faults(text: str, topology: Topology, *, everywhere: bool = False) -> tuple[Fault, ...]:
    """The faults of a list separated by commas, in the order of their times. Raises InvalidRequest,
    naming the part that is wrong and what would be right."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise InvalidRequest(f"--faults {text!r} names no fault; {_EXAMPLE}")
    if len(parts) > FAULTS_MAX:
        raise InvalidRequest(f"--faults: {len(parts)} faults, at most {FAULTS_MAX} can be made")
    faults = [_fault(part, topology, everywhere) for part in parts]
    faults.sort(key=lambda each: each.at_s)
    _check_order(faults)
    return tuple(faults)


def _fault(part: str, topology: Topology, everywhere: bool) -> Fault:
    match = _FORM.fullmatch(part)
    if match is None:
        raise InvalidRequest(f"--faults: {part!r} is not a fault; {_EXAMPLE}")
    try:
        action = FaultAction(match["action"])
    except ValueError:
        known = ", ".join(each.value for each in FaultAction)
        raise InvalidRequest(
            f"--faults {part}: {match['action']!r} is no action; there are {known}"
        ) from None
    name = f"{match['kind']}-{match['number']}" if match["number"] else match["kind"]
    node = _node(part, name, topology, everywhere)
    link, links = match["link"] or "", node_links(node, topology)
    if link and link not in links:
        raise InvalidRequest(
            f"--faults {part}: {node.name} has no link {link!r}; it has {', '.join(links)}"
        )
    if action in (FaultAction.KILL, FaultAction.STOP):
        _check_process_fault(part, node, link, everywhere)
    if action is FaultAction.SLOW and node.kind is NodeKind.STORAGE:
        raise InvalidRequest(f"--faults {part}: the storage node's link has no limit to lower")
    at_s = float(match["at"])
    if at_s > TIME_S_MAX:
        raise InvalidRequest(f"--faults {part}: {at_s:g} s is too late, at most {TIME_S_MAX:g} s")
    return Fault(action, node.name, link, at_s, _factor(part, action, match["factor"]))


def _node(part: str, name: str, topology: Topology, everywhere: bool) -> Node:
    nodes = {
        node.name: node
        for node in topology.nodes
        if everywhere or node.kind is not NodeKind.STORAGE
    }
    if name not in nodes:
        raise InvalidRequest(
            f"--faults {part}: there is no node {name!r} in {topology.label}; "
            f"there are {', '.join(nodes)}"
        )
    return nodes[name]


def _check_process_fault(part: str, node: Node, link: str, everywhere: bool) -> None:
    if link:
        raise InvalidRequest(f"--faults {part}: a link has no process; leave out .{link}")
    if node.kind is not NodeKind.DECODE and not everywhere:
        raise InvalidRequest(
            f"--faults {part}: the loads of a prefill node end with its agent; choose a decode "
            "node, or cut the links of this one"
        )


def _factor(part: str, action: FaultAction, text: str | None) -> float:
    if action is not FaultAction.SLOW:
        if text is not None:
            raise InvalidRequest(f"--faults {part}: only slow takes a factor, not {action.value}")
        return 1.0
    try:
        factor = float(text or "nan")
    except ValueError:
        factor = math.nan
    if not 0.01 <= factor <= 1:
        raise InvalidRequest(
            f"--faults {part}: slow needs a factor in 0.01..1, such as slow:decode0@8s:0.25"
        )
    return factor


def _check_order(faults: Iterable[Fault]) -> None:
    """What was killed can be neither killed nor stopped before it is restored."""
    down: dict[str, Fault] = {}
    for fault in faults:
        if fault.action is FaultAction.RESTORE and not fault.link:
            down.pop(fault.node, None)
        elif fault.action in (FaultAction.KILL, FaultAction.STOP):
            if fault.node in down:
                raise InvalidRequest(
                    f"--faults {fault}: {fault.node} is down since {down[fault.node]}; "
                    f"put restore:{fault.node}@... between them"
                )
            down[fault.node] = fault


def link_names(topology: Topology) -> tuple[str, ...]:
    """The words for the links of a node: `snic`, `snic1`, ..., `cnic`, `cnic1`, ...; a converged
    one has one."""
    if topology.converged:
        return (SNIC_LINK,)
    return (
        *(f"{SNIC_LINK}{snic or ''}" for snic in range(topology.snics)),
        *(f"{CNIC_LINK}{rail or ''}" for rail in range(topology.rails)),
    )


def node_links(node: Node, topology: Topology) -> tuple[str, ...]:
    """The words for the links of this node; the storage node has those to storage only."""
    names = link_names(topology)
    if node.kind is not NodeKind.STORAGE:
        return names
    return tuple(name for name in names if name.startswith(SNIC_LINK))


@dataclass(frozen=True, slots=True)
class NodeState:
    """What is left of a node: whether its agents answer, and the share of each link's rate."""

    up: bool
    shares: tuple[tuple[str, float], ...]

    def share(self, link: str) -> float:
        """0 for a link that is cut or whose node is down."""
        return dict(self.shares)[link] if self.up else 0.0


def states_after(faults: Iterable[Fault], topology: Topology) -> dict[str, NodeState]:
    """Each node after these faults, made one after another."""
    states = {
        node.name: NodeState(
            up=True, shares=tuple((link, 1.0) for link in node_links(node, topology))
        )
        for node in topology.nodes
    }
    for fault in faults:
        before = states[fault.node]
        touched = (fault.link,) if fault.link else tuple(link for link, _ in before.shares)
        up, share = before.up, 1.0
        match fault.action:
            case FaultAction.KILL | FaultAction.STOP:
                up, touched = False, ()
            case FaultAction.CUT:
                share = 0.0
            case FaultAction.SLOW:
                share = fault.factor
            case FaultAction.RESTORE:
                up = up or not fault.link
        shares = tuple((link, share if link in touched else old) for link, old in before.shares)
        states[fault.node] = NodeState(up, shares)
    return states
