"""What a daemon is told at its start, checked once.

Owns the defaults, the limits and the rule about addresses: loopback and Unix sockets are open to
their users, anything beyond needs tokens or an explicit `insecure`.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from dualpath.kvstore.eviction_choice import check_policy
from dualpath.kvstore.io_mode import IO_DEPTH, IoMode, check_io
from dualpath.kvstore.layout import CHUNK_BYTES_MAX
from dualpath.kvstore.s3_fifo import S3Fifo
from dualpath.kvstore.service.access_rules import Limits, check_tokens
from dualpath.kvstore.tenant_limits import TenantLimits, check_tenants
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.lane_marks import LaneMarks
from dualpath.transfer.tcp_transport import check_congestion
from dualpath.transfer.tls_files import TlsFiles
from dualpath.transfer.unix_path import UNIX_PATH_CHARS_MAX

READERS_MAX = 64
NAMESPACES_MAX = 1 << 20
RAILS_MAX = 16
"""Most links of one daemon."""


@dataclass(frozen=True, slots=True)
class ServerFiles:
    """Paths of PEM files: our certificate chain, its key, who signs clients ("": none asked)."""

    cert: str
    key: str
    client_ca: str = ""

    def __post_init__(self) -> None:
        if bool(self.cert) != bool(self.key):
            given, missing = ("tls_cert", "tls_key") if self.cert else ("tls_key", "tls_cert")
            raise InvalidRequest(f"{given} is set and {missing} is not: give both PEM files")
        if self.client_ca and not self.cert:
            raise InvalidRequest(
                "tls_client_ca is set and tls_cert is not: clients show certificates only to a "
                "server with one"
            )

    @property
    def paths(self) -> tuple[str, ...]:
        """Those that are given."""
        return tuple(filter(None, (self.cert, self.key, self.client_ca)))


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """Configuration of `run_daemon`.

    `data`: directory of the store, made if absent. `listen`: host:port of gRPC, port 0 for any.
    `unix`: path of a Unix socket for gRPC; its callers get their data over shared memory at
    `<unix>.data`, and engines of this machine look up and map blocks at `<unix>.local`.
    `data_listen`: host:port where receivers dial the data plane; by default the host of `listen`
    with any port. `data_rails`: further ones, on links of their own, over which receivers stripe.
    `advertise_host`: the host that callers are told to dial when
    `data_listen` is a wildcard. `tokens`: any of them opens the daemon; with tokens every TCP
    caller needs one, also on loopback. `insecure`: allow listening beyond loopback without.
    `metrics_listen`: host:port of the Prometheus endpoint, "" for none; it carries counters only
    and asks for no token.
    `disk_bytes`, `dram_bytes`: capacity of the SSD and the DRAM tier. `segment_bytes`: size of each
    preallocated file. `direct`: read and write them with O_DIRECT where the file system takes it.
    `io`: by what: auto (io_uring where it can be had), io_uring (or no start) or psync (threads).
    `io_depth`: transfers of one batch that are in flight on the SSD at once; reads of neighbours,
    up to 1 MiB together, count as one.
    `raw_device`: block device, or one large file, that holds the segments instead of files in the
    directory; it must be blank at first and is the store's from then on.
    `readers`: threads that read from the tiers for deliveries.
    `attachment_inflight_bytes`, `inflight_bytes`: chunks read and not yet acknowledged, for one
    attachment and for all. `send_limit_bytes_per_s`: paces what is sent over TCP, 0 for no limit.
    `lane_dscp`: how the packets of a lane are marked, as `lane=DSCP` with load-prefill,
    load-decode, save, background or all; 8 (CS1) where not given, 0 to leave them unmarked, and
    lanes with different marks get connections of their own. `tcp_congestion`: congestion control
    of data connections; the kernel's default where it lacks this one.
    `drain_s`: how long a stop waits for deliveries.
    `access_file`: TOML file of named tokens, rights and limits. `tls_cert`, `tls_key`: PEM files,
    with which TCP callers of gRPC must speak TLS. `tls_client_ca`: PEM file; every TCP caller must
    show a certificate signed by it. These four files are read again when they change, and on
    SIGHUP. `data_tls`: blocks go over TCP by TLS too, and both ends show certificates; needs these
    three files, and the same setting at the agents.
    `principal_calls_max`: outstanding calls of one principal. `principal_lookups_per_s`: its
    look-ups a second, 0 for no limit. `principal_leases_max`, `principal_reservations_max`: its
    live ones. `principal_reserved_bytes`: slots of its reservations, 0 for three quarters of
    `dram_bytes`. `principal_queue_bytes`: bytes granted to it and not landed, 0 for no limit.
    `principal_attachments_max`, `principal_streams_max`: its joined receivers, and its Read, Write
    and Events streams, 0 for as many as are left for all others. `principal_leased_bytes`: blocks
    that it keeps from eviction by leases, 0 for as much of the SSD tier as is left for all others
    (without tokens and client certificates: seven times that).
    The access file can set others for some.
    `events_max`: events of blocks that are remembered for readers of the event stream.
    `namespaces_max`: namespaces that are known at once; those that hold nothing are forgotten when
    they are too many.
    `numa_node`: node that the DRAM tier's memory comes from, -1 for that of the processors that
    the daemon may run on, if it is one. `mapped_client_bytes_max`: bytes of the DRAM tier that one
    client of the local socket may have mapped, 0 for half of `dram_bytes`. `mapped_bytes_max`: that
    all may, 0 for three quarters. `scrub_bytes_per_s`: how fast stored blocks are read again and
    verified in the background, when hardly anything else moves; 0 for not at all.
    `read_ahead_bytes`: how much of a leased prefix is brought from SSD to DRAM before it is asked
    for, while the SSD has nothing else to do; at most an eighth of `dram_bytes`, 0 for none.
    `eviction`: which blocks make way when a tier is full: s3-fifo or lru. `ttl_s`: blocks leave
    when nobody has used them for so long, 0 for never. `retain_bytes`: the most that clients may
    have retained, 0 for a quarter of `disk_bytes`. `tenants`: quotas and times to live of single
    tenants, each with the fields tenant, disk_bytes, dram_bytes, ttl_s.
    """

    data: str
    listen: str = "127.0.0.1:7070"
    unix: str = ""
    data_listen: str = ""
    data_rails: tuple[str, ...] = ()
    advertise_host: str = ""
    disk_bytes: int = 4 << 30
    dram_bytes: int = 256 << 20
    segment_bytes: int = 64 << 20
    direct: bool = True
    io: str = IoMode.AUTO.value
    io_depth: int = IO_DEPTH
    raw_device: str = ""
    tokens: tuple[str, ...] = field(default=(), repr=False)
    insecure: bool = False
    metrics_listen: str = ""
    readers: int = 4
    attachment_inflight_bytes: int = 64 << 20
    inflight_bytes: int = 128 << 20
    send_limit_bytes_per_s: float = 0
    lane_dscp: tuple[str, ...] = ()
    tcp_congestion: str = "cubic"
    drain_s: float = 5.0
    access_file: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    data_tls: bool = False
    principal_calls_max: int = 2048
    principal_lookups_per_s: int = 0
    principal_leases_max: int = 48 << 10
    principal_reservations_max: int = 48 << 10
    principal_reserved_bytes: int = 0
    principal_queue_bytes: int = 0
    principal_attachments_max: int = 0
    principal_streams_max: int = 0
    principal_leased_bytes: int = 0
    events_max: int = 1 << 16
    namespaces_max: int = 1 << 12
    numa_node: int = -1
    mapped_client_bytes_max: int = 0
    mapped_bytes_max: int = 0
    scrub_bytes_per_s: float = 8 << 20
    read_ahead_bytes: int = 32 << 20
    eviction: str = S3Fifo.name
    ttl_s: float = 0
    retain_bytes: int = 0
    tenants: tuple[TenantLimits, ...] = ()

    def __post_init__(self) -> None:
        if not self.data:
            raise InvalidRequest("data is empty: name the directory of the store")
        for name in ("listen", "data_listen", "metrics_listen"):
            if getattr(self, name):
                split_address(getattr(self, name), name)
        self._check_rails()
        if not self.listen and not self.unix:
            raise InvalidRequest("neither listen nor unix is set: nobody could reach the daemon")
        if len(self.unix) > UNIX_PATH_CHARS_MAX:
            raise InvalidRequest(
                f"unix: {self.unix!r} is longer than {UNIX_PATH_CHARS_MAX} chars; shorten it"
            )
        self._check_sizes()
        self._check_access()

    def _check_rails(self) -> None:
        if len(self.data_rails) >= RAILS_MAX:
            raise InvalidRequest(f"data_rails: at most {RAILS_MAX - 1}, not {len(self.data_rails)}")
        for address in self.data_rails:
            host, port = split_address(address, "data_rails")
            if is_wildcard(host) or (self.data_address == address and port):
                raise InvalidRequest(
                    f"data_rails: {address!r} is no address of a link of its own: give it the host "
                    "of this machine on that link"
                )

    def _check_sizes(self) -> None:
        for name, lowest in (
            ("disk_bytes", 1 << 20),
            ("dram_bytes", 1 << 20),
            ("segment_bytes", 1 << 20),
            ("attachment_inflight_bytes", CHUNK_BYTES_MAX),
            ("inflight_bytes", CHUNK_BYTES_MAX),
        ):
            if getattr(self, name) < lowest:
                raise InvalidRequest(f"{name} must be at least {lowest}, not {getattr(self, name)}")
        if not 1 <= self.namespaces_max <= NAMESPACES_MAX:
            raise InvalidRequest(
                f"namespaces_max must lie in 1..{NAMESPACES_MAX}, not {self.namespaces_max}"
            )
        check_io(self.io, self.io_depth)
        check_congestion(self.tcp_congestion)
        _ = self.lane_marks  # raises what is none
        check_policy(self.eviction)
        check_tenants(self.tenants)
        if not 0 <= self.retain_bytes <= self.disk_bytes:
            raise InvalidRequest(
                f"retain_bytes must lie in 0..{self.disk_bytes} (disk_bytes), not "
                f"{self.retain_bytes}"
            )
        if not 1 <= self.readers <= READERS_MAX:
            raise InvalidRequest(f"readers must lie in 1..{READERS_MAX}, not {self.readers}")
        for name in (
            "send_limit_bytes_per_s",
            "drain_s",
            "scrub_bytes_per_s",
            "ttl_s",
            "events_max",
            "mapped_client_bytes_max",
            "mapped_bytes_max",
            "read_ahead_bytes",
        ):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidRequest(f"{name} must not be negative, not {getattr(self, name)}")

    def _check_access(self) -> None:
        check_tokens(self.tokens)
        _ = self.server_files, self.data_tls_files  # raises what does not go together
        # What the access file holds is seen at the start; see `check_guarded`.
        self.check_guarded(tokens=bool(self.tokens or self.access_file))
        host, _ = split_address(self.data_address, "data_listen")
        if is_wildcard(host) and not self.advertise_host:
            raise InvalidRequest(
                f"data_listen {self.data_address!r} is no address that others can dial: give "
                "data_listen a host of this machine, or set advertise_host"
            )

    def check_guarded(self, *, tokens: bool) -> None:
        """Raises InvalidRequest if others could reach an address that nothing guards."""
        guarded = tokens or bool(self.tls_client_ca)
        for name in ("listen", "data_listen"):
            check_reach(name, getattr(self, name), guarded=guarded, insecure=self.insecure)
        for address in self.data_rails:
            check_reach("data_rails", address, guarded=guarded, insecure=self.insecure)

    @property
    def server_files(self) -> ServerFiles | None:
        """The files of TLS, None without."""
        files = ServerFiles(self.tls_cert, self.tls_key, self.tls_client_ca)
        return files if files.cert else None

    @property
    def data_tls_files(self) -> TlsFiles | None:
        """Those of data connections, None where these go in clear. Raises InvalidRequest."""
        if not self.data_tls:
            return None
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_client_ca)

    @property
    def limits(self) -> Limits:
        """What one principal may hold, unless the access file says otherwise."""
        return Limits(
            calls=self.principal_calls_max,
            lookups_per_s=self.principal_lookups_per_s,
            leases=self.principal_leases_max,
            reservations=self.principal_reservations_max,
            reserved_bytes=self.principal_reserved_bytes or self.dram_bytes * 3 // 4,
            queue_bytes=self.principal_queue_bytes,
            attachments=self.principal_attachments_max,
            streams=self.principal_streams_max,
            leased_bytes=self.principal_leased_bytes,
        )

    @property
    def lane_marks(self) -> LaneMarks:
        """`lane_dscp`, parsed. Raises InvalidRequest."""
        return LaneMarks.parse(self.lane_dscp)

    @property
    def data_address(self) -> str:
        """Where the TCP data plane listens."""
        if self.data_listen:
            return self.data_listen
        if not self.listen:
            return "127.0.0.1:0"
        return f"{_bracketed(split_address(self.listen, 'listen')[0])}:0"

    def dialled(self, bound: str) -> str:
        """The address that callers are told for the data plane bound at `bound`."""
        host, port = split_address(bound, "data_listen")
        return f"{_bracketed(self.advertise_host)}:{port}" if is_wildcard(host) else bound


def split_address(address: str, field: str) -> tuple[str, int]:
    """(host, port) of `host:port` or `[v6]:port`. Raises InvalidRequest naming `field`."""
    host, separator, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequest(f"{field}: {address!r} is not host:port with a port of 0..65535")
    return host, int(port)


def check_reach(field: str, address: str, *, guarded: bool, insecure: bool) -> None:
    """Refuse an address beyond loopback unless it is guarded or `insecure` was asked for."""
    if not address or guarded or insecure:
        return
    host, _ = split_address(address, field)
    if not is_loopback(host):
        raise InvalidRequest(
            f"{field}: {address!r} is reachable from other machines and neither tokens nor "
            "tls_client_ca are set: anybody could read and write blocks. Set one of them, listen "
            "on 127.0.0.1, or pass insecure",
            reason="insecure",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. Names other than localhost count as no."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_wildcard(host: str) -> bool:
    """Whether `host` means every address of this machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
