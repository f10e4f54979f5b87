"""Physical devices between storage and an engine's memory, and what their sharing allows.

Owns the graph: links (devices with a capacity) and paths (the links that a path crosses). Says
what binds a path, whether two paths meet at the device that binds them (then the second one
cannot help), and what rate a set of paths can be expected to reach together. Capacities are the
configured limits or, where given, measured rates. Pure values; it measures nothing itself.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dualpath.transfer.errors import InvalidRequest

HELPS_FROM = 1.02
"""A second path helps if it raises the expected rate by this factor."""


class LinkKind(enum.Enum):
    """What a link is; in and out of one NIC are two links, for they do not share capacity."""

    DAEMON_EGRESS = "daemon_egress"
    SNIC = "snic"
    CNIC_IN = "cnic_in"
    CNIC_OUT = "cnic_out"
    DRAM = "dram"


@dataclass(frozen=True, slots=True)
class Link:
    """A device; `limit_bytes_per_s` 0: no known limit."""

    name: str
    kind: LinkKind
    limit_bytes_per_s: float = 0

    def __post_init__(self) -> None:
        if not self.name:
            raise InvalidRequest("a link needs a name")
        if not 0 <= self.limit_bytes_per_s < math.inf:
            raise InvalidRequest(
                f"link {self.name!r} has a limit of {self.limit_bytes_per_s} bytes/s; "
                "use a positive number, or 0 for none"
            )


@dataclass(frozen=True, slots=True)
class Path:
    """A way of the bytes: the names of the links it crosses, in order, a link twice if it does."""

    name: str
    links: tuple[str, ...]


class LinkGraph:
    """The links of a cluster and the paths over them."""

    __slots__ = ("_links", "_measured", "_paths")

    def __init__(self, links: Iterable[Link] = (), paths: Iterable[Path] = ()) -> None:
        self._links: dict[str, Link] = {}
        self._paths: dict[str, Path] = {}
        self._measured: dict[str, float] = {}
        for link in links:
            self.add_link(link)
        for path in paths:
            self.add_path(path)

    @property
    def links(self) -> Sequence[Link]:
        """All links, in the order of adding."""
        return tuple(self._links.values())

    @property
    def paths(self) -> Sequence[Path]:
        """All paths, in the order of adding."""
        return tuple(self._paths.values())

    def add_link(self, link: Link) -> None:
        """Add a link. Raises InvalidRequest if the name is taken."""
        if link.name in self._links:
            raise InvalidRequest(f"link {link.name!r} is already in the graph")
        self._links[link.name] = link

    def add_path(self, path: Path) -> None:
        """Add a path. Raises InvalidRequest if known, empty, or over an unknown link."""
        if path.name in self._paths:
            raise InvalidRequest(f"path {path.name!r} is already in the graph")
        if not path.links:
            raise InvalidRequest(f"path {path.name!r} crosses no link")
        for name in path.links:
            if name not in self._links:
                raise InvalidRequest(
                    f"path {path.name!r} crosses unknown link {name!r}; add the link first"
                )
        self._paths[path.name] = path

    def measured(self, link: str, rate_bytes_per_s: float) -> None:
        """What the link was seen to carry when saturated; 0 forgets it."""
        if link not in self._links:
            raise InvalidRequest(f"unknown link {link!r}")
        self._measured[link] = max(0.0, rate_bytes_per_s)

    def capacity_bytes_per_s(self, link: str) -> float:
        """The measured rate, the limit if that is lower or nothing was measured; inf: neither."""
        if link not in self._links:
            raise InvalidRequest(f"unknown link {link!r}")
        known = (self._measured.get(link, 0.0), self._links[link].limit_bytes_per_s)
        return min((rate for rate in known if rate), default=math.inf)

    def binding_link(self, path: str) -> Link:
        """The link that limits the path when it is alone; the first of equals."""
        crossed = Counter(self._path(path).links)
        name = min(crossed, key=lambda link: self.capacity_bytes_per_s(link) / crossed[link])
        return self._links[name]

    def shares_binding_device(self, first: str, second: str) -> bool:
        """Whether the link that binds one of the two paths is also crossed by the other."""
        return (
            self.binding_link(first).name in self._path(second).links
            or self.binding_link(second).name in self._path(first).links
        )

    def relay_helps(self, direct: str, relay: str) -> bool:
        """Whether both paths together carry noticeably more than the direct one alone.

        False where they converge on the device that binds direct (one NIC a node): then a split
        only adds hops and the load should go direct.
        """
        alone = self.expected_bytes_per_s((direct,))
        if math.isinf(alone):
            return False
        return self.expected_bytes_per_s((direct, relay)) >= HELPS_FROM * alone

    def expected_bytes_per_s(self, paths: Iterable[str]) -> float:
        """Rate of one load split over these paths; inf if nothing limits it."""
        return sum(self.fair_bytes_per_s(paths).values())

    def fair_bytes_per_s(self, paths: Iterable[str]) -> Mapping[str, float]:
        """Rate of each path when all are used at once and share each link evenly (max-min).

        That is what chunk stealing over fair connections gives. It never exceeds the capacity of
        a link, and no path could have more without taking it from one that has no more.
        """
        growing = {name: Counter(self._path(name).links) for name in paths}
        left = {link: self.capacity_bytes_per_s(link) for path in growing.values() for link in path}
        rates = dict.fromkeys(growing, 0.0)
        while growing:
            crossings = sum(growing.values(), Counter[str]())
            step = min(left[link] / times for link, times in crossings.items())
            if math.isinf(step):
                return rates | dict.fromkeys(growing, math.inf)
            full = set()
            for link, times in crossings.items():
                if left[link] / times <= step * (1 + 1e-12):
                    full.add(link)
                left[link] = max(0.0, left[link] - step * times)
            for name in growing:
                rates[name] += step
            growing = {name: path for name, path in growing.items() if not full & path.keys()}
        return rates

    def _path(self, name: str) -> Path:
        path = self._paths.get(name)
        if path is None:
            raise InvalidRequest(f"unknown path {name!r}; known: {', '.join(self._paths)}")
        return path
