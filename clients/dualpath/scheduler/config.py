"""Configuration of the scheduler's service, read once at the entry point and frozen."""

from __future__ import annotations

from dataclasses import dataclass, field

from dualpath.kvstore.service.config import ServerFiles, check_reach, split_address
from dualpath.scheduler.checks import check_positive
from dualpath.scheduler.policies import POLICIES
from dualpath.scheduler.settings import PolicySettings, SchedulerLimits
from dualpath.transfer.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Everything the service needs to know. Addresses are `host:port`; port 0 takes any."""

    listen: str = "127.0.0.1:7090"
    """Where leaders and front ends dial."""
    metrics_listen: str = ""
    """Prometheus endpoint and probes; empty for none."""
    policy: str = "aware"
    """paper, direct, round-robin, split or aware."""
    alpha_tokens: float = 3_750_000
    """Prefill nodes with more tokens waiting to be read are passed over while others are not: what
    a node's storage links read in 3 s. The default: 400 Gb/s, 40 KB a token."""
    beta_tokens: float = 0
    """Prefill engines with more unfinished tokens get no more: what one GPU computes in 5 s, hits
    included. 0: 5 s of what leaders say (`compute_tokens_per_s`); without it they are refused."""
    decode_headroom: float = 1.05
    """How far above the mean a decode engine is filled before the others."""
    requests_max: int = 1_000_000
    """Requests, queued and assigned; more are refused (`overloaded`)."""
    front_end_requests_max: int = 250_000
    """Those of one front end."""
    engines_max: int = 32_768
    """Engines registered at once."""
    groups_max: int = 8_192
    """Groups registered at once."""
    nodes_max: int = 8_192
    """Nodes registered at once."""
    front_ends_max: int = 1_024
    """Streams of front ends at once."""
    queue_s: float = 300.0
    """A request without engines for so long fails with `queue_timeout`; 0: never."""
    attempts_max: int = 3
    """How often a request is assigned before the loss of its engines fails it."""
    report_timeout_s: float = 5.0
    """A leader that says nothing for so long has lost its engines."""
    rejoin_s: float = 2.0
    """How long a leader whose stream has ended may come back before its engines are lost."""
    tokens: tuple[str, ...] = field(default=(), repr=False)
    """Those that are accepted; with any, every caller needs one."""
    insecure: bool = False
    """Listen beyond loopback without tokens and certificates."""
    tls_cert: str = ""
    """PEM file of our certificate; with it callers must speak TLS. Read again when it changes."""
    tls_key: str = ""
    """PEM file of its key."""
    tls_client_ca: str = ""
    """PEM file: whoever dials us must show a certificate signed by it."""

    def __post_init__(self) -> None:
        split_address(self.listen, "listen")
        if self.metrics_listen:
            split_address(self.metrics_listen, "metrics_listen")
        if self.policy not in POLICIES:
            raise InvalidRequest(f"policy is one of {', '.join(POLICIES)}, not '{self.policy}'")
        _ = (self.policy_settings, self.limits, self.server_files)  # raises what is wrong
        for name in (
            "front_end_requests_max",
            "front_ends_max",
            "report_timeout_s",
            "rejoin_s",
        ):
            check_positive(name, getattr(self, name))

    @property
    def policy_settings(self) -> PolicySettings:
        """Of the policies. Raises InvalidRequest."""
        return PolicySettings(
            alpha_tokens=self.alpha_tokens,
            beta_tokens=self.beta_tokens,
            decode_headroom=self.decode_headroom,
        )

    @property
    def limits(self) -> SchedulerLimits:
        """Of the scheduler. Raises InvalidRequest."""
        return SchedulerLimits(
            requests_max=self.requests_max,
            engines_max=self.engines_max,
            groups_max=self.groups_max,
            nodes_max=self.nodes_max,
            queue_s=self.queue_s,
            attempts_max=self.attempts_max,
        )

    @property
    def server_files(self) -> ServerFiles | None:
        """With what we are dialled, None without TLS. Raises InvalidRequest."""
        files = ServerFiles(self.tls_cert, self.tls_key, self.tls_client_ca)
        return files if files.cert else None

    def check_trust(self) -> None:
        """Raise InvalidRequest if this would listen beyond loopback unguarded."""
        guarded = bool(self.tokens or self.tls_client_ca)
        check_reach("listen", self.listen, guarded=guarded, insecure=self.insecure)
