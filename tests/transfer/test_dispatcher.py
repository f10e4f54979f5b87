"""The dispatcher's rules, one by one."""

from __future__ import annotations

import math
import sys
from types import FrameType
from typing import Any

import pytest
from dualpath.transfer.chunk_queue import ChunkQueue, ChunkState
from dualpath.transfer.credit import CreditConfig
from dualpath.transfer.dispatch_config import DispatchConfig
from dualpath.transfer.dispatcher import Dispatcher
from dualpath.transfer.errors import InvalidRequest, Overloaded
from dualpath.transfer.grant import Grant
from dualpath.transfer.placement import PathKind, policy_named

CHUNK = 256 << 10
SPLIT = policy_named("split")
DIRECT = policy_named("direct")
EIGHT_CHUNKS = DispatchConfig(credit=CreditConfig(window_bytes_alone=8 * CHUNK))
"""Credit of a path that is alone and unknown."""


def dispatcher(relays: int = 1, config: DispatchConfig | None = None) -> Dispatcher:
    made = Dispatcher(config)
    made.add_path("direct", PathKind.DIRECT, 0.0)
    for index in range(relays):
        made.add_path(f"relay:d{index}", PathKind.RELAY, 0.0)
    return made


def by_path(grants: list[Grant]) -> dict[str, list[tuple[str, int]]]:
    found: dict[str, list[tuple[str, int]]] = {}
    for grant in grants:
        for chunk in grant.chunks:
            found.setdefault(grant.path, []).append((grant.load_id, chunk))
    return found


def test_a_path_takes_the_first_loads_chunks_before_the_next_loads() -> None:
    made = dispatcher(0, EIGHT_CHUNKS)
    made.add_load("first", [CHUNK] * 3, DIRECT, 0.0)
    made.add_load("second", [CHUNK] * 99, DIRECT, 0.0)
    granted = by_path(made.grants(0.0))["direct"]
    assert granted == [("first", 0), ("first", 1), ("first", 2)] + [
        ("second", chunk) for chunk in range(5)
    ]


def test_a_corrupt_chunk_goes_by_the_other_path_and_then_is_given_up() -> None:
    made = dispatcher()
    made.add_load("load", [CHUNK], DIRECT, 0.0)
    assert by_path(made.grants(0.0)) == {"direct": [("load", 0)]}
    assert made.failed("load", 0, "direct", "corrupt", 0.1)
    assert by_path(made.grants(0.1)) == {"relay:d0": [("load", 0)]}
    assert not made.failed("load", 0, "relay:d0", "corrupt", 0.2)
    assert made.is_done("load")
    assert made.progress("load")[ChunkState.DROPPED] == 1
    assert made.events("load") == {"chunk_failed:corrupt": 2, "attempts_used_up:corrupt": 1}


def test_a_corrupt_chunk_goes_once_more_by_the_same_path_if_there_is_no_other() -> None:
    made = dispatcher()
    made.add_load("load", [CHUNK], SPLIT, 0.0, allowed=["relay:d0"])
    assert by_path(made.grants(0.0)) == {"relay:d0": [("load", 0)]}
    assert made.failed("load", 0, "relay:d0", "corrupt", 0.1)
    assert by_path(made.grants(0.1)) == {"relay:d0": [("load", 0)]}
    assert made.verified("load", [0], "relay:d0", 0.2)
    assert made.is_done("load")


def test_an_overloaded_path_rests_and_the_chunk_is_not_to_blame() -> None:
    made = dispatcher(0)
    made.add_load("load", [CHUNK], SPLIT, 0.0)
    now = 0.0
    for _ in range(10):
        assert by_path(made.grants(now)) == {"direct": [("load", 0)]}
        assert made.failed("load", 0, "direct", "overloaded", now)
        assert made.grants(now) == []
        assert 0 < made.next_event_s(now) <= 1.0
        now += made.next_event_s(now)


def test_loads_of_a_lost_path_fall_back_to_direct_and_are_counted() -> None:
    made = dispatcher(2)
    policy = policy_named("round-robin")
    for index in range(3):
        made.add_load(f"load-{index}", [CHUNK] * 2, policy, 0.0)
    assert made.paths_of("load-1") == ("relay:d0",)
    made.grants(0.0)
    assert made.path_lost("relay:d0", "peer_lost", 0.1) == {"load-1": (0, 1)}
    assert made.paths_of("load-1") == ("direct",)
    assert made.paths_of("load-2") == ("relay:d1",)
    assert by_path(made.grants(0.1)) == {"direct": [("load-1", 0), ("load-1", 1)]}
    assert made.events("load-1") == {"given_back:peer_lost": 2, "fallback:peer_lost": 1}
    assert made.counters["path_lost:peer_lost"] == 1


