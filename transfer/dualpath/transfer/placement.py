"""Which path or paths a load may use: the placement policies.

Owns the policies and the values that they see. A policy is pure: the same views give the
same answer, and it never names a path that is down. The dispatcher asks a *fixed* policy once,
when a load starts, and again only after the load has lost its path; it asks any other policy
each time a path comes up or goes down. Which of the allowed paths takes a chunk, and when, is
the dispatcher's business.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dualpath.transfer.errors import InvalidRequest

DIRECT_PATH = "direct"
"""Name of the path from the storage into the loading node's own memory."""

RELAY_PREFIX = "relay:"
_ROUNDING = 1e-9


def direct_path(rail: str) -> str:
    """Name of the path by a further storage link of the loading node, "" for the first."""
    return f"{DIRECT_PATH}:{rail}" if rail else DIRECT_PATH


def relay_path(agent: str, rail: int = 0) -> str:
    """Name of the path through the agent `agent`, by its link number `rail`."""
    return f"{RELAY_PREFIX}{agent}:{rail}" if rail else RELAY_PREFIX + agent


def relay_of(path: str) -> str:
    """The agent that a path goes through, "" for a direct one."""
    if not path.startswith(RELAY_PREFIX):
        return ""
    return path.removeprefix(RELAY_PREFIX).partition(":")[0]


class PathKind(enum.Enum):
    """Through whose storage link a path goes: the loading node's own, or a peer's."""

    DIRECT = "direct"
    RELAY = "relay"


@dataclass(frozen=True, slots=True)
class PathView:
    """What a policy may know about a path.

    `queue_bytes` wait at the storage link of the path: our own bytes that are bound for it or in
    flight on it, and what its node reported of others. `rate_bytes_per_s` 0: unknown; `settled`:
    measured for long enough to plan with. `spare`: it arrives by the very device that binds the
    direct path, so that it can take that one's place, but adds nothing to it.
    """

    name: str
    kind: PathKind
    up: bool
    queue_bytes: int
    inflight_bytes: int
    rate_bytes_per_s: float
    settled: bool = False
    spare: bool = False


@dataclass(frozen=True, slots=True)
class LoadView:
    """What a policy may know about a load.

    `decode_peer` is the agent of the request's own decode node ("" for none). `turn` counts the
    loads that this policy has placed before, so that a policy can take turns without a memory.
    """

    load_id: str
    nbytes: int
    decode_peer: str
    turn: int = 0


class PlacementPolicy(Protocol):
    """Contract: see the module's docstring."""

    @property
    def name(self) -> str:
        """The word that selects it."""

    @property
    def fixed(self) -> bool:
        """True if the choice made at the load's start holds until that path is lost."""

    @property
    def direct_share(self) -> float | None:
        """The part of each load's bytes that goes by direct paths, the rest by relays, while paths
        of both kinds are named; None: whatever path is free takes them."""

    def paths_for(self, load: LoadView, paths: Sequence[PathView]) -> tuple[str, ...]:
        """Paths allowed for `load`, in order of preference; () if no path is up."""


class DirectPolicy:
    """Everything by the loading node's own storage link; a relay only while that is down."""

    name = "direct"
    fixed = True
    direct_share = None

    def paths_for(self, load: LoadView, paths: Sequence[PathView]) -> tuple[str, ...]:
        """The direct path if it is up, else the up path with the shortest queue."""
        return fallback_path(paths)


class RoundRobinPolicy:
    """Whole loads over all up paths in turn."""

    name = "round-robin"
    fixed = True
    direct_share = None

    def paths_for(self, load: LoadView, paths: Sequence[PathView]) -> tuple[str, ...]:
        """The node whose turn it is, by all of its links."""
        nodes = _nodes(paths)
        return _names(nodes[load.turn % len(nodes)]) if nodes else ()


class ShorterQueuePolicy:
    """The paper's rule: each load by the side whose storage link has the shorter read queue.

    The sides are the loading node and the request's own decode node; without one (or while the
    path to it is down) the relay with the shortest queue stands for it. Ties go direct.
    """

    name = "shorter-queue"
    fixed = True
    direct_share = None

    def paths_for(self, load: LoadView, paths: Sequence[PathView]) -> tuple[str, ...]:
        """The node with the shorter queue, by all of its links."""
        nodes = _nodes(paths)
        direct = [node for node in nodes if node[0].kind is PathKind.DIRECT]
        relays = [node for node in nodes if node[0].kind is PathKind.RELAY]
        if load.decode_peer:
            relays = [
                node for node in relays if relay_of(node[0].name) == load.decode_peer
            ] or relays
        candidates = [*direct, *relays]
        # min() keeps the first of equals: direct comes first, then the order of registration.
        return _names(min(candidates, key=_queue_bytes)) if candidates else ()


