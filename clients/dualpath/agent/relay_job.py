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
from dualpath.agent.holdings import ChunkName, HeldChunk
from dualpath.agent.staging import Slot
from dualpath.proto.v1 import common_pb2
from dualpath.transfer.errors import DualPathError
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import RegionDescriptor
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import WriteStatus

if TYPE_CHECKING:
    ChunkFailure: TypeAlias = common_pb2.ChunkFailure.ValueType


class Stage(enum.Enum):
    """Where a chunk stands."""

    WAITING = "waiting"
    """For credit at the storage link and for a slot; or, if it is held, for its turn."""
    READING = "reading"
    """Asked of the daemon; its slot is armed."""
    FORWARDING = "forwarding"
    """In its slot, staged or held, being written to the requester."""
    OVER = "over"


class ReadRight(enum.Enum):
    """Whether a grant may be served from what is held here, without a read at its daemon."""

    UNKNOWN = "unknown"
    """Nothing of it was held so far."""
    ASKED = "asked"
    """Its daemon will say."""
    CONFIRMED = "confirmed"
    REFUSED = "refused"


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
    request: str = ""
    """Its chunks are kept for this request; "": only passed on."""
    right: ReadRight = ReadRight.UNKNOWN
    held_bytes: int = 0
    """Not read from storage, and not told yet."""
    failures: list[tuple[int, ChunkFailure]] = field(default_factory=list)
    detail: str = ""


@dataclass(slots=True, eq=False)
class RelayChunk:
    """One chunk: `tag` and `target` are the requester's, `upstream_tag` is ours. `slot` is in the
    holdings if there is a `held`, else in the staging."""

    grant: RelayGrant
    block: int
    chunk: int
    tag: int
    target: Slices
    stage: Stage = Stage.WAITING
    upstream_tag: int = 0
    armed: bool = False
    slot: Slot | None = None
    name: ChunkName | None = None
    """What it is, if the requester has said so."""
    held: HeldChunk | None = None
    served: bool = False
    """Was held when it was asked for."""
    intact: bool = True
    """Of one that is read into the holdings: whether it has come with its checksum."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What a transport thread reports of a chunk: written (failure None) or not."""

    chunk: RelayChunk
    failure: ChunkFailure | None
    detail: str = ""


@dataclass(slots=True, eq=False)
class Requester:
    """Who asks: an attached agent, or this agent itself. `peer` is its name in the compute
    network. `held_queue` is of chunks that are held here. Bytes: `waiting_bytes` in its queue,
    `staged_bytes` in slots of the staging, `serving_bytes` of held ones in flight."""

    name: str
    peer: str
    rail: int = 0
    """By which of this node's storage links its chunks are read."""
    sharer: str | None = None
    """As whom it takes its share of what is bounded here; None: this agent itself."""
    queue: deque[RelayChunk] = field(default_factory=deque)
    grants: dict[int, RelayGrant] = field(default_factory=dict)
    waiting_bytes: int = 0
    staged_bytes: int = 0
    reading_bytes: int = 0
    relayed_bytes: int = 0
    held_queue: deque[RelayChunk] = field(default_factory=deque)
    serving_bytes: int = 0
    forwarding: int = 0
    """Chunks that are being written to it; while there are any,"""
    moved_at: float = 0.0
    """when one was last acknowledged, or bytes went to it,"""
    gone_bytes: int = 0
    """and how many had by then."""
    closed: bool = False
    in_turns: bool = False
    in_serving: bool = False
    on_queue: Callable[[], None] | None = None
    """Called when what it should know of the node's read queue may have changed."""
    on_stall: Callable[[str], None] | None = None
    """Called when it takes nothing of what is written to it: it is to be hung up on."""


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
FAILURE_OF_STATUS: dict[WriteStatus, ChunkFailure] = {
    WriteStatus.REFUSED: common_pb2.CHUNK_FAILURE_REFUSED,
    WriteStatus.LOST: common_pb2.CHUNK_FAILURE_PEER_LOST,
    WriteStatus.EXPIRED: common_pb2.CHUNK_FAILURE_DEADLINE,
    WriteStatus.CLOSED: common_pb2.CHUNK_FAILURE_CANCELLED,
}


def failure_of(error: DualPathError) -> ChunkFailure:
    """What a chunk is reported with that ended in this error."""
    return FAILURE_OF_REASON.get(error.reason, common_pb2.CHUNK_FAILURE_PEER_LOST)
