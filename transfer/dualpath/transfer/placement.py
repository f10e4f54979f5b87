"""Which path or paths a load may use: the placement policies.

Owns the four policies and the values that they see. A policy is pure: the same views give the
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


def relay_path(agent: str) -> str:
    """Name of the path through the agent `agent`."""
    return RELAY_PREFIX + agent


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

    def paths_for(self, load: LoadView, paths: Sequence[PathView]) -> tuple[str, ...]:
        """Paths allowed for `load`, in order of preference; () if no path is up."""


class DirectPolicy:
    """Everything by the loading node's own storage link; a relay only while that is down."""

    name = "direct"
    fixed = True

    def paths_for(self, load: LoadView, paths: Sequence[PathView]) -> tuple[str, ...]:
        """The direct path if it is up, else the up path with the shortest queue."""
        return fallback_path(paths)


class RoundRobinPolicy:
    """Whole loads over all up paths in turn."""

    name = "round-robin"
    fixed = True

    def paths_for(self, load: LoadView, paths: Sequence[PathView]) -> tuple[str, ...]:
        """The path whose turn it is."""
        up = [path.name for path in paths if path.up]
        return (up[load.turn % len(up)],) if up else ()


class ShorterQueuePolicy:
    """The paper's rule: each load by the side whose storage link has the shorter read queue.

    The sides are the loading node and the request's own decode node; without one (or while the
    path to it is down) the relay with the shortest queue stands for it. Ties go direct.
    """

    name = "shorter-queue"
    fixed = True

    def paths_for(self, load: LoadView, paths: Sequence[PathView]) -> tuple[str, ...]:
        """The single path with the shorter queue."""
        direct = [path for path in paths if path.up and path.kind is PathKind.DIRECT]
        relays = [path for path in paths if path.up and path.kind is PathKind.RELAY]
        if load.decode_peer:
            own = relay_path(load.decode_peer)
            relays = [path for path in relays if path.name == own] or relays
        candidates = [*direct, *relays]
        if not candidates:
            return ()
        # min() keeps the first of equals: direct comes first, then the order of registration.
        return (min(candidates, key=lambda path: path.queue_bytes).name,)


class SplitPolicy:
    """Chunks of one load over every up path that adds something; a path with free credit takes the
    next one."""

    name = "split"
    fixed = False

    def paths_for(self, load: LoadView, paths: Sequence[PathView]) -> tuple[str, ...]:
        """All up paths, direct first; spare ones only in place of a direct path that is down."""
        direct = [path.name for path in paths if path.up and path.kind is PathKind.DIRECT]
        relays = [
            path.name
            for path in paths
            if path.up and path.kind is PathKind.RELAY and not (path.spare and direct)
        ]
        return (*direct, *relays)


def fallback_path(paths: Sequence[PathView]) -> tuple[str, ...]:
    """Direct if it is up, else the up path with the shortest queue, else ()."""
    up = [path for path in paths if path.up]
    if not up:
        return ()
    best = min(up, key=lambda path: (path.kind is not PathKind.DIRECT, path.queue_bytes))
    return (best.name,)


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
