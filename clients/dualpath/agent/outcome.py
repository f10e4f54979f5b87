"""What a lookup, a load and a save came to: values handed to engines.

Owns the value types that the agent answers with, in process and over gRPC, and their mapping
from and to the protocol's enums. A miss, a shorter prefix or a refused save is a value here,
never an exception; its reason is always named.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from dualpath.kvstore.store_api import TIERS, ReserveStatus, SealStatus, Tier
from dualpath.proto.v1 import store_pb2


class MissReason(enum.Enum):
    """Why a prefix ends where it ends; the store's reasons and those of the way to it."""

    NONE = "none"
    ABSENT = "absent"
    PENDING = "pending"
    EVICTED = "evicted"
    CORRUPT = "corrupt"
    INVALIDATED = "invalidated"
    QUOTA = "quota"
    EXPIRED = "expired"
    NAMESPACE = "namespace"
    DEADLINE = "deadline"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    PEER_LOST = "peer_lost"
    RECOMPUTE = "recompute"

    @staticmethod
    def of_proto(value: int) -> MissReason:
        """From the protocol; a value of a newer version reads as UNAVAILABLE."""
        return _FROM_PROTO.get(value, MissReason.UNAVAILABLE)

    @property
    def proto(self) -> store_pb2.MissReason.ValueType:
        """The protocol's value."""
        return store_pb2.MissReason.Value(f"MISS_REASON_{self.name}")


_FROM_PROTO: Mapping[int, MissReason] = {reason.proto: reason for reason in MissReason}


@dataclass(frozen=True, slots=True)
class Lookup:
    """Longest stored prefix: `blocks`, the tier of each, and why it is not longer."""

    blocks: int
    tiers: tuple[Tier, ...]
    miss: MissReason
    detail: str = ""


def tiers_of(answer: store_pb2.LookupResponse) -> tuple[Tier, ...]:
    """The tier of each block; one of a newer version counts as the slowest that we know."""
    return tuple(TIERS[min(code, len(TIERS) - 1)] for code in answer.tiers)


@dataclass(frozen=True, slots=True)
class LoadStarted:
    """What the lookup of a load found."""

    hit_blocks: int
    miss: MissReason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """How a load ended: blocks [0, blocks) are in place and verified, all layers.

    `shares` are verified payload bytes by path, `events` what went wrong on the way by reason
    (corrupt, path_lost, stalled, refused, deadline, ...); `miss` is NONE if every requested
    block was loaded. Times are seconds since the request. `held_bytes` are what relays served from
    their holdings instead of from storage, by path, as far as they had said so at the end.
    """

    blocks: int
    requested_blocks: int
    miss: MissReason
    detail: str
    shares: Mapping[str, int]
    events: Mapping[str, int]
    elapsed_s: float
    lookup_s: float
    nbytes: int
    held_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SaveResult:
    """How a save ended, one entry a block.

    `reserved[i]` is None where the store could not be asked; `sealed[i]` is None where nothing
    was written (the block existed, had no parent, ...). `reason` is "" or the word of the first
    failure, `detail` explains it to a person.
    """

    reserved: tuple[ReserveStatus | None, ...]
    sealed: tuple[SealStatus | None, ...]
    reason: str = ""
    detail: str = ""
    events: Mapping[str, int] = field(default_factory=dict)

    @property
    def present_blocks(self) -> int:
        """Length of the leading run that the store holds now."""
        for index, (reserved, sealed) in enumerate(zip(self.reserved, self.sealed, strict=True)):
            if sealed is not SealStatus.SEALED and reserved is not ReserveStatus.EXISTS:
                return index
        return len(self.reserved)

    @property
    def sealed_blocks(self) -> int:
        """Blocks that this save itself stored."""
        return sum(status is SealStatus.SEALED for status in self.sealed)
