"""How the traffic of each lane is marked on an IP network.

Owns the map from lanes to DSCP and what follows from it: lanes with one DSCP share a stream, the
others get streams of their own, since a network that sorts by DSCP would put the segments of a
single stream out of order, and what is urgent would wait behind what is not for their sake. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.lane import Lane

DSCP_MAX = 63
PRIORITY_MAX = 6
"""Highest SO_PRIORITY that a process may set without privileges."""
DSCP_KV = 8
"""CS1, the class of bulk traffic (RFC 4594): the model's own traffic, unmarked, goes before it."""
ALL = "all"


def lane_name(lane: Lane) -> str:
    """`load-prefill` and so on: as settings name it."""
    return lane.name.lower().replace("_", "-")


@dataclass(frozen=True, slots=True)
class LaneMarks:
    """DSCP by lane, in the lanes' order; 0 leaves the lane's packets as they are."""

    dscps: tuple[int, ...] = (DSCP_KV,) * len(Lane)

    def __post_init__(self) -> None:
        if len(self.dscps) != len(Lane):
            raise InvalidRequest(f"a DSCP for each of {len(Lane)} lanes, not {self.dscps}")
        for dscp in self.dscps:
            if not 0 <= dscp <= DSCP_MAX:
                raise InvalidRequest(f"a DSCP is 0..{DSCP_MAX}, not {dscp}")

    @staticmethod
    def parse(entries: Sequence[str]) -> LaneMarks:
        """From `lane=DSCP` entries, later ones winning; lanes not named keep the default.

        Raises InvalidRequest naming the entry.
        """
        return LaneMarks(lane_values("lane_dscp", "DSCP", entries, default=DSCP_KV, most=DSCP_MAX))

    @property
    def classes(self) -> tuple[int, ...]:
        """The different DSCPs, that of the most urgent lane first: one stream for each."""
        return tuple(dict.fromkeys(self.dscps))

    def stream_of(self, lane: Lane) -> int:
        """The index in `classes` of the lane's stream."""
        return self.classes.index(self.dscps[list(Lane).index(lane)])

    def of_stream(self, stream: int) -> int:
        """The DSCP of a stream; those that only the peer asked for have that of the last."""
        return self.classes[min(stream, len(self.classes) - 1)]


def lane_values(
    setting: str, unit: str, entries: Sequence[str], *, default: int, most: int
) -> tuple[int, ...]:
    """A number of 0..`most` for each lane, in the lanes' order, from `lane=number` entries, later
    ones winning. Raises InvalidRequest naming the setting and the entry."""
    names = {lane_name(lane): lane for lane in Lane}
    values = dict.fromkeys(Lane, default)
    for entry in entries:
        name, _, text = (part.strip() for part in entry.partition("="))
        if name not in (ALL, *names) or not text.isascii() or not text.isdecimal():
            raise InvalidRequest(
                f"{setting} {entry!r} is not LANE={unit}, with a lane of {', '.join(names)} or "
                f"{ALL} and a {unit} of 0..{most}"
            )
        if int(text) > most:
            raise InvalidRequest(f"{setting} {entry!r}: a {unit} is 0..{most}")
        for lane in Lane if name == ALL else (names[name],):
            values[lane] = int(text)
    return tuple(values[lane] for lane in Lane)


def priority_of(dscp: int) -> int:
    """The SO_PRIORITY that goes with a DSCP: its class selector, as NICs and switches that trust
    DSCP map it by default."""
    return min(dscp >> 3, PRIORITY_MAX)
