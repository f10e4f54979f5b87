"""Moves bytes between processes: regions, transports, links, paths, lanes, placement."""

from dualpath.transfer.conformance import check_transport
from dualpath.transfer.credit import CreditConfig
from dualpath.transfer.dispatch_config import DispatchConfig
from dualpath.transfer.dispatcher import Dispatcher
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
from dualpath.transfer.fault_plan import FaultPlan
from dualpath.transfer.fault_transport import FaultTransport
from dualpath.transfer.grant import Grant
from dualpath.transfer.lane import SAVE_FLOOR, Lane
from dualpath.transfer.links import Link, LinkGraph, LinkKind, Path
from dualpath.transfer.memory_transport import MemoryHub, MemoryTransport
from dualpath.transfer.placement import (
    DIRECT_PATH,
    POLICY_NAMES,
    LoadView,
    PathKind,
    PathView,
    PlacementPolicy,
    policy_named,
    relay_path,
)
from dualpath.transfer.rates import RateConfig, RateEstimate
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.shm_transport import ShmConfig, ShmTransport
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
    "DIRECT_PATH",
    "POLICY_NAMES",
    "SAVE_FLOOR",
    "Arrival",
    "Completion",
    "Corrupt",
    "CreditConfig",
    "DeadlineExceeded",
    "DispatchConfig",
    "Dispatcher",
    "DualPathError",
    "FaultPlan",
    "FaultTransport",
    "Grant",
    "InvalidRequest",
    "Lane",
    "LeaseExpired",
    "Link",
    "LinkGraph",
    "LinkKind",
    "LoadView",
    "MemoryHub",
    "MemoryTransport",
    "OnArrival",
    "OnCompletion",
    "OnPeerLost",
    "Overloaded",
    "Path",
    "PathDown",
    "PathKind",
    "PathView",
    "PeerLost",
    "PeerTraffic",
    "PermissionDenied",
    "PlacementPolicy",
    "RateConfig",
    "RateEstimate",
    "Region",
    "RegionDescriptor",
    "ShmConfig",
    "ShmTransport",
    "Slices",
    "TcpConfig",
    "TcpTransport",
    "Transport",
    "Unavailable",
    "Write",
    "WriteStatus",
    "check_transport",
    "policy_named",
    "relay_path",
]
