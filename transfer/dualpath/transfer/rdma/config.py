"""Settings of the RDMA transport."""

from __future__ import annotations

from dataclasses import dataclass, field

from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.lane import Lane
from dualpath.transfer.rdma.meeting import SLOTS_MAX
from dualpath.transfer.tcp_transport import TcpConfig
from dualpath.transfer.transport import WRITE_BYTES_MAX

RETRIES_MAX = 6
"""7 means for ever, to the hardware."""
TIMEOUT_EXPONENT_MAX = 31
SERVICE_LEVEL_MAX = 15


@dataclass(frozen=True, slots=True)
class RdmaConfig:
    """Settings of one RdmaTransport, which stands for one port of a device.

    `device` is its name ("": the only one). `port` 0 is the first that is active, `gid_index` -1
    the RoCE v2 GID of an IPv4 address. `service_levels` (InfiniBand; 0-15) are those of the lanes,
    from the most urgent on; the traffic classes (RoCE) follow from the DSCPs in `set_up.marks`.
    Lanes that differ in either have queue pairs of their own, and both ends need as many.
    `slots` exchanges and `inflight_bytes_max` bytes are under way for one peer at most, in
    fragments of `fragment_bytes`; what is more urgent overtakes the rest. A request is retried
    `retries` times, each after about 4.096 us * 2 ** `timeout_exponent`. A fence waits
    `fence_wait_s` for the peer to end what it was granted and `withdraw_wait_s` for a memory
    window to be withdrawn, then it ends the connection; a write that has expired ends the
    connection if the device still reads its source `grace_s` later; a device that completes
    nothing of what was posted for `silent_s` ends it whatever its retries say. `memory_windows`
    False does without them, also where the device has some. `set_up` is for the socket
    over which both ends meet.
    """

    device: str = ""
    port: int = 0
    gid_index: int = -1
    service_levels: tuple[int, ...] = (0,) * len(Lane)
    slots: int = 32
    fragment_bytes: int = 1 << 20
    inflight_bytes_max: int = 8 << 20
    registrations_max: int = 512
    retries: int = 4
    timeout_exponent: int = 14
    fence_wait_s: float = 1.0
    withdraw_wait_s: float = 1.0
    grace_s: float = 1.0
    silent_s: float = 5.0
    memory_windows: bool = True
    set_up: TcpConfig = field(default_factory=TcpConfig)

    def __post_init__(self) -> None:
        levels = self.service_levels
        if len(levels) != len(Lane) or not all(0 <= each <= SERVICE_LEVEL_MAX for each in levels):
            raise InvalidRequest(
                f"service_levels has {len(Lane)} values from 0 to {SERVICE_LEVEL_MAX}, not "
                f"{list(levels)}"
            )
        if not 1 <= self.slots <= SLOTS_MAX:
            raise InvalidRequest(f"slots is 1 to {SLOTS_MAX}, not {self.slots}")
        if not 1 <= self.fragment_bytes <= min(WRITE_BYTES_MAX, self.inflight_bytes_max):
            raise InvalidRequest(
                f"fragment_bytes is 1 to {WRITE_BYTES_MAX} and at most inflight_bytes_max, not "
                f"{self.fragment_bytes}"
            )
        if not 0 <= self.retries <= RETRIES_MAX:
            raise InvalidRequest(
                f"retries is 0 to {RETRIES_MAX}, not {self.retries} (7 would be for ever)"
            )
        if not 1 <= self.timeout_exponent <= TIMEOUT_EXPONENT_MAX:
            raise InvalidRequest(
                f"timeout_exponent is 1 to {TIMEOUT_EXPONENT_MAX}, not {self.timeout_exponent}"
            )
        if min(self.fence_wait_s, self.withdraw_wait_s, self.grace_s, self.silent_s) <= 0:
            raise InvalidRequest("the waits of an RdmaConfig are positive")
        if self.registrations_max < 8:
            raise InvalidRequest(f"registrations_max is at least 8, not {self.registrations_max}")

    def classes(self) -> list[tuple[int, int]]:
        """(service level, traffic class) of each queue pair of a connection, the most urgent
        first."""
        return list(dict.fromkeys(map(self._class_of, Lane)))

    def index_of(self, lane: Lane) -> int:
        """Which of `classes` is the lane's."""
        return self.classes().index(self._class_of(lane))

    def _class_of(self, lane: Lane) -> tuple[int, int]:
        at = list(Lane).index(lane)
        return self.service_levels[at], self.set_up.marks.dscps[at] << 2
