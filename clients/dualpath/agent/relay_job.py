"""What a relay was asked for: requesters, their grants, and each chunk on its way.

Owns the records only; `relay.py` owns what happens to them. A chunk is in exactly one stage; a
grant ends when all of its chunks have, and a requester is told of each failure once.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.staging import Slot
from dualpath.proto.v1 import common_pb2
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import RegionDescriptor
from dualpath.transfer.slices import Slices

if TYPE_CHECKING:
    ChunkFailure: TypeAlias = common_pb2.ChunkFailure.ValueType


class Stage(enum.Enum):
    """Where a chunk stands."""

    WAITING = "waiting"
    """For credit at the storage link and for a slot."""
    READING = "reading"
    """Asked of the daemon; its slot is armed."""
    FORWARDING = "forwarding"
    """In its slot, being written to the requester."""
    OVER = "over"


@dataclass(frozen=True, slots=True)
class Source:
    """The daemon to read from, under an own lease or a delegated one."""

    daemon: DaemonLink
    lease_id: int = 0
    ticket: bytes = b""


@dataclass(slots=True, eq=False)
class RelayGrant:
    """A grant of a requester. `deadline_at` is on the loop's clock."""

    grant_id: int
    requester: Requester
    source: Source
    window: RegionDescriptor
    lane: Lane
    deadline_at: float
    on_progress: Callable[[common_pb2.GrantProgress], None]
    open_chunks: int = 0
    failures: list[tuple[int, ChunkFailure]] = field(default_factory=list)
    detail: str = ""


@dataclass(slots=True, eq=False)
class RelayChunk:
    """One chunk: `tag` and `target` are the requester's, `upstream_tag` is ours."""

    grant: RelayGrant
    block: int
    chunk: int
    tag: int
    target: Slices
    stage: Stage = Stage.WAITING
    upstream_tag: int = 0
    armed: bool = False
    slot: Slot | None = None


@dataclass(slots=True, eq=False)
class Requester:
    """Who asks: an attached agent, or this agent itself. `peer` is its name in the compute
    network. Bytes: `waiting_bytes` in its queue, `staged_bytes` in slots."""

    name: str
    peer: str
    queue: deque[RelayChunk] = field(default_factory=deque)
    grants: dict[int, RelayGrant] = field(default_factory=dict)
    waiting_bytes: int = 0
    staged_bytes: int = 0
    reading_bytes: int = 0
    relayed_bytes: int = 0
    closed: bool = False
    in_turns: bool = False
    on_queue: Callable[[], None] | None = None
    """Called when what it should know of the node's read queue may have changed."""


FAILURE_OF_REASON: dict[str, ChunkFailure] = {
    "lease_expired": common_pb2.CHUNK_FAILURE_LEASE_EXPIRED,
    "corrupt": common_pb2.CHUNK_FAILURE_CORRUPT,
    "overloaded": common_pb2.CHUNK_FAILURE_OVERLOADED,
    "deadline": common_pb2.CHUNK_FAILURE_DEADLINE,
    "refused": common_pb2.CHUNK_FAILURE_REFUSED,
    "peer_lost": common_pb2.CHUNK_FAILURE_PEER_LOST,
    "cancelled": common_pb2.CHUNK_FAILURE_CANCELLED,
    "denied": common_pb2.CHUNK_FAILURE_DENIED,
    "invalid": common_pb2.CHUNK_FAILURE_INVALID,
}
REASON_OF_FAILURE = {failure: reason for reason, failure in FAILURE_OF_REASON.items()}
