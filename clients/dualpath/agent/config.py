"""Configuration of an agent, read once at the entry point and frozen.

Owns the defaults, the limits and the check that an agent which listens beyond loopback does not
do so without tokens by accident. Does not read files or the environment: that is the CLI's.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field

from dualpath.kvstore.service.config import ServerFiles
from dualpath.proto.tls import Tls
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.lane_marks import LaneMarks, lane_values
from dualpath.transfer.rails import check_hosts
from dualpath.transfer.rdma.config import SERVICE_LEVEL_MAX
from dualpath.transfer.rdma.library import LIBRARIES
from dualpath.transfer.tcp_transport import check_congestion
from dualpath.transfer.tls_files import TlsFiles

DAEMONS_MAX = 64
RELAYS_MAX = 256
STAGING_BYTES_MIN = 8 << 20
NAME_CHARS_MAX = 64
DURATIONS_S_MAX: dict[str, float] = {
    "hold_s": 86400.0,
    "stall_s": 3600.0,
    "deadline_s_max": 86400.0,
    "lookup_timeout_s": 3600.0,
    "lease_s": 600.0,
    "reconnect_s_max": 3600.0,
}
"""The longest that each setting may say; a daemon gives no longer leases."""
COMPUTE_TRANSPORTS = ("tcp", "rdma")
_NAME = re.compile(rf"[A-Za-z0-9._-]{{1,{NAME_CHARS_MAX}}}")


@dataclass(frozen=True, slots=True)
class RelayAddress:
    """A peer agent that may relay for us: its name and control address (`host:port`)."""

    name: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """Everything an agent needs to know. Addresses are `host:port`; port 0 takes any.

    `daemons` are control addresses of storage daemons (`host:port` or `unix:/path`, the latter
    also selects shared memory for the data). `listen` is our control address for peers, `unix`
    the path of the engines' socket ("" for none; the region socket is `<unix>.regions`),
    `data_listen` our address on the compute network. `relays` are `name=host:port`.
    `storage_addresses` are addresses of this node on the storage network, one a link, to stripe
    over; none: those that lie in the network of one of a daemon's data addresses are found.
    `name` is how peers and daemons call us, 1..64 characters of A-Z, a-z, 0-9, ".", "_" and "-".
    `policy` is the placement policy of loads that name none: direct, round-robin, shorter-queue or
    split. `staging_bytes` is the memory in which we relay for peers. `storage_limit_bytes_per_s`
    and `compute_limit_bytes_per_s` pace each link to a network in user space, payload in each
    direction, 0 for no limit. `metrics_listen` is the address of the Prometheus endpoint, "" for
    none.
    """

    name: str
    daemons: tuple[str, ...]
    listen: str = "127.0.0.1:0"
    unix: str = ""
    data_listen: str = "127.0.0.1:0"
    storage_addresses: tuple[str, ...] = ()
    relays: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()
    """`daemon=/path`: where the data directory of a daemon shows on this node, so that we read its
    segment files ourselves."""
    policy: str = "split"
    staging_bytes: int = 64 << 20
    hold_bytes: int = 64 << 20
    """Memory for chunks of requests whose decode engine runs on this node: kept of what we relay
    for them, and handed over by their prefill nodes; those that nobody receives yet get at most
    half of it. Less than 1 MiB: none is kept."""
    hold_s: float = 120.0
    """How long chunks are kept for a request that nobody asks for."""
    hold_cache: bool = True
    """Keep chunks that no request needs any more while there is room, to serve them again."""
    storage_limit_bytes_per_s: float = 0.0
    compute_limit_bytes_per_s: float = 0.0
    token: str = field(default="", repr=False)
    """Ours, shown to daemons and peers."""
    tokens: tuple[str, ...] = field(default=(), repr=False)
    """Those we accept from peers and engines; empty: none is asked for."""
    engine_tcp: bool = False
    """Serve engines' calls on `listen`, too, and not only on `unix`: whoever may dial in as a peer
    may then look up, load, save and abort as an engine."""
    insecure: bool = False
    """Listen beyond loopback without tokens."""
    tls_ca: str = ""
    """PEM file of who signed the certificates of daemons and peers, "system" for those that gRPC
    knows; with it all TCP control goes over TLS."""
    tls_cert: str = ""
    """PEM file of our certificate: shown to daemons and peers that ask for one, and to those that
    dial us, who must speak TLS then. Read again when it changes."""
    tls_key: str = ""
    """PEM file of its key."""
    tls_client_ca: str = ""
    """PEM file: whoever dials us over TCP must show a certificate signed by it."""
    tls_name: str = ""
    """Name to expect in the certificates of daemons and peers, instead of the host dialled."""
    data_tls: bool = False
    """Blocks go over TCP by TLS too, and both ends show certificates: needs `tls_ca`, `tls_cert`
    and `tls_key`, and the same setting at daemons and peers. Who dials us is checked by
    `tls_client_ca`, or by `tls_ca` where that is not set."""
    metrics_listen: str = ""
    lane_dscp: tuple[str, ...] = ()
    """`lane=DSCP`: how the packets of a lane are marked, with load-prefill, load-decode, save,
    background or all; 8 (CS1) where not given, 0 to leave them unmarked. Lanes with different marks
    get connections of their own."""
    tcp_congestion: str = "cubic"
    """Congestion control of data connections; the kernel's default where it lacks this one."""
    compute_transport: str = "tcp"
    """How bytes go between agents: `tcp`, or `rdma`, which all agents of a cluster need then."""
    rdma_device: str = ""
    """Name of the RDMA device, as ibv_devices lists it; not needed where there is one."""
    rdma_gid_index: int = -1
    """Row of the port's table of GIDs; -1: that of RoCE v2 with an IPv4 address."""
    rdma_service_level: int = 0
    """InfiniBand service level of our traffic, 0..15; RoCE goes by `lane_dscp`."""
    rdma_lane_service_level: tuple[str, ...] = ()
    """`lane=LEVEL`: the service level of a lane, with the lanes of `lane_dscp`, where it is another
    than `rdma_service_level`. Lanes that differ in it or in their DSCP have queue pairs of their
    own; all agents of a cluster need the same classes."""
    rdma_library: str = "auto"
    """How RDMA devices are called: `native`, `pyverbs`, or `auto`: native where that was built,
    else pyverbs."""
    stall_s: float = 1.0
    """A path with grants in flight and no arrival for this long gives its chunks back."""
    deadline_s_max: float = 600.0
    """Longest deadline of a load or a save."""
    lookup_timeout_s: float = 2.0
    """Longest wait for one control answer of a daemon; beyond it the answer is a miss."""
    lease_s: float = 30.0
    """Lease of a load; renewed at a third of it."""
    loads_max: int = 1024
    """Loads at once; more are refused (`overloaded`)."""
    reconnect_s_max: float = 2.0
    """Longest pause between two attempts to attach to a daemon or a relay."""

    def __post_init__(self) -> None:
        check_name(self.name)
        if len(self.daemons) > DAEMONS_MAX or len(set(self.daemons)) != len(self.daemons):
            raise InvalidRequest(f"at most {DAEMONS_MAX} different daemons, not {self.daemons}")
        self._check_addresses()
        if len(self.relays) > RELAYS_MAX:
            raise InvalidRequest(f"at most {RELAYS_MAX} relays, not {len(self.relays)}")
        if len(self.mount_paths) != len(self.mounts):
            raise InvalidRequest(f"a daemon has one mount at most: {self.mounts}")
        names = [relay.name for relay in self.relay_addresses]
        if len(set(names)) != len(names) or self.name in names:
            raise InvalidRequest(f"relays need different names, none {self.name!r}: {names}")
        if self.staging_bytes < STAGING_BYTES_MIN:
            raise InvalidRequest(
                f"staging_bytes must be at least {STAGING_BYTES_MIN}, not {self.staging_bytes}"
            )
        _ = (
            self.tls,
            self.server_files,
            self.data_tls_files,
            self.lane_marks,
        )  # raises what does not go together
        check_congestion(self.tcp_congestion)
        self._check_compute_transport()
        self._check_ranges()

    def _check_ranges(self) -> None:
        # Comparisons with a NaN are false: each of these is written so that it then refuses.
        for name in ("storage_limit_bytes_per_s", "compute_limit_bytes_per_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidRequest(
                    f"{name} must not be negative, 0 for no limit, not {getattr(self, name)}"
                )
        for name, most in DURATIONS_S_MAX.items():
            if not 0 < getattr(self, name) <= most:
                raise InvalidRequest(
                    f"{name} must be positive, and {most:g} s at most, not {getattr(self, name)}"
                )
        if self.loads_max < 1:
            raise InvalidRequest(f"loads_max must be positive, not {self.loads_max}")
        if self.hold_bytes < 0:
            raise InvalidRequest(
                f"hold_bytes must not be negative, 0 to hold nothing, not {self.hold_bytes}"
            )

    def _check_addresses(self) -> None:
        for address in self.daemons:
            check_address(address, unix=True)
        for address in (self.listen, self.data_listen, self.metrics_listen):
            if address:
                check_address(address)
        check_hosts(self.storage_addresses, "storage_addresses")
        if self.data_listen and is_wildcard(self.data_listen):
            raise InvalidRequest(
                f"data_listen {self.data_listen!r} is no address that peers can dial: give it the "
                "host of this node on the compute network"
            )

    def _check_compute_transport(self) -> None:
        if self.compute_transport not in COMPUTE_TRANSPORTS:
            raise InvalidRequest(
                f"compute_transport is one of {', '.join(COMPUTE_TRANSPORTS)}, not "
                f"{self.compute_transport!r}"
            )
        if not 0 <= self.rdma_service_level <= SERVICE_LEVEL_MAX:
            raise InvalidRequest(
                f"rdma_service_level is 0..{SERVICE_LEVEL_MAX}, not {self.rdma_service_level}"
            )
        if self.rdma_library not in LIBRARIES:
            raise InvalidRequest(
                f"rdma_library is one of {', '.join(LIBRARIES)}, not {self.rdma_library!r}"
            )
        _ = self.service_levels  # raises what is none
        if self.compute_transport != "tcp" and self.data_tls:
            raise InvalidRequest(
                "data_tls: RDMA goes in clear; set compute_transport = tcp, or data_tls = false "
                "on a network that only you use"
            )
        if self.compute_transport != "tcp" and self.compute_limit_bytes_per_s:
            raise InvalidRequest(
                "compute_limit_bytes_per_s paces tcp only; limit RDMA at the switch or the card"
            )

    @property
    def lane_marks(self) -> LaneMarks:
        """`lane_dscp`, parsed. Raises InvalidRequest."""
        return LaneMarks.parse(self.lane_dscp)

    @property
    def service_levels(self) -> tuple[int, ...]:
        """Those of the lanes, in their order. Raises InvalidRequest."""
        return lane_values(
            "rdma_lane_service_level",
            "LEVEL",
            self.rdma_lane_service_level,
            default=self.rdma_service_level,
            most=SERVICE_LEVEL_MAX,
        )

    @property
    def mount_paths(self) -> dict[str, str]:
        """`mounts`, path by daemon. Raises InvalidRequest."""
        return dict(_mount(text, self.daemons) for text in self.mounts)

    @property
    def relay_addresses(self) -> tuple[RelayAddress, ...]:
        """`relays`, parsed. Raises InvalidRequest."""
        return tuple(_relay_address(text) for text in self.relays)

    @property
    def tls(self) -> Tls:
        """How we dial."""
        if not self.tls_ca:
            return Tls(name=self.tls_name)  # raises InvalidRequest: a name without a ca
        return Tls(self.tls_ca, self.tls_cert, self.tls_key, self.tls_name)

    @property
    def server_files(self) -> ServerFiles | None:
        """With what we are dialled, None without TLS."""
        files = ServerFiles(self.tls_cert, self.tls_key, self.tls_client_ca)
        return files if files.cert else None

    @property
    def data_tls_files(self) -> TlsFiles | None:
        """Those of data connections, None where these go in clear. Raises InvalidRequest."""
        if not self.data_tls:
            return None
        if not self.tls_ca:
            raise InvalidRequest(
                "data_tls is set and tls_ca is not: give the PEM file of the authority that signed "
                "the certificates of daemons and peers"
            )
        client_ca = self.tls_client_ca or self.tls_ca
        return TlsFiles(self.tls_cert, self.tls_key, client_ca, self.tls_ca, self.tls_name)

    def check_trust(self) -> None:
        """Raise InvalidRequest if this would listen beyond loopback unguarded."""
        if self.tokens or self.tls_client_ca or self.insecure:
            return
        for address in (self.listen, self.data_listen):
            if address and not is_loopback(address):
                raise InvalidRequest(
                    f"refusing to listen on {address} without tokens: give tokens or "
                    "tls_client_ca, listen on 127.0.0.1, or say --insecure on a network that only "
                    "you use"
                )


