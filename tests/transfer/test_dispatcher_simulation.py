"""What the dispatcher reaches over links of given rates, in virtual time.

Each path is a link that serves its chunks one after another; a grant takes a while to get there.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from dualpath.transfer.dispatcher import Dispatcher
from dualpath.transfer.placement import PathKind, policy_named
from hypothesis import given, settings
from hypothesis import strategies as st

MIB = 1 << 20
CHUNK = 256 << 10
RATE = 50e6


@dataclass
class Run:
    """How a simulated job went."""

    ended_s: float = 0.0
    bytes_by_path: dict[str, int] = field(default_factory=dict)
    load_s: list[float] = field(default_factory=list)
    grants: int = 0
    wasted_bytes: int = 0


class Simulation:
    """A closed loop of loads over paths; `slow_from_s`: then the paths in `slow` have its rates."""

    def __init__(
        self,
        rates: Mapping[str, float],
        policy: str,
        *,
        control_s: float = 0.002,
        slow_from_s: float = float("inf"),
        slow: Mapping[str, float] | None = None,
    ) -> None:
        self.rates = dict(rates)
        self.slow_from_s, self.slow = slow_from_s, dict(slow or {})
        self.control_s = control_s
        self.policy = policy_named(policy)
        self.dispatcher = Dispatcher()
        for name in rates:
            kind = PathKind.DIRECT if name == "direct" else PathKind.RELAY
            self.dispatcher.add_path(name, kind, 0.0)
        self.free_s = dict.fromkeys(rates, 0.0)
        self.run = Run(bytes_by_path=dict.fromkeys(rates, 0))
        self.landing: list[tuple[float, int, str, int, str]] = []
        self.serial = itertools.count()
        self.sizes: dict[str, list[int]] = {}
        self.now = 0.0

    def play(self, loads: Sequence[int], concurrency: int = 0) -> Run:
        self.sizes = sizes = {
            f"load-{index}": _chunks(nbytes) for index, nbytes in enumerate(loads)
        }
        waiting = list(sizes)
        started: dict[str, float] = {}
        while waiting or started:
            while waiting and len(started) < (concurrency or len(loads)):
                load_id = waiting.pop(0)
                self.dispatcher.add_load(load_id, sizes[load_id], self.policy, self.now)
                started[load_id] = self.now
            self.send()
            self.wait()
            for load_id in [one for one in started if self.dispatcher.is_done(one)]:
                self.run.load_s.append(self.now - started.pop(load_id))
                self.dispatcher.remove_load(load_id)
        self.run.ended_s = self.now
        return self.run

    def send(self) -> None:
        for name in self.dispatcher.stalled(self.now):
            self.dispatcher.path_lost(name, "stalled", self.now)
        for grant in self.dispatcher.overtaken(self.now):
            for chunk in grant.chunks:
                self.dispatcher.failed(grant.load_id, chunk, grant.path, "overtaken", self.now)
        for grant in self.dispatcher.grants(self.now):
            self.run.grants += 1
            for chunk in grant.chunks:
                start_s = max(self.free_s[grant.path], self.now + self.control_s)
                rate = self.rate(grant.path, start_s)
                end_s = self.free_s[grant.path] = start_s + self.sizes[grant.load_id][chunk] / rate
                entry = (end_s, next(self.serial), grant.load_id, chunk, grant.path)
                heapq.heappush(self.landing, entry)

    def rate(self, path: str, at_s: float) -> float:
        """Bytes a second of the path's link."""
        rates = self.slow if at_s >= self.slow_from_s else self.rates
        return rates.get(path, self.rates[path])

    def wait(self) -> None:
        """Until the next chunk lands or the dispatcher wants to be asked again."""
        event_s = self.now + self.dispatcher.next_event_s(self.now)
        if self.landing and self.landing[0][0] <= event_s:
            self.now, _, load_id, chunk, path = heapq.heappop(self.landing)
            if self.dispatcher.verified(load_id, [chunk], path, self.now):
                self.run.bytes_by_path[path] += self.sizes[load_id][chunk]
            else:
                self.run.wasted_bytes += CHUNK
        else:
            assert event_s < float("inf"), "nothing to wait for"
            self.now = event_s