def test_a_lost_path_is_tried_again_with_one_chunk_after_a_growing_backoff() -> None:
    made = dispatcher(0)
    made.add_load("load", [CHUNK] * 50, SPLIT, 0.0)
    now, waits = 0.0, []
    made.grants(now)
    for _ in range(4):
        made.path_lost("direct", "peer_lost", now)
        assert made.grants(now) == []
        waits.append(made.next_event_s(now))
        now += waits[-1]
        assert by_path(made.grants(now)) == {"direct": [("load", 0)]}
    assert waits == pytest.approx([0.25, 0.5, 1.0, 2.0])
    assert made.verified("load", [0], "direct", now + 0.01)
    assert len(by_path(made.grants(now + 0.01))["direct"]) > 1


def test_a_stalled_path_proves_itself_by_a_copy_before_it_is_granted_a_chunk() -> None:
    made = dispatcher()
    made.add_load("load", [CHUNK] * 500, SPLIT, 0.0)
    made.grants(0.0)
    made.path_lost("relay:d0", "stalled", 1.0)
    assert made.trials(1.0) == []
    now, waits = 1.0, []
    for _ in range(4):
        wait_s = made.next_event_s(now)
        assert wait_s > 0
        waits.append(wait_s)
        now += wait_s
        assert set(by_path(made.grants(now))) <= {"direct"}
        (copy,) = made.trials(now)
        assert (copy.path, copy.load_id, len(copy.chunks)) == ("relay:d0", "load", 1)
        assert made.trials(now) == []
        flying = made.inflight("load")["direct"]
        made.verified("load", flying[:1], "direct", now)  # that one moves
        assert made.inflight("load").keys() == {"direct"}
        assert made.stalled(now + 1.9) == ()
        assert "relay:d0" in made.stalled(now + 2.1)
        made.path_lost("relay:d0", "stalled", now)
    assert waits == pytest.approx([0.25, 0.25, 0.5, 0.5])
    made.set_up("relay:d0", True, now)  # a new connection does not prove it
    assert set(by_path(made.grants(now))) <= {"direct"}
    assert len(made.trials(now)) == 1
    made.tried("relay:d0", now)
    assert "relay:d0" in by_path(made.grants(now))


def test_a_path_on_trial_takes_chunks_of_loads_that_may_use_no_other() -> None:
    made = dispatcher()
    made.path_lost("relay:d0", "stalled", 0.0)
    made.add_load("split", [CHUNK] * 3, SPLIT, 1.0)
    assert set(by_path(made.grants(1.0))) == {"direct"}
    made.add_load("only", [CHUNK] * 3, SPLIT, 1.0, allowed=["relay:d0"])
    assert by_path(made.grants(1.0)) == {"relay:d0": [("only", 0)]}
    assert made.trials(1.0) == []
    made.verified("only", [0], "relay:d0", 1.1)
    assert "relay:d0" in made.paths_of("split")


def test_telling_a_loss_twice_does_not_double_the_backoff() -> None:
    made = dispatcher(0)
    for _ in range(5):
        made.path_lost("direct", "peer_lost", 0.0)
    assert made.next_event_s(0.0) == pytest.approx(0.25)
    assert made.counters == {"path_lost:peer_lost": 1}


def test_a_path_set_up_again_is_used_at_once() -> None:
    made = dispatcher(0)
    made.add_load("load", [CHUNK] * 50, SPLIT, 0.0)
    made.path_lost("direct", "peer_lost", 0.0)
    made.set_up("direct", True, 0.01)
    assert len(by_path(made.grants(0.01))["direct"]) > 1


def test_a_path_without_progress_stalls_and_progress_puts_it_off() -> None:
    made = dispatcher(0)
    made.add_load("load", [CHUNK] * 50, SPLIT, 0.0)
    made.grants(0.0)
    assert made.stalled(1.9) == ()
    made.verified("load", [0], "direct", 1.9)
    assert made.stalled(2.1) == ()
    assert made.stalled(1.9 + made.next_event_s(1.9)) == ("direct",)
    made.path_lost("direct", "stalled", 10.0)
    assert made.stalled(10.0) == ()