def check_name(name: str) -> None:
    """An agent's name stands in paths, metrics and logs. Raises InvalidRequest."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"an agent's name has 1..{NAME_CHARS_MAX} characters of A-Z, a-z, 0-9, '.', '_' and "
            f"'-', not {name!r}; choose another name"
        )


def _relay_address(text: str) -> RelayAddress:
    name, separator, address = text.partition("=")
    if not separator or not name:
        raise InvalidRequest(f"a relay is written name=host:port, not {text!r}")
    check_name(name)
    check_address(address)
    return RelayAddress(name, address)


def _mount(text: str, daemons: tuple[str, ...]) -> tuple[str, str]:
    daemon, separator, path = text.partition("=")
    if not separator or not path.startswith("/"):
        raise InvalidRequest(f"a mount is written daemon=/absolute/path, not {text!r}")
    if daemon not in daemons:
        raise InvalidRequest(
            f"mount {text!r}: {daemon} is none of the agent's daemons ({', '.join(daemons)})"
        )
    return daemon, path


def check_address(address: str, *, unix: bool = False) -> None:
    """Raise InvalidRequest unless `address` is `host:port` (or `unix:/path` where allowed)."""
    if unix and address.startswith("unix:"):
        if address == "unix:":
            raise InvalidRequest("unix: needs a path, such as unix:/run/dualpath.sock")
        return
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65535:
        raise InvalidRequest(f"an address is written host:port, not {address!r}")


def is_loopback(address: str) -> bool:
    """Whether `host:port` or `unix:/path` can be reached from this machine only."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_wildcard(address: str) -> bool:
    """Whether `host:port` means every address of this machine."""
    try:
        return ipaddress.ip_address(address.rpartition(":")[0].strip("[]")).is_unspecified
    except ValueError:
        return False
