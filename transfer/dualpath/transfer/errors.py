"""The error tree of the whole product, sorted by what the caller can do about it.

Owns the exception classes and nothing else. Expected outcomes (a miss, a refused write, a
throttled peer) are values; an exception here means that a promise could not be kept.
Each class carries a stable `reason` used as the label of counters and in RPC details.
`dualpath.proto.status` maps the classes to gRPC status codes, once, for every edge.
"""

from __future__ import annotations


class DualPathError(Exception):
    """Root of the tree. `reason` is a short stable word, the message names value and remedy."""

    reason = "error"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason


class InvalidRequest(DualPathError):
    """The caller's mistake; never retry unchanged. gRPC INVALID_ARGUMENT."""

    reason = "invalid"


class PermissionDenied(InvalidRequest):
    """The principal may not do this (bad token, forged or foreign ticket). PERMISSION_DENIED."""

    reason = "denied"


class Unavailable(DualPathError):
    """Retry elsewhere. gRPC UNAVAILABLE."""

    reason = "unavailable"


class PathDown(Unavailable):
    """A path stopped making progress or its peer refused service."""

    reason = "path_down"


class PeerLost(Unavailable):
    """The connection to a peer ended."""

    reason = "peer_lost"


class Overloaded(DualPathError):
    """Retry later, after `retry_after_s` seconds. gRPC RESOURCE_EXHAUSTED."""

    reason = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float, reason: str | None = None) -> None:
        super().__init__(message, reason=reason)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(DualPathError):
    """The time that the caller gave has run out. gRPC DEADLINE_EXCEEDED."""

    reason = "deadline"


class LeaseExpired(DualPathError):
    """Lease or reservation is gone: look up again. gRPC FAILED_PRECONDITION."""

    reason = "lease_expired"


class Corrupt(DualPathError):
    """A checksum or a format does not hold; the block was dropped. gRPC DATA_LOSS."""

    reason = "corrupt"