def test_a_slow_path_is_given_the_time_of_a_few_chunks() -> None:
    made = dispatcher(0)
    made.add_load("load", [1 << 20] * 50, SPLIT, 0.0)
    made.grants(0.0)
    for chunk, now in enumerate([1.5, 3.0, 4.5]):
        made.grants(now)
        made.verified("load", [chunk], "direct", now)
    made.grants(4.5)
    assert made.stalled(4.5 + 5.5) == ()
    assert made.stalled(4.5 + 6.5) == ("direct",)


def test_a_slow_path_leaves_the_last_chunks_to_a_fast_one() -> None:
    made = dispatcher()
    made.add_load("warm", [CHUNK] * 12, SPLIT, 0.0)
    granted = by_path(made.grants(0.0))
    for step, (load_id, chunk) in enumerate(granted["direct"], 1):
        made.verified(load_id, [chunk], "direct", step * CHUNK / 50e6)
    for step, (load_id, chunk) in enumerate(granted["relay:d0"], 1):
        made.verified(load_id, [chunk], "relay:d0", step * CHUNK / 1e6)
    assert made.is_done("warm")
    made.add_load("load", [CHUNK] * 4, SPLIT, 9.0)
    assert set(by_path(made.grants(9.0))) == {"direct"}
    made.set_up("direct", False, 9.1)
    assert made.grants(9.1) == []
    assert made.path_lost("direct", "peer_lost", 9.1) == {"load": (0, 1, 2, 3)}
    assert set(by_path(made.grants(9.1))) == {"relay:d0"}


def test_chunks_stuck_on_a_slow_path_are_offered_to_an_idle_one() -> None:
    made = dispatcher()
    made.add_load("load", [CHUNK] * 12, SPLIT, 0.0)
    granted = by_path(made.grants(0.0))
    for step, (load_id, chunk) in enumerate(granted["direct"], 1):
        made.verified(load_id, [chunk], "direct", step * CHUNK / 50e6)
    assert made.overtaken(0.05) == []
    stuck = made.overtaken(0.5)
    assert by_path(stuck).keys() == {"relay:d0"}
    for load_id, chunk in by_path(stuck)["relay:d0"]:
        assert made.failed(load_id, chunk, "relay:d0", "overtaken", 0.5)
    assert set(by_path(made.grants(0.5))) == {"direct"}


def test_loads_of_a_fixed_policy_are_not_overtaken() -> None:
    made = dispatcher()
    made.add_load("load", [CHUNK] * 4, DIRECT, 0.0)
    made.grants(0.0)
    assert made.overtaken(1.9) == []


def test_queues_count_what_is_bound_in_flight_and_reported() -> None:
    made = dispatcher()
    made.add_load("bound", [CHUNK] * 100, DIRECT, 0.0)
    made.report_queue("relay:d0", 7, 0.0)
    made.grants(0.0)
    assert [view.queue_bytes for view in made.views(0.0)] == [100 * CHUNK, 7]
    assert [view.queue_bytes for view in made.views(60.0)] == [100 * CHUNK, 0]
    made.add_load("paper", [CHUNK], policy_named("shorter-queue"), 60.0, decode_peer="d0")
    assert made.paths_of("paper") == ("relay:d0",)


def test_dropped_chunks_are_returned_by_path_and_free_their_credit() -> None:
    made = dispatcher(0, EIGHT_CHUNKS)
    made.add_load("load", [CHUNK] * 20, SPLIT, 0.0)
    made.grants(0.0)
    assert made.drop("load", range(4, 20)) == {"direct": (4, 5, 6, 7)}
    assert made.views(0.0)[0].inflight_bytes == 4 * CHUNK
    assert made.inflight("load") == {"direct": (0, 1, 2, 3)}
    assert made.remove_load("load") == {"direct": (0, 1, 2, 3)}
    assert made.views(0.0)[0].queue_bytes == 0
    assert made.next_event_s(0.0) == math.inf


def test_a_chunk_that_failed_right_after_its_grant_is_no_fresh_chunk() -> None:
    queue = ChunkQueue([1, 1])
    queue.grant(queue.next_plain(), "direct")
    assert queue.fail(0, 2)
    assert queue.next_plain() == 1
    assert queue.next_retry("direct", True) == -1
    assert queue.next_retry("relay:d0", True) == 0


def test_a_chunk_given_back_that_then_fails_does_not_return_to_the_same_path() -> None:
    made = dispatcher(2)
    made.add_load("load", [CHUNK], DIRECT, 0.0)
    made.grants(0.0)
    made.path_lost("direct", "peer_lost", 0.0)
    granted = by_path(made.grants(0.0))
    assert granted == {"relay:d0": [("load", 0)]}
    assert made.failed("load", 0, "relay:d0", "corrupt", 0.1)
    assert by_path(made.grants(0.1)) == {"relay:d1": [("load", 0)]}