def _chunks(nbytes: int) -> list[int]:
    full, rest = divmod(nbytes, CHUNK)
    return [CHUNK] * full + [rest] * bool(rest)


def paths(*rates: float) -> dict[str, float]:
    names = ["direct", *(f"relay:d{index}" for index in range(1, len(rates)))]
    return dict(zip(names, rates, strict=True))


@pytest.mark.parametrize(("count", "ratio"), [(2, 0.53), (3, 0.37), (4, 0.29)])
def test_a_lone_load_split_over_equal_links_takes_its_share_of_direct(
    count: int, ratio: float
) -> None:
    direct = Simulation(paths(*[RATE] * count), "direct").play([64 * MIB])
    split = Simulation(paths(*[RATE] * count), "split").play([64 * MIB])
    assert split.ended_s <= ratio * direct.ended_s
    assert split.ended_s <= 1.03 * 64 * MIB / (count * RATE)


@pytest.mark.parametrize("ratio", [2, 3, 10])
def test_unequal_links_are_used_in_proportion(ratio: int) -> None:
    run = Simulation(paths(RATE, RATE / ratio), "split").play([64 * MIB])
    share = run.bytes_by_path["relay:d1"] / (64 * MIB)
    assert share == pytest.approx(1 / (1 + ratio), rel=0.1, abs=0.01)
    assert run.ended_s <= 1.03 * 64 * MIB / (RATE * (1 + 1 / ratio))


@pytest.mark.parametrize("links", [2, 3])
def test_shorter_queue_is_within_five_per_cent_of_split_at_sixteen_loads(links: int) -> None:
    loads = [(8 + index * 37 % 57) * MIB for index in range(64)]
    split = Simulation(paths(*[RATE] * links), "split").play(loads, 16)
    shorter = Simulation(paths(*[RATE] * links), "shorter-queue").play(loads, 16)
    assert shorter.ended_s <= 1.05 * split.ended_s
    assert split.ended_s <= 1.01 * sum(loads) / (links * RATE)


def test_round_robin_gives_both_links_the_same_number_of_loads() -> None:
    run = Simulation(paths(RATE, RATE), "round-robin").play([8 * MIB] * 16, 4)
    assert run.bytes_by_path["direct"] == run.bytes_by_path["relay:d1"]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(5e6, 500e6), min_size=1, max_size=4),
    st.lists(st.integers(1, 24 * MIB), min_size=1, max_size=12),
    st.integers(1, 12),
)
def test_split_wastes_little_of_any_links(
    rates: list[float], loads: list[int], concurrency: int
) -> None:
    run = Simulation(paths(*rates), "split").play(loads, concurrency)
    ideal_s = sum(loads) / sum(rates)
    # At first rates are unknown: a slow link may get a start window, which is then overtaken.
    assert run.ended_s <= 1.05 * ideal_s + 0.6 + 0.01 * len(loads)
    assert sum(run.bytes_by_path.values()) == sum(loads)


def test_a_link_that_turns_slow_does_not_hold_up_the_end_of_a_load() -> None:
    run = Simulation(paths(RATE, RATE), "split", slow_from_s=0.5, slow={"relay:d1": 1e5}).play(
        [64 * MIB]
    )
    left_after = 64 * MIB - 2 * 0.5 * RATE
    assert run.ended_s <= 0.5 + left_after / RATE + 0.6
    assert run.wasted_bytes <= 4 * MIB


def test_a_link_that_never_answers_costs_little_more_than_going_without_it() -> None:
    run = Simulation(paths(RATE, 1.0), "split").play([16 * MIB])
    assert run.ended_s <= 16 * MIB / RATE + 0.6
    assert run.bytes_by_path["relay:d1"] == 0


