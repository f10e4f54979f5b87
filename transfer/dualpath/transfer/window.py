"""Windows: which writes of peers may land in this process's memory, and how they are fenced.

Owns the life of windows, armed tags and landings; every transport asks `WindowTable.begin`
before it touches a destination. Guarantees: a tag lands at most once; once `disarm` or `revoke`
has returned, nothing more is written under those tags, because bytes go into a region only
under the lock of their `Landing` and only while their part of it is open. Does not move bytes
itself. Tags that were armed together and come together are looked at together, the others one by
one, by the same rules.

Life of a tag: armed -> landing -> landed (forgotten; may be armed again) or spent (its
connection ended in the middle; no longer accepted, until it was disarmed and armed again).
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dualpath.transfer.errors import InvalidRequest, Overloaded
from dualpath.transfer.landing import FENCED, LANDED, OPEN, OVER, Landing, LandingLock
from dualpath.transfer.region import Region, RegionDescriptor, check_on_host
from dualpath.transfer.slice_copy import copy_slices
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import WRITE_BYTES_MAX, Arrival, OnArrival, OnHashed

WINDOWS_MAX = 1 << 16
ARMED_TAGS_MAX = 1 << 20
"""Most armed tags of one window."""
TAG_LIMIT = 1 << 64
LOCAL_PEER = "local"
"""Who writes, in the arrival of what was placed by this process."""

_log = logging.getLogger(__name__)


class Refused(Exception):
    """A write that may not land. `reason` goes back to the writer as the completion's detail."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Armed:
    """Writes that were armed together: part i of `table` under tag `first_tag` + i."""

    __slots__ = ("first_tag", "table")

    def __init__(self, first_tag: int, table: SliceTable) -> None:
        self.first_tag = first_tag
        self.table = table

    def allows(self, first_tag: int, targets: SliceTable) -> bool:
        """Whether the targets of these tags, all of which are in here, are the armed ones."""
        return self.table.has(first_tag - self.first_tag, targets)


@dataclass(slots=True)
class OpenWindow:
    """A window, and what is armed in it or on its way. Changed under the lock of its table."""

    descriptor: RegionDescriptor
    region: Region
    on_arrival: OnArrival
    on_hashed: OnHashed | None
    armed: dict[int, _Armed] = field(default_factory=dict)
    landings: dict[Landing, None] = field(default_factory=dict)
    spent: set[int] = field(default_factory=set)
    revoked: bool = False

    def revoke(self) -> list[Landing]:
        """Let no landing begin any more; return those that the caller has to close."""
        self.revoked = True
        self.armed.clear()
        return list(self.landings)

    def check_free(self, fresh: Mapping[int, object], first: int, last: int) -> None:
        """Raise InvalidRequest if one of the tags `fresh`, which lie in [first, last], is known."""
        for known in (self.armed.keys(), self.spent):
            # Of two sets the smaller is walked through: not all that is armed, each time.
            if known and not fresh.keys().isdisjoint(known):
                raise _known(min(fresh.keys() & known))
        for landing in self.landings:
            begin = landing.first_tag
            if begin <= last and first < begin + len(landing.states):
                parts = landing.under_way(fresh.keys())
                if parts:
                    raise _known(begin + parts[0])

    def leave(self, landing: Landing, parts: int) -> None:
        """So many parts of a landing are under way no longer."""
        landing.left -= parts
        if not landing.left:
            self.landings.pop(landing, None)

    def take_fenced(self, landing: Landing, parts: Iterable[int]) -> list[int]:
        """Those of the parts that are fenced leave the table; their tags."""
        states, taken = landing.states, []
        for part in parts:
            if states[part] == FENCED:
                states[part] = OVER
                taken.append(landing.first_tag + part)
        self.leave(landing, len(taken))
        return taken


