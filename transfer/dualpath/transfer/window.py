"""Windows: which writes of peers may land in this process's memory, and how they are fenced.

Owns the life of windows, armed tags and landings; every transport asks `WindowTable.begin`
before it touches a destination. Guarantees: a tag lands at most once; once `disarm` or `revoke`
has returned, nothing more is written under those tags, because bytes go into a region only
under the lock of their `Landing` and only while it is open. Does not move bytes itself.

Life of a tag: armed -> landing -> landed (forgotten; may be armed again) or spent (its
connection ended in the middle; no longer accepted, until it was disarmed and armed again).
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat

from dualpath.transfer.errors import InvalidRequest, Overloaded
from dualpath.transfer.region import Region, RegionDescriptor, check_on_host
from dualpath.transfer.slice_copy import copy_slices
from dualpath.transfer.slice_table import Fields, SliceTable
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


@dataclass(slots=True)
class _Window:
    descriptor: RegionDescriptor
    region: Region
    on_arrival: OnArrival
    on_hashed: OnHashed | None
    armed: dict[int, Fields] = field(default_factory=dict)
    landings: dict[int, Landing] = field(default_factory=dict)
    spent: set[int] = field(default_factory=set)
    revoked: bool = False

    def revoke(self) -> list[Landing]:
        """Let no landing begin any more; return those that the caller has to close."""
        self.revoked = True
        self.armed.clear()
        return list(self.landings.values())

    def remove(self, landing: Landing) -> bool:
        """Take out this landing, not a later one of the same tag; False if it is not in."""
        if self.landings.get(landing.tag) is not landing:
            return False
        del self.landings[landing.tag]
        return True


class LandingLock:
    """Held while bytes go in; `fencing` asks its holder to let go, and comes before a new one.

    The holder looks at `interrupt[0]` all the while, and never blocks for more than a moment.
    """

    __slots__ = ("_lock", "_turn", "interrupt")

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self.interrupt = bytearray(1)

    def __enter__(self) -> None:
        with self._turn:
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @contextmanager
    def fencing(self) -> Iterator[None]:
        """Hold it as soon as its holder has noticed."""
        with self._turn:
            self.interrupt[0] = 1
            with self._lock:
                self.interrupt[0] = 0
                yield

    def close(self, landing: Landing) -> bool:
        """Let nothing more into `landing`; say whether it was open. A transport whose bytes go in
        without this lock (by a network card) overrides it, to wait for them as well."""
        with self.fencing():
            was_open, landing.open = landing.open, False
            return was_open


class Landing:
    """One accepted write on its way into a region.

    The transport writes only while it holds `lock` and `open` is true, in steps that block for
    a moment at most; so whoever takes the lock and closes the landing knows that no byte follows.
    The landings of one batch share their lock. `landed` says that all bytes came before that. A
    landing stays in its window's table until it was closed, so that everybody who fences the tag
    waits for that lock.
    """

    __slots__ = ("_window", "fields", "landed", "lock", "open", "peer", "region", "tag")

    def __init__(
        self, window: _Window, peer: str, tag: int, fields: Fields, lock: LandingLock
    ) -> None:
        self._window = window
        self.lock = lock
        self.open = True
        self.landed = False
        self.peer = peer
        self.region = window.region
        self.tag = tag
        self.fields = fields

    @property
    def slices(self) -> Slices:
        """Where the bytes go."""
        return Slices(*self.fields)

    def close(self) -> bool:
        """Let nothing more in; say whether it was still open."""
        return self.lock.close(self)

    @property
    def hashed(self) -> bool:
        """Whether the window's owner wants digests."""
        return self._window.on_hashed is not None


