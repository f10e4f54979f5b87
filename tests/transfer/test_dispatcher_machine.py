"""Random histories of loads, failures and lost paths against a model of every chunk."""

from __future__ import annotations

import math

import pytest
from dualpath.transfer.chunk_queue import ChunkState
from dualpath.transfer.credit import CreditConfig
from dualpath.transfer.dispatch_config import DispatchConfig
from dualpath.transfer.dispatcher import Dispatcher
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.grant import UNBLAMED_REASONS
from dualpath.transfer.path_state import PathCondition
from dualpath.transfer.placement import POLICY_NAMES, AssignedPolicy, PathKind, policy_named
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

KIB = 1 << 10
CREDIT = CreditConfig(
    window_bytes_min=64 * KIB,
    window_bytes_start=128 * KIB,
    window_bytes_alone=512 * KIB,
    window_bytes_max=1024 * KIB,
)
CONFIG = DispatchConfig(loads_max=6, credit=CREDIT)
NAMES = ["direct", "relay:a", "relay:b"]
REASONS = ["corrupt", "refused", "overloaded", "cancelled"]


class ModelLoad:
    """What the test knows about a load."""

    def __init__(self, nbytes: list[int], policy: str, allowed: frozenset[str]) -> None:
        self.nbytes = nbytes
        self.policy = policy
        self.allowed = allowed
        self.state = [ChunkState.WAITING] * len(nbytes)
        self.path = [""] * len(nbytes)
        self.failed_on: list[list[str]] = [[] for _ in nbytes]
        self.grants = [0] * len(nbytes)