class SplitPolicy:
    """Chunks of one load over every up path that adds something; a path with free credit takes the
    next one."""

    name = "split"
    fixed = False
    direct_share = None

    def paths_for(self, load: LoadView, paths: Sequence[PathView]) -> tuple[str, ...]:
        """All up paths, direct first; spare ones only in place of a direct path that is down."""
        nodes = _nodes(paths)
        direct = [node for node in nodes if node[0].kind is PathKind.DIRECT]
        relays = [
            path
            for node in nodes
            for path in node
            if path.kind is PathKind.RELAY and not (path.spare and direct)
        ]
        return (*(name for node in direct for name in _names(node)), *_names(relays))


class AssignedPolicy:
    """What a scheduler has assigned: `direct_share` of a load's bytes by the loading node's own
    storage links, the rest by those of the request's decode node. Where one of the two is away, or
    there is no path through that decode node, the other takes all.

    Raises InvalidRequest for a share outside of 0..1.
    """

    name = "assigned"
    fixed = False

    def __init__(self, direct_share: float) -> None:
        if not 0 <= direct_share <= 1:
            raise InvalidRequest(f"direct_share lies in 0..1, not {direct_share}")
        self.direct_share = direct_share

    def paths_for(self, load: LoadView, paths: Sequence[PathView]) -> tuple[str, ...]:
        """The sides that have a share, by all of their links; without any that is up, any node."""
        wanted = [
            name
            for node in _nodes(paths)
            if self._part(load, node[0].name) > 0
            for name in _names(node)
        ]
        return tuple(wanted) or fallback_path(paths)

    def strays(self, load: LoadView, names: Sequence[str]) -> bool:
        """Whether a load on these paths does not go as it was assigned."""
        parts = {relay_of(name): self._part(load, name) for name in names}
        return 0 in parts.values() or sum(parts.values()) < 1 - _ROUNDING

    def _part(self, load: LoadView, path: str) -> float:
        relay = relay_of(path)
        if not relay:
            return self.direct_share
        return 1 - self.direct_share if relay == load.decode_peer else 0.0


def fallback_path(paths: Sequence[PathView]) -> tuple[str, ...]:
    """Direct if it is up, else the node with the shortest queue, by all of its links, else ()."""
    nodes = _nodes(paths)
    if not nodes:
        return ()
    return _names(
        min(nodes, key=lambda node: (node[0].kind is not PathKind.DIRECT, _queue_bytes(node)))
    )


def _nodes(paths: Sequence[PathView]) -> list[list[PathView]]:
    """The up paths by the node through whose storage links they go, in the order of registration.
    Of direct ones, none that is spare beside another."""
    nodes: dict[tuple[PathKind, str], list[PathView]] = {}
    for path in paths:
        if path.up:
            relay = path.kind is PathKind.RELAY
            key = path.kind, (relay_of(path.name) or path.name) if relay else ""
            nodes.setdefault(key, []).append(path)
    for (kind, _), found in nodes.items():
        alone = [path for path in found if not path.spare]
        if kind is PathKind.DIRECT and alone:
            found[:] = alone
    return list(nodes.values())


def _names(paths: Sequence[PathView]) -> tuple[str, ...]:
    return tuple(path.name for path in paths)


def _queue_bytes(paths: Sequence[PathView]) -> int:
    return sum(path.queue_bytes for path in paths)


_POLICIES: dict[str, PlacementPolicy] = {
    policy.name: policy
    for policy in (DirectPolicy(), RoundRobinPolicy(), ShorterQueuePolicy(), SplitPolicy())
}

POLICY_NAMES = tuple(_POLICIES)
"""Words that `policy_named` knows."""


def policy_named(name: str) -> PlacementPolicy:
    """The policy called `name`. Raises InvalidRequest naming the known ones."""
    policy = _POLICIES.get(name)
    if policy is None:
        raise InvalidRequest(
            f"unknown placement policy {name!r}; choose one of {', '.join(POLICY_NAMES)}"
        )
    return policy