class WindowTable:
    """All windows that one transport exposes. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._windows: dict[int, OpenWindow] = {}
        self._generation = 0
        self._closed = False
        self.device_memory = False
        """Whether regions that the processor does not reach are taken."""

    def expose(
        self,
        region: Region,
        offset: int,
        nbytes: int,
        on_arrival: OnArrival,
        *,
        on_hashed: OnHashed | None = None,
    ) -> RegionDescriptor:
        """Open a window on `nbytes` bytes of `region` from `offset`."""
        if region.read_only:
            raise InvalidRequest("a read-only region cannot be exposed to writes")
        if not self.device_memory or on_hashed is not None:
            check_on_host(region)
        if offset < 0 or nbytes <= 0 or offset + nbytes > region.nbytes:
            raise InvalidRequest(
                f"window [{offset}, {offset + nbytes}) is outside of a region of "
                f"{region.nbytes} bytes"
            )
        with self._lock:
            if self._closed:
                raise InvalidRequest("the transport is closed", reason="closed")
            if len(self._windows) >= WINDOWS_MAX:
                raise Overloaded(
                    f"{WINDOWS_MAX} windows are open; revoke those that ended", retry_after_s=1.0
                )
            self._generation = (self._generation + 1) & 0xFFFFFFFF
            key = secrets.randbits(64)
            while key in self._windows:
                key = secrets.randbits(64)
            descriptor = RegionDescriptor(key, self._generation, offset, nbytes)
            self._windows[key] = OpenWindow(descriptor, region, on_arrival, on_hashed)
            return descriptor

    def arm(self, window: RegionDescriptor, targets: Sequence[tuple[int, Slices]]) -> None:
        """Allow one write for each (tag, slices); all of them or, if it raises, none."""
        fresh: dict[int, _Armed] = {}
        for tag, slices in targets:
            if not 1 <= slices.nbytes <= WRITE_BYTES_MAX:
                raise _wrong_size(slices.nbytes)
            table = SliceTable.of(slices)
            _check_target(window, tag, tag, table.span())
            if tag in fresh:
                raise InvalidRequest(f"tag {tag} is given twice")
            fresh[tag] = _Armed(tag, table)
        if fresh:
            self._arm(window, fresh, min(fresh), max(fresh))

    def arm_table(self, window: RegionDescriptor, first_tag: int, targets: SliceTable) -> None:
        """As `arm`: part i of the table under tag `first_tag` + i."""
        if targets.size_min < 1 or targets.size_max > WRITE_BYTES_MAX:
            raise _wrong_size(targets.size_min or targets.size_max)
        last_tag = first_tag + len(targets) - 1
        _check_target(window, first_tag, last_tag, targets.span())
        fresh = dict.fromkeys(range(first_tag, last_tag + 1), _Armed(first_tag, targets))
        self._arm(window, fresh, first_tag, last_tag)

    def _arm(
        self, window: RegionDescriptor, fresh: Mapping[int, _Armed], first: int, last: int
    ) -> None:
        with self._lock:
            record = self._live(window)
            record.check_free(fresh, first, last)
            if len(record.armed) + len(fresh) > ARMED_TAGS_MAX:
                raise Overloaded(
                    f"more than {ARMED_TAGS_MAX} tags armed in one window", retry_after_s=1.0
                )
            record.armed.update(fresh)

    def disarm(self, window: RegionDescriptor, tags: Collection[int]) -> frozenset[int]:
        """Fence `tags`; return those that were armed and had not landed."""
        unlanded: set[int] = set()
        arriving: list[tuple[Landing, list[int]]] = []
        with self._lock:
            record = self._windows.get(window.key)
            if record is None or record.descriptor.generation != window.generation:
                return frozenset()
            others: set[int] = set()
            for tag in tags:
                if record.armed.pop(tag, None) is not None or tag in record.spent:
                    record.spent.discard(tag)
                    unlanded.add(tag)
                else:
                    others.add(tag)
            if others:
                for landing in record.landings:
                    if parts := landing.under_way(others):
                        arriving.append((landing, parts))
        for landing, parts in arriving:
            landing.lock.close(landing, parts)
            unlanded.update(
                landing.first_tag + part for part in parts if landing.states[part] != LANDED
            )
        if arriving:
            # Only now, so that whoever else fences meanwhile finds the landings and waits as well.
            with self._lock:
                for landing, parts in arriving:
                    record.take_fenced(landing, parts)
                    record.spent.difference_update(landing.first_tag + part for part in parts)
        return frozenset(unlanded)

    def revoke(self, window: RegionDescriptor) -> None:
        """Fence the whole window; nothing happens if it is not live."""
        with self._lock:
            record = self._windows.get(window.key)
            if record is None or record.descriptor.generation != window.generation:
                return
            landings = record.revoke()
        self._finish_revoking([record], landings)

    def close(self) -> None:
        """Fence all windows and open no further ones."""
        with self._lock:
            self._closed = True
            records = list(self._windows.values())
            landings = [landing for record in records for landing in record.revoke()]
        self._finish_revoking(records, landings)

    def _finish_revoking(self, records: list[OpenWindow], landings: list[Landing]) -> None:
        for landing in landings:
            landing.close()
        # Only now, so that whoever else fences meanwhile finds the landings and waits as well.
        with self._lock:
            for record in records:
                self._windows.pop(record.descriptor.key, None)

    def begin(self, peer: str, key: int, generation: int, tag: int, slices: Slices) -> Landing:
        """Accept a write of `peer`, or raise Refused. It ends by `land` or `abandon`."""
        landing = self.begin_table(peer, key, generation, tag, SliceTable.of(slices))
        if landing is None:
            raise Refused("no_window")
        if landing.refused:
            raise Refused(landing.refused[0])
        return landing

    def begin_table(
        self,
        peer: str,
        key: int,
        generation: int,
        first_tag: int,
        targets: SliceTable,
        lock: LandingLock | None = None,
    ) -> Landing | None:
        """Accept the writes of a batch, each for itself; None if there is no such window. Their
        lock is `lock`, a plain one by default. Each part ends by `land_parts` or `abandon`."""
        lock = lock or LandingLock()
        tags = range(first_tag, first_tag + len(targets))
        refused: dict[int, str] = {}
        with self._lock:
            record = self._record(key, generation)
            if record is None:
                return None
            armed = record.armed
            found = list(map(armed.get, tags))
            first = found[0]
            together = first is not None and found.count(first) == len(found)
            if not (first is not None and together and first.allows(first_tag, targets)):
                for part, (tag, each) in enumerate(zip(tags, found, strict=True)):
                    if each is None:
                        refused[part] = "not_armed"
                    elif each.table.fields_of(tag - each.first_tag) != targets.fields_of(part):
                        refused[part] = "other_slices"
            landing = Landing(record, peer, first_tag, targets, lock, refused)
            accepted = tags if not refused else [t for t in tags if t - first_tag not in refused]
            for tag in accepted:
                del armed[tag]
            if landing.left:
                record.landings[landing] = None
            return landing

    def _record(self, key: int, generation: int) -> OpenWindow | None:
        record = self._windows.get(key)
        if record is None or record.revoked or record.descriptor.generation != generation:
            return None
        return record

    def land(self, landing: Landing) -> None:
        """All bytes of a single write are in place: count its tag as landed and tell the window's
        owner. Raises Refused if it was fenced before, or if the owner rejects the bytes."""
        refused = self.land_parts(landing, 0, 1)
        if refused:
            raise Refused(refused[0])

    def land_parts(
        self, landing: Landing, first: int, last: int, digests: Sequence[int] = ()
    ) -> Mapping[int, str]:
        """As `land`, for parts [first, last): the reasons why of those that were accepted some are
        refused after all. `digests`: the xxh3-64 of each part, 0 if not known; or nothing."""
        states, count = landing.states, last - first
        refused: dict[int, str] = {}
        landed: Sequence[int] = range(first, last)
        with landing.lock:
            if states.count(OPEN, first, last) == count:
                states[first:last] = bytes((LANDED,)) * count
            else:
                landed = [part for part in landed if states[part] == OPEN]
                fenced = set(range(first, last)).difference(landed, landing.refused)
                refused = dict.fromkeys(sorted(fenced), "fenced")
                for part in landed:
                    states[part] = LANDED
        if landed:
            with self._lock:
                landing.window.leave(landing, len(landed))
            if digests and len(landed) < count:
                digests = [digests[part - first] for part in landed]
            taken = _told(landing, landed, digests)
            if not all(taken):
                for part, good in zip(landed, taken, strict=True):
                    if not good:
                        refused[part] = "rejected"
        return refused

    def place(self, window: RegionDescriptor, tag: int, slices: Slices, source: memoryview) -> str:
        """Land bytes of this process under a tag; "" once they are in, or why not."""
        try:
            landing = self.begin(LOCAL_PEER, window.key, window.generation, tag, slices)
            if not landing.window.region.on_host:
                self.abandon(landing)
                return "rejected"
            with landing.lock:
                if landing.open:
                    whole = Slices.contiguous(0, slices.nbytes)
                    copy_slices(landing.view, slices, source, whole)
            self.land(landing)
        except Refused as refusal:
            return refusal.reason
        return ""

    def abandon(self, landing: Landing, first: int = 0) -> None:
        """The rest of the bytes of the parts from `first` on will not come: their tags are spent
        until they are disarmed."""
        parts = range(first, len(landing.states))
        landing.lock.close(landing, parts)
        with self._lock:
            landing.window.spent.update(landing.window.take_fenced(landing, parts))

    def __repr__(self) -> str:
        with self._lock:
            armed = sum(len(record.armed) for record in self._windows.values())
            landing = sum(
                each.left for record in self._windows.values() for each in record.landings
            )
            return f"<WindowTable windows={len(self._windows)} armed={armed} landing={landing}>"

    def _live(self, window: RegionDescriptor) -> OpenWindow:
        record = self._windows.get(window.key)
        if record is None or record.revoked or record.descriptor != window:
            raise InvalidRequest(
                f"window of generation {window.generation} is not live: it was revoked or "
                "belongs to another transport"
            )
        return record


def _check_target(
    window: RegionDescriptor, first_tag: int, last_tag: int, span: tuple[int, int]
) -> None:
    if first_tag < 0 or last_tag >= TAG_LIMIT:
        raise InvalidRequest(f"tag {first_tag if first_tag < 0 else last_tag} is not of 64 bits")
    start, end = span
    if start < window.offset or end > window.offset + window.nbytes:
        raise InvalidRequest(
            f"slices [{start}, {end}) are outside of the window "
            f"[{window.offset}, {window.offset + window.nbytes})"
        )


def _wrong_size(nbytes: int) -> InvalidRequest:
    return InvalidRequest(f"a write has 1 to {WRITE_BYTES_MAX} bytes, not {nbytes}; split it")


def _known(tag: int) -> InvalidRequest:
    return InvalidRequest(f"tag {tag} is armed already; disarm it first")


def _told(landing: Landing, landed: Sequence[int], digests: Sequence[int]) -> Sequence[bool]:
    """Tell the owner of a window which parts have landed; whether it takes each."""
    window, first_tag = landing.window, landing.first_tag
    if window.on_hashed is not None and len(digests) == len(landed) and all(digests):
        first, last = first_tag + landed[0], first_tag + landed[-1] + 1
        tags: Sequence[int] = range(first, last)
        if len(tags) != len(landed):
            tags = [first_tag + part for part in landed]
        try:
            taken = window.on_hashed(tags, digests)
            assert len(taken) == len(landed), "an answer for each"
        except Exception:  # noqa: BLE001 - a callback of others
            _log.exception("on_hashed of tag %d and more raised; rejected", first)
            return [False] * len(landed)
        return taken
    key, table = window.descriptor.key, landing.table
    return [
        _tell(
            window.on_arrival,
            Arrival(landing.peer, key, first_tag + part, table.fields_of(part)),
        )
        for part in landed
    ]


def _tell(on_arrival: Callable[[Arrival], bool], arrival: Arrival) -> bool:
    try:
        return bool(on_arrival(arrival))
    except Exception:  # noqa: BLE001 - a callback of others
        _log.exception("on_arrival of tag %d raised; the write counts as rejected", arrival.tag)
        return False
