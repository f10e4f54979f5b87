"""Which eviction policies there are, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dualpath.kvstore.eviction import EvictionPolicy
from dualpath.kvstore.lru import Lru
from dualpath.kvstore.s3_fifo import S3Fifo
from dualpath.transfer.errors import InvalidRequest

POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = {S3Fifo.name: S3Fifo, Lru.name: Lru}
"""The first is the default: see the hit rates in docs/architecture.md."""


def check_policy(name: str) -> None:
    """Raises InvalidRequest."""
    if name not in POLICIES:
        raise InvalidRequest(f"eviction: {name!r} is not a policy; known: {', '.join(POLICIES)}")


def new_policy(name: str) -> EvictionPolicy:
    """A policy that knows no rows yet. Raises InvalidRequest."""
    check_policy(name)
    return POLICIES[name]()
