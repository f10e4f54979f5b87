"""A tag lands at most once, and a fence lets nothing through: as a state machine."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

import hypothesis.strategies as st
import pytest
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.landing import Landing
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import Arrival
from dualpath.transfer.window import Refused, WindowTable
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

TAGS = st.integers(0, 5)
NBYTES = 4096


class Windows(RuleBasedStateMachine):
    """Against a model that knows which (window, tag) is armed, landing or spent."""

    landings = Bundle("landings")

    @initialize()
    def start(self) -> None:
        self.table = WindowTable()
        self.region = Region.anonymous(NBYTES)
        self.arrived: list[tuple[int, int]] = []
        self.state: dict[tuple[int, int], str] = {}
        self.live: dict[int, RegionDescriptor] = {}
        self.dead: list[RegionDescriptor] = []
        self.accept = True

    def _on_arrival(self, arrival: Arrival) -> bool:
        self.arrived.append((arrival.key, arrival.tag))
        return self.accept

    @rule()
    def expose(self) -> None:
        if len(self.live) < 3:
            window = self.table.expose(self.region, 0, NBYTES, self._on_arrival)
            generations = [each.generation for each in (*self.live.values(), *self.dead)]
            assert window.generation > max(generations, default=0)
            self.live[window.key] = window

    @rule(data=st.data(), tag=TAGS)
    def arm(self, data: st.DataObject, tag: int) -> None:
        window = self._any(data)
        if window is None:
            return
        key = (window.key, tag)
        if window.key not in self.live or key in self.state:
            with pytest.raises(InvalidRequest):
                self.table.arm(window, [(tag, _slices(tag))])
        else:
            self.table.arm(window, [(tag, _slices(tag))])
            self.state[key] = "armed"

    @rule(target=landings, data=st.data(), tag=TAGS)
    def begin(self, data: st.DataObject, tag: int):  # type: ignore[no-untyped-def]
        window = self._any(data)
        if window is None:
            return multiple()
        key = (window.key, tag)
        args = ("peer", window.key, window.generation, tag)
        if self.state.get(key) != "armed":
            with pytest.raises(Refused):
                self.table.begin(*args, _slices(tag))
            return multiple()
        with pytest.raises(Refused, match="other_slices"):
            self.table.begin(*args, Slices.contiguous(1, 1))
        with pytest.raises(Refused, match="no_window"):
            self.table.begin("peer", window.key, window.generation + 1, tag, _slices(tag))
        landing = self.table.begin(*args, _slices(tag))
        self.state[key] = "landing"
        return key, landing

    @rule(pair=consumes(landings), accept=st.booleans())
    def land(self, pair: tuple[tuple[int, int], Landing], accept: bool) -> None:
        key, landing = pair
        self.accept = accept
        before = len(self.arrived)
        if not landing.open:
            with pytest.raises(Refused, match="fenced"):
                self.table.land(landing)
            assert len(self.arrived) == before
            return
        if accept:
            self.table.land(landing)
        else:
            with pytest.raises(Refused, match="rejected"):
                self.table.land(landing)
        assert self.arrived[before:] == [key]
        del self.state[key]

    @rule(pair=consumes(landings))
    def abandon(self, pair: tuple[tuple[int, int], Landing]) -> None:
        key, landing = pair
        was_open = landing.open
        self.table.abandon(landing)
        assert not landing.open
        if was_open:
            self.state[key] = "spent"

    @rule(data=st.data(), tags=st.sets(TAGS))
    def disarm(self, data: st.DataObject, tags: set[int]) -> None:
        window = self._any(data)
        if window is None:
            return
        known = {tag for tag in tags if (window.key, tag) in self.state}
        assert self.table.disarm(window, tags) == known
        for tag in known:
            del self.state[window.key, tag]

    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        window = self._any(data)
        if window is None:
            return
        self.table.revoke(window)
        if self.live.pop(window.key, None) is not None:
            self.dead.append(window)
        self.state = {key: each for key, each in self.state.items() if key[0] != window.key}

    def _any(self, data: st.DataObject) -> RegionDescriptor | None:
        windows = [*self.live.values(), *self.dead[-2:]]
        return data.draw(st.sampled_from(windows)) if windows else None

    @invariant()
    def the_repr_tells_the_state(self) -> None:
        if not hasattr(self, "table"):
            return
        states = list(self.state.values())
        assert repr(self.table) == (
            f"<WindowTable windows={len(self.live)} armed={states.count('armed')} "
            f"landing={states.count('landing')}>"
        )


def _slices(tag: int) -> Slices:
    return Slices.contiguous(tag * 100, 100)


TestWindows = Windows.TestCase
TestWindows.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_closed_table_opens_no_window_and_has_fenced_all() -> None:
    table, region = WindowTable(), Region.anonymous(NBYTES)
    window = table.expose(region, 0, NBYTES, lambda arrival: True)
    table.arm(window, [(1, _slices(1))])
    landing = table.begin("peer", window.key, window.generation, 1, _slices(1))
    table.close()
    assert not landing.open
    with pytest.raises(InvalidRequest):
        table.expose(region, 0, NBYTES, lambda arrival: True)


def _armed(table: WindowTable, tag: int = 7) -> tuple[RegionDescriptor, Slices]:
    window = table.expose(Region.anonymous(NBYTES), 0, NBYTES, lambda _: True)
    slices = Slices.contiguous(0, NBYTES)
    table.arm(window, [(tag, slices)])
    return window, slices


def _begin(table: WindowTable, window: RegionDescriptor, slices: Slices, tag: int = 7) -> Landing:
    return table.begin("p", window.key, window.generation, tag, slices)


def test_every_fence_of_a_tag_waits_for_the_bytes_that_are_arriving() -> None:
    table = WindowTable()
    window, slices = _armed(table)
    landing = _begin(table, window, slices)
    fences = (
        lambda: table.disarm(window, [7]),
        lambda: table.disarm(window, [7]),
        lambda: table.revoke(window),
        lambda: table.revoke(window),
        lambda: table.disarm(window, [7]),
        table.close,
    )
    threads = [threading.Thread(target=fence, daemon=True) for fence in fences]
    with landing.lock:  # as while bytes are received
        for thread in threads:
            thread.start()
            thread.join(0.1)
            assert thread.is_alive(), "a fence returned while bytes could still land"
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert not landing.open


def test_a_tag_whose_connection_is_just_ending_counts_as_not_landed() -> None:
    table = WindowTable()
    window, slices = _armed(table)
    landing = _begin(table, window, slices)
    landing.close()  # the first half of `abandon`
    assert table.disarm(window, [7]) == {7}
    table.abandon(landing)
    table.arm(window, [(7, slices)])


def test_an_old_landing_that_is_given_up_late_does_not_unfence_its_successor() -> None:
    table = WindowTable()
    window, slices = _armed(table)
    old = _begin(table, window, slices)
    assert table.disarm(window, [7]) == {7}
    table.arm(window, [(7, slices)])
    new = _begin(table, window, slices)
    table.abandon(old)
    assert new.open
    table.revoke(window)
    assert not new.open


class Batches(RuleBasedStateMachine):
    """Batches of tags that were armed in other groups than they come in, some at wrong places or
    for a second time: each part is accepted, refused, fenced and told for itself."""

    landings = Bundle("landings")

    @initialize()
    def start(self) -> None:
        self.table = WindowTable()
        self.region = Region.anonymous(NBYTES)
        self.told: list[int] = []
        self.window = self.table.expose(
            self.region, 0, NBYTES, lambda arrival: self._take([arrival.tag])[0]
        )
        self.hashing = self.table.expose(
            self.region, 0, NBYTES, lambda _: False, on_hashed=lambda tags, _: self._take(tags)
        )
        self.state: dict[tuple[int, int], str] = {}

    def _take(self, tags: Sequence[int]) -> list[bool]:
        self.told += tags
        return [tag % 5 != 3 for tag in tags]

    def _window(self, hashed: bool) -> RegionDescriptor:
        return self.hashing if hashed else self.window

    @rule(hashed=st.booleans(), first=st.integers(0, 12), count=st.integers(1, 8))
    def arm(self, hashed: bool, first: int, count: int) -> None:
        window, tags = self._window(hashed), range(first, first + count)
        if any((hashed, tag) in self.state for tag in tags):
            with pytest.raises(InvalidRequest, match="armed already"):
                self.table.arm_table(window, first, _table(tags))
        else:
            self.table.arm_table(window, first, _table(tags))
            self.state |= {(hashed, tag): "armed" for tag in tags}

    @rule(
        target=landings,
        hashed=st.booleans(),
        first=st.integers(0, 12),
        count=st.integers(1, 8),
        wrong=st.sets(st.integers(0, 19), max_size=1),
    )
    def begin(self, hashed: bool, first: int, count: int, wrong: set[int]):  # type: ignore[no-untyped-def]
        window, tags = self._window(hashed), range(first, first + count)
        landing = self.table.begin_table(
            "peer", window.key, window.generation, first, _table(tags, wrong)
        )
        assert landing is not None
        expected = {}
        for part, tag in enumerate(tags):
            if self.state.get((hashed, tag)) != "armed":
                expected[part] = "not_armed"
            elif tag in wrong:
                expected[part] = "other_slices"
            else:
                self.state[hashed, tag] = "landing"
        assert landing.refused == expected
        assert [landing.is_open(part) for part in range(count)] == [
            part not in expected for part in range(count)
        ]
        return hashed, landing, 0

    @rule(target=landings, one=consumes(landings), count=st.integers(1, 8), digest=st.booleans())
    def land(self, one: tuple[bool, Landing, int], count: int, digest: bool):  # type: ignore[no-untyped-def]
        hashed, landing, first = one
        last = min(first + count, len(landing.table))
        expected, tags = {}, []
        for part in range(first, last):
            tag = landing.first_tag + part
            if part in landing.refused:
                continue
            if not landing.is_open(part):
                expected[part] = "fenced"
                continue
            del self.state[hashed, tag]
            if digest or not hashed:
                tags.append(tag)
            if tag % 5 == 3 or (hashed and not digest):
                expected[part] = "rejected"
        before = len(self.told)
        digests = [7] * (last - first) if digest else ()
        assert self.table.land_parts(landing, first, last, digests) == expected
        assert self.told[before:] == tags
        return multiple((hashed, landing, last)) if last < len(landing.table) else multiple()

    @rule(one=consumes(landings))
    def abandon(self, one: tuple[bool, Landing, int]) -> None:
        hashed, landing, first = one
        for part in range(first, len(landing.table)):
            if landing.is_open(part):
                self.state[hashed, landing.first_tag + part] = "spent"
        self.table.abandon(landing, first)
        assert not landing.open

    @rule(hashed=st.booleans(), tags=st.sets(st.integers(0, 19)))
    def disarm(self, hashed: bool, tags: set[int]) -> None:
        known = {tag for tag in tags if (hashed, tag) in self.state}
        assert self.table.disarm(self._window(hashed), tags) == known
        for tag in known:
            del self.state[hashed, tag]

    @invariant()
    def the_repr_tells_the_state(self) -> None:
        if hasattr(self, "table"):
            states = list(self.state.values())
            assert repr(self.table) == (
                f"<WindowTable windows=2 armed={states.count('armed')} "
                f"landing={states.count('landing')}>"
            )


def _table(tags: Sequence[int], wrong: Collection[int] = ()) -> SliceTable:
    offsets = [tag * 100 + (tag in wrong) for tag in tags]
    return SliceTable.contiguous(offsets, [100] * len(tags))


TestBatches = Batches.TestCase
TestBatches.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
