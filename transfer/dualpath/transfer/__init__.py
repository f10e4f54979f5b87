"""Moves bytes between processes: regions, transports, links, paths, lanes, placement."""

from dualpath.transfer.errors import (
    Corrupt,
    DeadlineExceeded,
    DualPathError,
    InvalidRequest,
    LeaseExpired,
    Overloaded,
    PathDown,
    PeerLost,
    PermissionDenied,
    Unavailable,
)
from dualpath.transfer.lane import SAVE_FLOOR, Lane
from dualpath.transfer.memory_transport import MemoryHub, MemoryTransport
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.slices import Slices
from dualpath.transfer.tcp_transport import TcpConfig, TcpTransport
from dualpath.transfer.transport import (
    Arrival,
    Completion,
    OnArrival,
    OnCompletion,
    OnPeerLost,
    PeerTraffic,
    Transport,
    Write,
    WriteStatus,
)

__all__ = [
    "SAVE_FLOOR",
    "Arrival",
    "Completion",
    "Corrupt",
    "DeadlineExceeded",
    "DualPathError",
    "InvalidRequest",
    "Lane",
    "LeaseExpired",
    "MemoryHub",
    "MemoryTransport",
    "OnArrival",
    "OnCompletion",
    "OnPeerLost",
    "Overloaded",
    "PathDown",
    "PeerLost",
    "PeerTraffic",
    "PermissionDenied",
    "Region",
    "RegionDescriptor",
    "Slices",
    "TcpConfig",
    "TcpTransport",
    "Transport",
    "Unavailable",
    "Write",
    "WriteStatus",
]