def test_a_path_that_comes_later_takes_what_has_failed_on_the_only_other() -> None:
    made = dispatcher(0)
    made.add_load("load", [CHUNK], DIRECT, 0.0)
    made.grants(0.0)
    assert made.failed("load", 0, "direct", "corrupt", 0.1)
    made.add_path("relay:d0", PathKind.RELAY, 0.1)
    assert by_path(made.grants(0.1)) == {"relay:d0": [("load", 0)]}


def test_bad_input_is_refused_by_value() -> None:
    made = dispatcher(config=DispatchConfig(loads_max=1))
    with pytest.raises(InvalidRequest, match="at least one byte, not 0"):
        made.add_load("load", [1, 0], SPLIT, 0.0)
    with pytest.raises(InvalidRequest, match=r"\['relay:x'\] is known; known: direct, relay:d0"):
        made.add_load("load", [1], SPLIT, 0.0, allowed=["relay:x"])
    with pytest.raises(InvalidRequest, match="'direct' is already there"):
        made.add_path("direct", PathKind.DIRECT, 0.0)
    with pytest.raises(InvalidRequest, match="limit of -1"):
        made.add_path("relay:y", PathKind.RELAY, 0.0, -1)
    made.add_load("load", [1], SPLIT, 0.0)
    with pytest.raises(InvalidRequest, match="'load' is already there"):
        made.add_load("load", [1], SPLIT, 0.0)
    with pytest.raises(Overloaded, match="1 loads") as caught:
        made.add_load("other", [1], SPLIT, 0.0)
    assert caught.value.retry_after_s > 0
    with pytest.raises(InvalidRequest, match="chunk 1 is outside"):
        made.drop("load", [1])


def test_granting_costs_the_same_however_many_chunks_wait() -> None:
    def steps(chunks: int) -> int:
        """Lines of Python that are run, each round of a loop or a comprehension counted."""
        made = dispatcher()
        for index in range(64):
            made.add_load(f"load-{index}", [CHUNK] * chunks, SPLIT, 0.0)
        flying = [
            (one.load_id, chunk, one.path) for one in made.grants(0.0) for chunk in one.chunks
        ]
        lines = 0

        def count(_frame: FrameType, event: str, _argument: object) -> Any:
            nonlocal lines
            lines += event == "line"
            return count

        before = sys.gettrace()
        sys.settrace(count)
        try:
            for step in range(400):
                now = 0.005 * (step + 1)
                load_id, chunk, path = flying.pop(0)
                made.verified(load_id, [chunk], path, now)
                flying += [
                    (one.load_id, chunk, one.path)
                    for one in made.grants(now)
                    for chunk in one.chunks
                ]
        finally:
            sys.settrace(before)
        return lines

    assert steps(4000) < 2 * steps(40)


def test_an_unknown_path_starts_with_much_only_while_no_other_is_up() -> None:
    made = dispatcher()
    made.add_load("load", [CHUNK] * 200, DIRECT, 0.0)
    (grant,) = made.grants(0.0)
    assert grant.nbytes == 2 << 20
    made.set_up("relay:d0", False, 0.1)
    (more,) = made.grants(0.1)
    assert more.nbytes == 32 << 20  # half of the window at once
    made.set_up("relay:d0", True, 0.2)
    assert not made.grants(0.2)


def test_a_lone_path_takes_runs_of_equal_chunks_within_its_credit() -> None:
    made = dispatcher(0, EIGHT_CHUNKS)
    sizes = [CHUNK] * 3 + [CHUNK // 2] * 3 + [CHUNK] * 20
    made.add_load("load", sizes, policy_named("direct"), 0.0)
    (first,) = made.grants(0.0)
    assert first.chunks == tuple(range(8))
    assert first.nbytes == sum(sizes[:8]) <= 8 * CHUNK
    assert made.verified("load", [0, 1, 99, 1, 25], "direct", 0.1) == [0, 1]
    assert made.counters["late"] == 3
    assert made.failed("load", 4, "direct", "cancelled", 0.1)
    made.verified("load", [2, 3, 5, 6, 7], "direct", 0.1)
    granted = [chunk for grant in made.grants(0.1) for chunk in grant.chunks]
    assert granted[:2] == [4, 8]
    assert granted[1:] == list(range(8, 8 + len(granted) - 1))
    assert made.progress("load")[ChunkState.DONE] == 7