class DispatcherMachine(RuleBasedStateMachine):
    """Chunks go waiting -> in flight -> done or dropped, and back to waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatcher = Dispatcher(CONFIG)
        self.now = 0.0
        self.loads: dict[str, ModelLoad] = {}
        self.paths: dict[str, float] = {}
        self.down: set[str] = set()
        self.doubted: set[str] = set()
        self.copies: set[str] = set()
        self.next_id = 0

    @initialize(
        rates=st.lists(st.floats(1e5, 1e8), min_size=3, max_size=3), count=st.integers(1, 3)
    )
    def start(self, rates: list[float], count: int) -> None:
        for name, rate in list(zip(NAMES, rates, strict=True))[:count]:
            self._add_path(name, rate)

    def _add_path(self, name: str, rate: float) -> None:
        kind = PathKind.DIRECT if name == "direct" else PathKind.RELAY
        self.dispatcher.add_path(name, kind, self.now)
        self.paths[name] = rate

    def _up(self) -> set[str]:
        return {view.name for view in self.dispatcher.views(self.now) if view.up}

    def _inflight(self) -> list[tuple[str, int, str]]:
        return [
            (load_id, chunk, load.path[chunk])
            for load_id, load in self.loads.items()
            for chunk, state in enumerate(load.state)
            if state is ChunkState.INFLIGHT
        ]

    # ------------------------------------------------------------ paths

    @precondition(lambda self: len(self.paths) < 3)
    @rule(rate=st.floats(1e5, 1e8))
    def add_path(self, rate: float) -> None:
        self._add_path(next(name for name in NAMES if name not in self.paths), rate)

    @precondition(lambda self: self.paths)
    @rule(data=st.data(), reason=st.sampled_from(["stalled", "peer_lost"]))
    def lose_path(self, data: st.DataObject, reason: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.paths)))
        self._lost(name, reason)
        assert name not in self._up()

    def _lost(self, name: str, reason: str) -> None:
        if reason == "stalled":
            self.doubted.add(name)
        self.copies.discard(name)
        self._given_back(name, self.dispatcher.path_lost(name, reason, self.now))

    def _proven(self) -> set[str]:
        return {path.name for path in self.dispatcher._paths if path.condition is PathCondition.UP}

    def _may(self, load: ModelLoad) -> set[str]:
        """Paths that a load may use now: those on trial only for want of a better one."""
        proven, trial = self._proven(), self._on_trial()
        if load.allowed:
            proven, trial = proven & load.allowed, trial & load.allowed
        return proven or trial

    def _given_back(self, name: str, returned: dict[str, tuple[int, ...]]) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for load_id, chunk, path in self._inflight():
            if path == name:
                expected[load_id] = (*expected.get(load_id, ()), chunk)
                self.loads[load_id].state[chunk] = ChunkState.WAITING
        assert returned == expected

    @precondition(lambda self: self.paths)
    @rule(data=st.data(), up=st.booleans())
    def set_up(self, data: st.DataObject, up: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.paths)))
        self.dispatcher.set_up(name, up, self.now)
        (self.down.discard if up else self.down.add)(name)
        if not up:
            self.copies.discard(name)
        if name not in self.doubted:
            assert (name in self._up()) == up
        else:  # it has to prove itself
            assert (name in self._on_trial()) == up
            assert not up or (name in self._up()) == (not self._proven())

    @precondition(lambda self: self.paths)
    @rule(data=st.data(), nbytes=st.integers(0, 1 << 24))
    def report(self, data: st.DataObject, nbytes: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.paths)))
        self.dispatcher.report_queue(name, nbytes, self.now)
        view = next(view for view in self.dispatcher.views(self.now) if view.name == name)
        assert view.queue_bytes >= nbytes

    # ------------------------------------------------------------ loads

    @precondition(lambda self: self.paths and len(self.loads) < CONFIG.loads_max)
    @rule(
        nbytes=st.lists(st.integers(1, 200 * KIB), max_size=40),
        policy=st.sampled_from([*POLICY_NAMES, "assigned"]),
        share=st.sampled_from([0.0, 0.3, 1.0]),
        peer=st.sampled_from(["", "a", "b"]),
        allowed=st.sets(st.sampled_from(NAMES)),
    )
    def add_load(
        self, nbytes: list[int], policy: str, share: float, peer: str, allowed: set[str]
    ) -> None:
        assume(not allowed or allowed & self.paths.keys())
        load_id = f"load-{self.next_id}"
        self.next_id += 1
        placing = AssignedPolicy(share) if policy == "assigned" else policy_named(policy)
        self.dispatcher.add_load(
            load_id, nbytes, placing, self.now, decode_peer=peer, allowed=allowed
        )
        self.loads[load_id] = ModelLoad(nbytes, policy, frozenset(allowed))

    @precondition(lambda self: self.loads)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        load_id = data.draw(st.sampled_from(sorted(self.loads)))
        load = self.loads[load_id]
        first = data.draw(st.integers(0, len(load.nbytes)))
        chunks = range(first, len(load.nbytes))
        returned = self.dispatcher.drop(load_id, chunks)
        flat = sorted((chunk, path) for path, some in returned.items() for chunk in some)
        flying = [(c, load.path[c]) for c in chunks if load.state[c] is ChunkState.INFLIGHT]
        assert flat == flying
        for chunk in chunks:
            if load.state[chunk] is not ChunkState.DONE:
                load.state[chunk] = ChunkState.DROPPED

    @precondition(lambda self: self.loads)
    @rule(data=st.data())
    def remove_load(self, data: st.DataObject) -> None:
        load_id = data.draw(st.sampled_from(sorted(self.loads)))
        returned = self.dispatcher.remove_load(load_id)
        flat = sorted((chunk, path) for path, some in returned.items() for chunk in some)
        assert flat == sorted((c, p) for one, c, p in self._inflight() if one == load_id)
        del self.loads[load_id]
        assert self.dispatcher.remove_load(load_id) == {}

    # ------------------------------------------------------------ chunks

    @rule()
    def grant(self) -> None:
        dispatcher, up = self.dispatcher, self._up()
        rates = {view.name: view.rate_bytes_per_s for view in dispatcher.views(self.now)}
        for grant in dispatcher.grants(self.now):
            assert grant.chunks
            load = self.loads[grant.load_id]
            assert grant.path in self._may(load)
            assert grant.nbytes == sum(load.nbytes[chunk] for chunk in grant.chunks)
            assert not load.allowed or grant.path in load.allowed
            for chunk in grant.chunks:
                assert load.state[chunk] is ChunkState.WAITING
                failed = load.failed_on[chunk]
                if failed:
                    others = {
                        name for name in up if not load.allowed or name in load.allowed
                    } - set(failed)
                    trusted = [name for name in others if name not in self._on_trial()]
                    assert grant.path not in failed or not trusted
                elif load.policy not in ("split", "assigned"):
                    assert dispatcher.paths_of(grant.load_id) == (grant.path,)
                load.state[chunk] = ChunkState.INFLIGHT
                load.path[chunk] = grant.path
                load.grants[chunk] += 1
            window = CREDIT.window_bytes(rates[grant.path], alone=len(up) == 1)
            flying = [
                self.loads[load_id].nbytes[chunk]
                for load_id, chunk, path in self._inflight()
                if path == grant.path
            ]
            assert sum(flying) <= max(window, 2 * max(flying))
        assert dispatcher.grants(self.now) == []

    def _on_trial(self) -> set[str]:
        return {
            path.name
            for path in self.dispatcher._paths  # the only state that views do not show
            if path.condition.value == "trial"
        }

    @precondition(lambda self: self._inflight())
    @rule(data=st.data(), times=st.integers(1, 8))
    def land(self, data: st.DataObject, times: int) -> None:
        for _ in range(times):
            flying = self._inflight()
            if not flying:
                return
            self._land(*data.draw(st.sampled_from(flying)))

    def _land(self, load_id: str, chunk: int, path: str) -> None:
        load = self.loads[load_id]
        self.now += load.nbytes[chunk] / self.paths[path]
        before = self.dispatcher.shares(load_id).get(path, 0)
        assert self.dispatcher.verified(load_id, [chunk], path, self.now)
        assert not self.dispatcher.verified(load_id, [chunk], path, self.now)
        assert self.dispatcher.shares(load_id)[path] == before + load.nbytes[chunk]
        load.state[chunk] = ChunkState.DONE
        self.doubted.discard(path)

    @rule(data=st.data())
    def try_paths(self, data: st.DataObject) -> None:
        """Copies change nothing of a load; what has come by them proves their path."""
        for grant in self.dispatcher.trials(self.now):
            load = self.loads[grant.load_id]
            (chunk,) = grant.chunks
            assert grant.path in self._on_trial()
            assert grant.path not in self._may(load)
            assert not load.allowed or grant.path in load.allowed
            assert load.state[chunk] in (ChunkState.WAITING, ChunkState.INFLIGHT)
            assert not load.failed_on[chunk]
            assert grant.nbytes == load.nbytes[chunk]
            self.copies.add(grant.path)
        assert self.dispatcher.trials(self.now) == []
        for name in sorted(self.copies):
            end = data.draw(st.sampled_from(["comes", "stalls", "given up", "later"]))
            trial = name in self._on_trial()
            if end == "comes":
                self.dispatcher.tried(name, self.now)
                assert not trial or name in self._proven()
                self.doubted.discard(name)
            elif end == "stalls":
                self._lost(name, "stalled")
                assert name not in self._on_trial()
            elif end == "given up":
                self.dispatcher.untried(name, self.now)
                assert (name in self._on_trial()) == trial
            if end != "later":
                self.copies.discard(name)

    @precondition(lambda self: self._inflight())
    @rule(data=st.data(), reason=st.sampled_from(REASONS))
    def fail(self, data: st.DataObject, reason: str) -> None:
        self._fail(*data.draw(st.sampled_from(self._inflight())), reason)

    def _fail(self, load_id: str, chunk: int, path: str, reason: str) -> None:
        load = self.loads[load_id]
        again = self.dispatcher.failed(load_id, chunk, path, reason, self.now)
        if reason not in UNBLAMED_REASONS:
            load.failed_on[chunk].append(path)
        assert again == (len(load.failed_on[chunk]) < CONFIG.attempts_max)
        load.state[chunk] = ChunkState.WAITING if again else ChunkState.DROPPED

    @rule(step_s=st.sampled_from([0.001, 0.05, 0.3, 2.5, 30.0]))
    def wait(self, step_s: float) -> None:
        self.now += step_s
        for name in self.dispatcher.stalled(self.now):
            self._lost(name, "stalled")
        assert self.dispatcher.stalled(self.now) == ()

    @rule()
    def overtake(self) -> None:
        for grant in self.dispatcher.overtaken(self.now):
            for chunk in grant.chunks:
                self._fail(grant.load_id, chunk, grant.path, "overtaken")

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), chunk=st.integers(0, 50))
    def tell_late(self, data: st.DataObject, chunk: int) -> None:
        load_id = data.draw(st.sampled_from([*sorted(self.loads), "gone"]))
        path = data.draw(st.sampled_from(NAMES))
        assume((load_id, chunk, path) not in self._inflight())
        assert not self.dispatcher.verified(load_id, [chunk], path, self.now)
        assert self.dispatcher.failed(load_id, chunk, path, "corrupt", self.now)

    # ------------------------------------------------------------ always

    @invariant()
    def every_chunk_is_in_the_state_that_the_model_says(self) -> None:
        for load_id, load in self.loads.items():
            counts = self.dispatcher.progress(load_id)
            assert counts == {state: load.state.count(state) for state in ChunkState}
            waiting_or_flying = {ChunkState.WAITING, ChunkState.INFLIGHT} & set(load.state)
            assert self.dispatcher.is_done(load_id) == (not waiting_or_flying)
            flying = {
                (chunk, path)
                for path, chunks in self.dispatcher.inflight(load_id).items()
                for chunk in chunks
            }
            assert flying == {(c, p) for one, c, p in self._inflight() if one == load_id}

    @invariant()
    def the_bytes_of_each_path_are_those_of_its_chunks(self) -> None:
        views = self.dispatcher.views(self.now)
        assert [view.name for view in views] == list(self.paths)
        for view in views:
            nbytes = sum(
                self.loads[load_id].nbytes[chunk]
                for load_id, chunk, path in self._inflight()
                if path == view.name
            )
            assert view.inflight_bytes == nbytes
            assert view.queue_bytes >= nbytes
        waiting = sum(
            load.nbytes[chunk]
            for load_id, load in self.loads.items()
            if self.dispatcher.paths_of(load_id)
            for chunk, state in enumerate(load.state)
            if state is ChunkState.WAITING
        )
        queued = sum(view.queue_bytes - view.inflight_bytes for view in views)
        assert queued >= waiting - len(views)  # rounding; reports come on top

    @invariant()
    def a_load_is_placed_if_a_path_that_it_may_use_is_up(self) -> None:
        for load_id, load in self.loads.items():
            placed = set(self.dispatcher.paths_of(load_id))
            may = self._may(load)
            assert placed <= may
            assert bool(placed) == bool(may)
            if load.policy == "split":
                assert placed == may

    def teardown(self) -> None:
        """Once paths stay up and move, every chunk that was not given up on lands."""
        for name in self.down:
            self.dispatcher.set_up(name, True, self.now)
        for load_id, load in list(self.loads.items()):
            if load.allowed and not load.allowed & self.paths.keys():
                self.dispatcher.remove_load(load_id)
                del self.loads[load_id]
        rounds = 10 * sum(len(load.nbytes) for load in self.loads.values()) + 200
        for _ in range(rounds):
            self.grant()
            flying = self._inflight()
            if flying:
                self._land(*flying[0])
            elif all(self.dispatcher.is_done(load_id) for load_id in self.loads):
                break
            else:
                wait_s = self.dispatcher.next_event_s(self.now)
                assert math.isfinite(wait_s)
                self.now += wait_s
                for name in self.dispatcher.stalled(self.now):
                    self._lost(name, "stalled")
        for load in self.loads.values():
            assert set(load.state) <= {ChunkState.DONE, ChunkState.DROPPED}


DispatcherMachine.TestCase.settings = settings(
    max_examples=250,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestDispatcherMachine = DispatcherMachine.TestCase


def test_unknown_loads_and_paths_are_refused_by_name() -> None:
    dispatcher = Dispatcher(CONFIG)
    with pytest.raises(InvalidRequest, match="unknown load 'x'"):
        dispatcher.is_done("x")
    with pytest.raises(InvalidRequest, match="unknown path 'x'"):
        dispatcher.set_up("x", True, 0.0)