def test_fast_links_get_large_grants() -> None:
    run = Simulation(paths(5e9, 5e9), "split", control_s=0.001).play([1024 * MIB] * 4, 2)
    assert 4096 * MIB / run.grants >= 8 * MIB


Stretch = tuple[float, dict[str, float]]
"""Seconds, and the rates of the paths meanwhile."""


class Changing(Simulation):
    """One load over links that change their rates; notes what landed when, and what the paths are
    thought to carry a second after each change."""

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        super().__init__(stretches[0][1], "split")
        ends = list(itertools.accumulate(seconds for seconds, _ in stretches))
        self.stretches = [
            (start, end, rates)
            for start, end, (_, rates) in zip([0.0, *ends], ends, stretches, strict=False)
        ]
        self.landed: list[tuple[float, str]] = []
        self.thought: list[dict[str, float]] = []
        # More than there is time for: always a backlog.
        most = sum(seconds * sum(rates.values()) for seconds, rates in stretches)
        self.nbytes = int(1.2 * most) // CHUNK * CHUNK
        self.play([self.nbytes])

    def rate(self, path: str, at_s: float) -> float:
        for _, end, rates in self.stretches:
            if at_s < end:
                return rates[path]
        return self.stretches[-1][2][path]

    def wait(self) -> None:
        before = dict(self.run.bytes_by_path)
        super().wait()
        for path, nbytes in self.run.bytes_by_path.items():
            if nbytes != before[path]:
                self.landed.append((self.now, path))
        if len(self.thought) < len(self.stretches):
            start, _, _ = self.stretches[len(self.thought)]
            if self.now >= start + 1:
                views = self.dispatcher.views(self.now)
                self.thought.append({view.name: view.rate_bytes_per_s for view in views})

    def carried(self, path: str, start: float, end: float) -> float:
        """Bytes a second that landed by the path."""
        chunks = sum(start <= at < end and name == path for at, name in self.landed)
        return chunks * CHUNK / (end - start)


def stretches_of(*rates: tuple[float, float], seconds: float = 3.0) -> list[Stretch]:
    return [(seconds, paths(*each)) for each in rates]


@pytest.mark.parametrize(
    "stretches",
    [
        stretches_of((RATE, RATE), (RATE, RATE / 4)),
        stretches_of((RATE, RATE / 4), (RATE, RATE)),
        stretches_of((RATE, RATE), (RATE / 8, RATE)),
        stretches_of((RATE, RATE / 3), (RATE / 3, RATE), (RATE, RATE / 3)),
        stretches_of(*[(RATE, RATE * (1 + step) / 6) for step in range(6)], seconds=2.0),
        stretches_of(*[(RATE, RATE / (1 + 3 * (step % 2))) for step in range(5)], seconds=2.0),
    ],
    ids=["quarter", "back", "direct slows", "swap", "ramp", "flapping"],
)
def test_a_second_after_a_change_of_rates_each_path_carries_what_its_link_can(
    stretches: list[Stretch],
) -> None:
    run = Changing(stretches)
    for thought, (start, end, rates) in zip(run.thought, run.stretches, strict=True):
        for path, rate in rates.items():
            assert thought[path] == pytest.approx(rate, rel=0.15), (path, start)
            chunks_off = CHUNK / (end - start - 1)  # one that lands just outside of the window
            carried = run.carried(path, start + 1, end)
            assert carried == pytest.approx(rate, rel=0.05, abs=2 * chunks_off), (path, start)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.floats(8e6, 80e6), st.floats(8e6, 80e6)), min_size=2, max_size=4))
def test_whatever_the_rates_change_to_none_of_any_link_is_left_idle(
    rates: list[tuple[float, float]],
) -> None:
    run = Changing(stretches_of(*rates, seconds=2.0))
    for start, end, each in run.stretches:
        for path, rate in each.items():
            carried = run.carried(path, start + 1, end)
            assert carried == pytest.approx(rate, rel=0.1, abs=3 * CHUNK), (path, start)
