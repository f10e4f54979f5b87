"""All paths of an agent, what waits for each, and which of them would be through sooner.

Owns the paths' states by name and the count of bytes that wait for them; from both come the
views that placement policies see and the predictions that keep a slow path from holding up the
end of a load. Decides nothing about single loads: the dispatcher asks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

from dualpath.transfer.dispatch_config import DispatchConfig
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.path_state import PathCondition, PathState
from dualpath.transfer.placement import PathKind, PathView

PATHS_MAX = 64
TIE = 1 + 1e-9
"""Predicted ends this close are the same."""


class PathTable:
    """Paths in the order in which they were added."""

    __slots__ = ("_bound", "_config", "_paths")

    def __init__(self, config: DispatchConfig) -> None:
        self._config = config
        self._paths: dict[str, PathState] = {}
        # Waiting bytes by the set of paths that may take them.
        self._bound: Counter[tuple[str, ...]] = Counter()

    def __iter__(self) -> Iterator[PathState]:
        return iter(self._paths.values())

    def __getitem__(self, name: str) -> PathState:
        return self._paths[name]

    def get(self, name: str) -> PathState | None:
        """The path, if it is there."""
        return self._paths.get(name)

    def known(self, name: str) -> PathState:
        """The path. Raises InvalidRequest naming the known ones."""
        path = self._paths.get(name)
        if path is None:
            raise InvalidRequest(f"unknown path {name!r}; known: {', '.join(self._paths)}")
        return path

    def add(self, name: str, kind: PathKind, limit_bytes_per_s: float) -> None:
        """Add a path, up. Raises InvalidRequest."""
        if not name:
            raise InvalidRequest("a path needs a name")
        if name in self._paths:
            raise InvalidRequest(f"path {name!r} is already there")
        if len(self._paths) >= PATHS_MAX:
            raise InvalidRequest(f"path {name!r} would be one more than {PATHS_MAX}")
        if not 0 <= limit_bytes_per_s < math.inf:
            raise InvalidRequest(
                f"path {name!r} has a limit of {limit_bytes_per_s} bytes/s; 0 means none"
            )
        self._paths[name] = PathState(self._config, name, kind, limit_bytes_per_s)

    def look(self, now: float) -> None:
        """Fix rates and windows for the decisions of this moment."""
        proven = [path for path in self if path.condition is PathCondition.UP]
        alone = len(proven or [path for path in self if path.up]) == 1
        for path in self:
            path.look(now, alone=alone)

    def hinted(self, hint: frozenset[str]) -> Iterator[PathState]:
        """The paths that `hint` names; all if it is empty."""
        return (path for path in self if not hint or path.name in hint)

    def check_hint(self, hint: frozenset[str]) -> None:
        """Raise InvalidRequest if the hint names paths, but none that is known."""
        if hint and not hint & self._paths.keys():
            raise InvalidRequest(
                f"no path among {sorted(hint)} is known; known: {', '.join(self._paths)}"
            )

    def bind(self, names: tuple[str, ...], change_bytes: int) -> None:
        """So many more (or fewer) bytes wait for any of these paths."""
        if names and change_bytes:
            self._bound[names] += change_bytes
            if not self._bound[names]:
                del self._bound[names]

    def views(self, hint: frozenset[str], now: float) -> list[PathView]:
        """What policies see. Bytes that may go by several paths wait at each for its part."""
        rates = {path.name: path.rate_bytes_per_s(now) for path in self}
        bound = dict.fromkeys(rates, 0.0)
        for names, nbytes in self._bound.items():
            known = all(rates[name] for name in names)
            total = sum(rates[name] for name in names) if known else len(names)
            for name in names:
                bound[name] += nbytes * (rates[name] if known else 1) / total
        return [
            PathView(
                path.name,
                path.kind,
                self.serves(path, hint),
                path.inflight_bytes + round(bound[path.name]) + path.reported_bytes(now),
                path.inflight_bytes,
                rates[path.name],
                path.estimate.settled,
                path.spare,
            )
            for path in self.hinted(hint)
        ]

    def has_other_up(self, path: PathState, hint: frozenset[str]) -> bool:
        """Whether a path besides this one could take what has failed on it."""
        return any(
            other.condition is PathCondition.UP for other in self.hinted(hint) if other is not path
        )

    def serves(self, path: PathState, hint: frozenset[str]) -> bool:
        """Whether chunks of a load with this hint may go by the path; on trial only while no other
        path could take them."""
        return path.up and (path.condition is PathCondition.UP or not self.has_other_up(path, hint))

    def worth_taking(
        self, path: PathState, nbytes: int, names: Iterable[str], left_bytes: int, now: float
    ) -> bool:
        """Whether `path` should take a chunk, or leave it to the other paths among `names`.

        It should if it would land it before the others are through with all of `left_bytes`
        (the chunk included). The path that would land it first is always told to take it, so
        somebody does. Uses the rates of the last `look`.
        """
        if not path.rate:
            return True
        rate = 0.0
        soonest_s = math.inf
        for name in names:
            other = self._paths[name]
            if other is path or not other.rate or not other.dependable(now):
                continue
            left_bytes += other.inflight_bytes
            rate += other.rate
            soonest_s = min(soonest_s, (other.inflight_bytes + nbytes) / other.rate)
        if not rate:
            return True
        ends_in_s = (path.inflight_bytes + nbytes) / path.rate
        return ends_in_s <= max(soonest_s, left_bytes / rate) * TIE