class WindowTable:
    """All windows that one transport exposes. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._windows: dict[int, _Window] = {}
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
            self._windows[key] = _Window(descriptor, region, on_arrival, on_hashed)
            return descriptor

    def arm(self, window: RegionDescriptor, targets: Sequence[tuple[int, Slices]]) -> None:
        """Allow one write for each (tag, slices); all of them or, if it raises, none."""
        fresh: dict[int, Fields] = {}
        for tag, slices in targets:
            if not 1 <= slices.nbytes <= WRITE_BYTES_MAX:
                raise _wrong_size(slices.nbytes)
            _check_target(window, tag, tag, (slices.start, slices.end))
            if tag in fresh:
                raise InvalidRequest(f"tag {tag} is given twice")
            fresh[tag] = next(SliceTable.of(slices).fields())
        self._arm(window, fresh)

    def arm_table(self, window: RegionDescriptor, first_tag: int, targets: SliceTable) -> None:
        """As `arm`: part i of the table under tag `first_tag` + i."""
        if min(targets.sizes) < 1 or max(targets.sizes) > WRITE_BYTES_MAX:
            raise _wrong_size(min(targets.sizes) or max(targets.sizes))
        last_tag = first_tag + len(targets) - 1
        _check_target(window, first_tag, last_tag, targets.span())
        tags = range(first_tag, last_tag + 1)
        self._arm(window, dict(zip(tags, targets.fields(), strict=True)))

    def _arm(self, window: RegionDescriptor, fresh: dict[int, Fields]) -> None:
        with self._lock:
            record = self._live(window)
            # Of two views the smaller is walked through: not all that is armed, each time.
            for known in (record.armed.keys(), record.landings.keys(), record.spent):
                if known and not fresh.keys().isdisjoint(known):
                    tag = min(fresh.keys() & known)
                    raise InvalidRequest(f"tag {tag} is armed already; disarm it first")
            if len(record.armed) + len(fresh) > ARMED_TAGS_MAX:
                raise Overloaded(
                    f"more than {ARMED_TAGS_MAX} tags armed in one window", retry_after_s=1.0
                )
            record.armed.update(fresh)

    def disarm(self, window: RegionDescriptor, tags: Collection[int]) -> frozenset[int]:
        """Fence `tags`; return those that were armed and had not landed."""
        unlanded: set[int] = set()
        landings: list[Landing] = []
        with self._lock:
            record = self._windows.get(window.key)
            if record is None or record.descriptor.generation != window.generation:
                return frozenset()
            for tag in tags:
                if record.armed.pop(tag, None) is not None or tag in record.spent:
                    record.spent.discard(tag)
                    unlanded.add(tag)
                elif (landing := record.landings.get(tag)) is not None:
                    landings.append(landing)
        for landing in landings:
            landing.close()
            if not landing.landed:
                unlanded.add(landing.tag)
        if landings:
            with self._lock:
                for landing in landings:
                    record.remove(landing)
                    record.spent.discard(landing.tag)
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

    def _finish_revoking(self, records: list[_Window], landings: list[Landing]) -> None:
        for landing in landings:
            landing.close()
        # Only now, so that whoever else fences meanwhile finds the landings and waits as well.
        with self._lock:
            for record in records:
                self._windows.pop(record.descriptor.key, None)

    def begin(self, peer: str, key: int, generation: int, tag: int, slices: Slices) -> Landing:
        """Accept a write of `peer`, or raise Refused. It ends by `land` or `abandon`."""
        landing = self.begin_table(peer, key, generation, tag, SliceTable.of(slices))[0]
        if isinstance(landing, str):
            raise Refused(landing)
        return landing

    def begin_table(
        self,
        peer: str,
        key: int,
        generation: int,
        first_tag: int,
        targets: SliceTable,
        lock: LandingLock | None = None,
    ) -> list[Landing | str]:
        """Accept the writes of a batch: a landing each, or the reason of its refusal. They share
        `lock`, a plain one by default."""
        lock = lock or LandingLock()
        with self._lock:
            record = self._record(key, generation)
            if record is None:
                return ["no_window"] * len(targets)
            armed, landings = record.armed, record.landings
            begun: list[Landing | str] = []
            tags, fields_of = range(first_tag, first_tag + len(targets)), list(targets.fields())
            if list(map(armed.get, tags)) == fields_of:  # the usual case: all as armed
                for tag in tags:
                    del armed[tag]
                opened = map(Landing, repeat(record), repeat(peer), tags, fields_of, repeat(lock))
                fresh = dict(zip(tags, opened, strict=False))
                landings.update(fresh)
                return list(fresh.values())
            for tag, fields in zip(tags, fields_of, strict=True):
                if armed.get(tag) == fields:
                    del armed[tag]
                    landing = landings[tag] = Landing(record, peer, tag, fields, lock)
                    begun.append(landing)
                else:
                    begun.append("other_slices" if tag in armed else "not_armed")
            return begun

    def _record(self, key: int, generation: int) -> _Window | None:
        record = self._windows.get(key)
        if record is None or record.revoked or record.descriptor.generation != generation:
            return None
        return record

    def land(self, landing: Landing) -> None:
        """All bytes are in place: count the tag as landed and tell the window's owner.

        Raises Refused if it was fenced before, or if the owner rejects the bytes.
        """
        reason = self.land_all([landing])[0]
        if reason:
            raise Refused(reason)

    def land_all(self, landings: Sequence[Landing], digests: Sequence[int] = ()) -> list[str]:
        """As `land`, for landings of one batch, at least one: the reason of each refusal, or "".
        `digests`: of each its bytes' xxh3-64, 0 if it is not known; or nothing."""
        fenced = False
        with landings[0].lock:
            for each in landings:
                if each.open:
                    each.open, each.landed = False, True
                else:
                    fenced = True
        reasons = [""] * len(landings)
        landed: Sequence[Landing] = landings
        if fenced:
            reasons = ["" if each.landed else "fenced" for each in landings]
            landed = [each for each in landings if each.landed]
            digests = [
                digest for each, digest in zip(landings, digests, strict=False) if each.landed
            ]
        if landed:
            record = landings[0]._window
            with self._lock:
                known = record.landings
                for each in landed:
                    if known.get(each.tag) is each:
                        del known[each.tag]
            verdicts = _told(record, landed, digests)
            if not all(verdicts):
                taken = iter(verdicts)
                for index, reason in enumerate(reasons):
                    if not reason and not next(taken):
                        reasons[index] = "rejected"
        return reasons

    def place(self, window: RegionDescriptor, tag: int, slices: Slices, source: memoryview) -> str:
        """Land bytes of this process under a tag; "" once they are in, or why not."""
        try:
            landing = self.begin(LOCAL_PEER, window.key, window.generation, tag, slices)
            if not landing.region.on_host:
                self.abandon(landing)
                return "rejected"
            with landing.lock:
                if landing.open:
                    whole = Slices.contiguous(0, slices.nbytes)
                    copy_slices(landing.region.view, slices, source, whole)
            self.land(landing)
        except Refused as refusal:
            return refusal.reason
        return ""

    def abandon(self, landing: Landing) -> None:
        """The rest of the bytes will not come: the tag is spent until it is disarmed."""
        landing.close()
        with self._lock:
            if landing._window.remove(landing):
                landing._window.spent.add(landing.tag)

    def __repr__(self) -> str:
        with self._lock:
            armed = sum(len(record.armed) for record in self._windows.values())
            landing = sum(len(record.landings) for record in self._windows.values())
            return f"<WindowTable windows={len(self._windows)} armed={armed} landing={landing}>"

    def _live(self, window: RegionDescriptor) -> _Window:
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


def _told(record: _Window, landed: Sequence[Landing], digests: Sequence[int]) -> Sequence[bool]:
    """Tell the owner of a window what has landed; whether it takes each."""
    if record.on_hashed is not None and len(digests) == len(landed) and all(digests):
        try:
            taken = record.on_hashed([each.tag for each in landed], digests)
            assert len(taken) == len(landed), "an answer for each"
        except Exception:  # noqa: BLE001 - a callback of others
            _log.exception("on_hashed of tag %d and more raised; rejected", landed[0].tag)
            return [False] * len(landed)
        return taken
    key = record.descriptor.key
    return [
        _tell(record.on_arrival, Arrival(each.peer, key, each.tag, each.fields)) for each in landed
    ]


def _tell(on_arrival: Callable[[Arrival], bool], arrival: Arrival) -> bool:
    try:
        return bool(on_arrival(arrival))
    except Exception:  # noqa: BLE001 - a callback of others
        _log.exception("on_arrival of tag %d raised; the write counts as rejected", arrival.tag)
        return False
