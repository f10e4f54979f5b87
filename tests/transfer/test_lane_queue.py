"""Lanes: strict priority, first in first out, and a floor for saves."""

from __future__ import annotations

from dualpath.transfer.lane import SAVE_FLOOR, Lane
from dualpath.transfer.lane_queue import LaneQueue
from hypothesis import given
from hypothesis import strategies as st


def take(queue: LaneQueue[int]) -> tuple[Lane, int]:
    lane = queue.next_lane()
    assert lane is not None
    return lane, queue.pop(lane)


@given(st.lists(st.sampled_from([lane for lane in Lane if lane is not Lane.SAVE])))
def test_without_saves_the_order_is_by_lane_then_by_arrival(lanes: list[Lane]) -> None:
    queue: LaneQueue[int] = LaneQueue()
    for item, lane in enumerate(lanes):
        queue.push(lane, item)
    taken = [take(queue) for _ in lanes]
    assert taken == sorted((lane, item) for item, lane in enumerate(lanes))
    assert queue.next_lane() is None
    assert len(queue) == 0


@given(st.integers(1, 1 << 20), st.sampled_from([Lane.LOAD_PREFILL, Lane.LOAD_DECODE]))
def test_waiting_saves_get_their_floor_and_not_much_more(nbytes: int, loads: Lane) -> None:
    queue: LaneQueue[int] = LaneQueue()
    sent = {loads: 0, Lane.SAVE: 0}
    for item in range(1000):
        queue.push(loads, item)
        queue.push(Lane.SAVE, item)
    for _ in range(500):
        lane, _ = take(queue)
        queue.charge(lane, nbytes)
        sent[lane] += nbytes
    share = sent[Lane.SAVE] / sum(sent.values())
    assert abs(share - SAVE_FLOOR) < 0.01


def test_loads_that_went_before_a_save_came_give_it_no_credit() -> None:
    queue: LaneQueue[int] = LaneQueue()
    for item in range(100):
        queue.push(Lane.LOAD_PREFILL, item)
        queue.charge(Lane.LOAD_PREFILL, 1 << 20)
    queue.push(Lane.SAVE, 0)
    assert queue.next_lane() is Lane.LOAD_PREFILL


def test_removed_items_do_not_come() -> None:
    queue: LaneQueue[int] = LaneQueue()
    for item in range(3):
        queue.push(Lane.SAVE, item)
    queue.remove(Lane.SAVE, 1)
    queue.remove(Lane.SAVE, 9)
    assert list(queue) == [0, 2]
    queue.clear()
    assert queue.next_lane() is None
