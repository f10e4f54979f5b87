"""The delivery queue: fair between attachments, bounded, and every chunk ends exactly once."""

from __future__ import annotations

from collections import Counter

import pytest
from dualpath.kvstore.service.delivery_queue import (
    GRANT_CHUNKS_MAX,
    GRANTS_MAX,
    QUEUED_CHUNKS_MAX,
    REPORTS_MAX,
    ChunkFailure,
    Delivery,
    DeliveryQueue,
    Grant,
    GrantedChunks,
)
from dualpath.transfer.errors import InvalidRequest, Overloaded
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import RegionDescriptor
from dualpath.transfer.slice_table import SliceTable
from hypothesis import given, settings
from hypothesis import strategies as st

CHUNK = 256 << 10
WINDOW = RegionDescriptor(1, 1, 0, 1 << 30)


def _grant(
    grant_id: int,
    chunks: int,
    lane: Lane = Lane.LOAD_PREFILL,
    deadline_at: float = 1e9,
    nbytes: int = CHUNK,
    lease_id: int = 7,
) -> Grant:
    tags = [(grant_id << 16) + chunk for chunk in range(chunks)]
    targets = SliceTable.contiguous([0] * chunks, [nbytes] * chunks)
    granted = GrantedChunks([0] * chunks, list(range(chunks)), tags, targets)
    return Grant(grant_id, lease_id, WINDOW, lane, deadline_at, granted)


def _queue(peer_chunks: int = 4, chunks: int = 64) -> DeliveryQueue:
    return DeliveryQueue(peer_inflight_bytes=peer_chunks * CHUNK, inflight_bytes=chunks * CHUNK)


def _ended(queue: DeliveryQueue, job: Delivery, failure: ChunkFailure | None = None) -> bool:
    indices = range(len(job.granted))
    return queue.finished(job, indices, {} if failure is None else dict.fromkeys(indices, failure))


def _picked(queue: DeliveryQueue, count: int, finish: bool = True) -> list[Delivery]:
    jobs = []
    for _ in range(count):
        job = queue.next(0.0)
        assert job is not None
        jobs.append(job)
        if finish:
            _ended(queue, job)
    return jobs


def test_attachments_take_turns_however_much_one_of_them_queues() -> None:
    queue = _queue()
    for peer, grants in (("greedy", 8), ("modest", 1)):
        queue.open(peer)
        for grant in range(grants):
            queue.add(peer, _grant(grant, 8))
    turns = Counter(job.peer for job in _picked(queue, 16))
    assert turns == {"greedy": 8, "modest": 8}


def test_leases_of_one_attachment_take_turns_and_grants_of_a_lease_keep_their_order() -> None:
    queue = _queue()
    queue.open("a")
    queue.add("a", _grant(1, 3))
    queue.add("a", _grant(2, 2, lease_id=8))
    queue.add("a", _grant(1 + 2, 3))
    order = [job.granted.tags[0] >> 16 for job in _picked(queue, 8)]
    assert order == [1, 2, 1, 2, 1, 3, 3, 3]


def test_loads_go_before_saves_which_keep_a_floor() -> None:
    queue = _queue()
    queue.open("a")
    queue.open("b")
    queue.add("a", _grant(1, 1000, Lane.LOAD_PREFILL))
    queue.add("b", _grant(1, 1000, Lane.SAVE))
    lanes = Counter(job.lane for job in _picked(queue, 1000))
    assert 40 <= lanes[Lane.SAVE] <= 60


def test_an_attachment_that_completes_nothing_is_bounded_and_delays_nobody() -> None:
    queue = _queue(peer_chunks=4)
    for peer in ("stalled", "other"):
        queue.open(peer)
        queue.add(peer, _grant(1, 100))
    held = 0
    for _ in range(100):
        job = queue.next(0.0)
        assert job is not None
        if job.peer == "stalled":
            held += 1
        else:
            _ended(queue, job)
        if queue.open_grants("other") and not queue.reports("other", 1):
            continue
        break
    assert held <= 4
    assert queue.inflight_bytes == held * CHUNK


def test_stalled_attachments_never_take_the_whole_bound() -> None:
    queue = _queue(peer_chunks=8, chunks=16)
    for index in range(40):
        queue.open(f"stalled{index}")
        queue.add(f"stalled{index}", _grant(1, 100))
    while queue.next(0.0) is not None:
        pass
    assert queue.inflight_bytes <= 16 * CHUNK
    shares = Counter[str]()
    queue2 = _queue(peer_chunks=8, chunks=16)
    for name in ("first", "second"):
        queue2.open(name)
        queue2.add(name, _grant(1, 100))
        while (job := queue2.next(0.0)) is not None:
            shares[job.peer] += 1
    assert shares["second"] >= 4


def test_a_cancelled_grant_reports_what_waited_and_ends_when_the_rest_has() -> None:
    queue = _queue()
    queue.open("a")
    queue.add("a", _grant(1, 4))
    job = queue.next(0.0)
    assert job is not None
    assert queue.cancel("a", 1)
    (report,) = queue.reports("a", 100)
    assert not report.done
    assert [failure for _, failure in report.failures] == [ChunkFailure.CANCELLED] * 3
    assert _ended(queue, job)
    (report,) = queue.reports("a", 100)
    assert report.done
    assert not report.failures
    assert not queue.cancel("a", 1)


def test_what_waits_past_its_deadline_fails_with_that_reason() -> None:
    queue = _queue()
    queue.open("a")
    queue.add("a", _grant(1, 2, deadline_at=5.0))
    assert queue.next_deadline() == 5.0
    assert queue.expire(4.9) == []
    assert queue.expire(5.0) == ["a"]
    (report,) = queue.reports("a", 100)
    assert report.done
    assert {failure for _, failure in report.failures} == {ChunkFailure.DEADLINE}
    assert queue.next(5.0) is None
    assert queue.pending_bytes == 0
    assert queue.next_deadline() is None


def test_a_closed_attachment_leaves_nothing_but_what_is_in_flight() -> None:
    queue = _queue()
    queue.open("a")
    queue.add("a", _grant(1, 4))
    job = queue.next(0.0)
    assert job is not None
    queue.close("a")
    assert queue.next(0.0) is None
    assert queue.pending_bytes == CHUNK
    assert not _ended(queue, job, ChunkFailure.PEER_LOST)
    assert queue.pending_bytes == 0
    queue.open("a")  # the name is free again


def test_an_id_in_use_and_too_many_grants_are_refused() -> None:
    queue = _queue()
    queue.open("a")
    with pytest.raises(InvalidRequest, match="'a'"):
        queue.open("a")
    for grant in range(GRANTS_MAX):
        queue.add("a", _grant(grant, 1))
    with pytest.raises(InvalidRequest, match="grant_id 3"):
        queue.add("a", _grant(3, 1))
    with pytest.raises(Overloaded, match=str(GRANTS_MAX)):
        queue.add("a", _grant(GRANTS_MAX, 1))


def test_reports_that_nobody_reads_are_bounded() -> None:
    queue = _queue()
    queue.open("a")
    for grant in range(REPORTS_MAX):
        queue.refuse("a", grant, [1], ChunkFailure.INVALID, "bad")
    with pytest.raises(Overloaded):
        queue.refuse("a", REPORTS_MAX, [1], ChunkFailure.INVALID, "bad")


def test_failed_chunks_that_nobody_reads_of_are_bounded() -> None:
    queue = _queue()
    queue.open("cancels")
    queue.open("sends rubbish")
    most = QUEUED_CHUNKS_MAX // GRANT_CHUNKS_MAX
    tags = list(range(GRANT_CHUNKS_MAX))
    for grant in range(most):
        queue.add("cancels", _grant(grant, GRANT_CHUNKS_MAX))
        queue.cancel("cancels", grant)
        queue.refuse("sends rubbish", grant, tags, ChunkFailure.INVALID, "bad")
    with pytest.raises(Overloaded, match=str(QUEUED_CHUNKS_MAX)):
        queue.add("cancels", _grant(most, 1))
    with pytest.raises(Overloaded, match=f"{QUEUED_CHUNKS_MAX + 1} failed chunks"):
        queue.refuse("sends rubbish", most, [1], ChunkFailure.INVALID, "bad")
    for peer in ("cancels", "sends rubbish"):
        assert sum(len(each.failures) for each in queue.reports(peer, 1 << 30)) == most * len(tags)
        queue.refuse(peer, most, [1], ChunkFailure.INVALID, "bad")


def test_deadlines_of_grants_that_are_over_do_not_pile_up_behind_one_that_waits() -> None:
    queue = _queue(peer_chunks=1)
    queue.open("slow")
    queue.open("quick")
    queue.add("slow", _grant(0, 2, deadline_at=1.0))
    stuck = queue.next(0.0)  # in flight for ever, and its second chunk waits behind it
    assert stuck is not None
    for grant in range(10_000):
        queue.add("quick", _grant(grant, 1, deadline_at=600.0))
        _picked(queue, 1)
        queue.reports("quick", 10)
    assert len(queue._deadlines) < 3_000
    assert queue.next_deadline() == 1.0


def _drawn(data: st.DataObject, grant_id: int, now: float) -> Grant:
    return _grant(
        grant_id,
        data.draw(st.integers(1, 6)),
        data.draw(st.sampled_from(list(Lane))),
        now + data.draw(st.floats(0.1, 20)),
        data.draw(st.sampled_from([CHUNK, CHUNK // 3])),
        data.draw(st.integers(1, 2)),
    )


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_chunk_lands_or_is_reported_once_and_the_bytes_add_up(  # noqa: PLR0912
    data: st.DataObject,
) -> None:
    queue = DeliveryQueue(
        peer_inflight_bytes=3 * CHUNK,
        inflight_bytes=8 * CHUNK,
        batch_bytes=data.draw(st.sampled_from([0, 2 * CHUNK, 8 * CHUNK])),
        turn_bytes=data.draw(st.sampled_from([0, 2 * CHUNK])),
    )
    names = ["a", "b", "c"]
    ends: Counter[tuple[str, int]] = Counter()
    granted: set[tuple[str, int]] = set()
    inflight: list[Delivery] = []
    now, next_id = 0.0, 1
    for name in names:
        queue.open(name)

    def collect() -> None:
        for name in names:
            for report in queue.reports(name, 5):
                for tag, _ in report.failures:
                    ends[name, tag] += 1

    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["add", "next", "finish", "cancel", "time", "collect"]))
        name = data.draw(st.sampled_from(names))
        if action == "add":
            grant = _drawn(data, next_id, now)
            queue.add(name, grant)
            assert grant.granted is not None
            granted.update((name, tag) for tag in grant.granted.tags)
            next_id += 1
        elif action == "next":
            job = queue.next(now)
            if job is not None:
                inflight.append(job)
        elif action == "finish" and inflight:
            job = inflight.pop(data.draw(st.integers(0, len(inflight) - 1)))
            failure = data.draw(st.sampled_from([None, ChunkFailure.REFUSED]))
            _ended(queue, job, failure)
            if failure is None:
                ends.update((job.peer, tag) for tag in job.granted.tags)
        elif action == "cancel":
            queue.cancel(name, data.draw(st.integers(1, 10)))
        elif action == "time":
            now += 1.0
            queue.expire(now)
        else:
            collect()
        by_peer = Counter[str]()
        for job in inflight:
            by_peer[job.peer] += job.nbytes
        assert queue.inflight_bytes == sum(by_peer.values()) <= 8 * CHUNK
        assert max(by_peer.values(), default=0) <= 3 * CHUNK
    while inflight or queue.pending_bytes:
        job = queue.next(now)
        if job is not None:
            inflight.append(job)
            continue
        job = inflight.pop()
        _ended(queue, job)
        ends.update((job.peer, tag) for tag in job.granted.tags)
    while any(queue.open_grants(name) for name in names):
        collect()
    assert set(ends) == granted
    assert set(ends.values()) <= {1}


def test_a_lone_grant_goes_in_batches_and_others_shorten_its_turns() -> None:
    queue = DeliveryQueue(
        peer_inflight_bytes=64 * CHUNK,
        inflight_bytes=64 * CHUNK,
        batch_bytes=8 * CHUNK,
        turn_bytes=2 * CHUNK,
    )
    for name in ("a", "b"):
        queue.open(name)
    queue.add("a", _grant(1, 20))
    sizes = [len(job.granted) for job in _picked(queue, 1)]
    queue.add("b", _grant(1, 4))
    sizes += [len(job.granted) for job in _picked(queue, 4)]
    sizes += [len(job.granted) for job in _picked(queue, 1)]
    assert sizes == [8, 2, 2, 2, 2, 8]
    queue.add("a", _grant(2, 4, lease_id=1))
    queue.add("a", _grant(3, 4, lease_id=2))
    assert [(len(j.granted), j.granted.tags[0] >> 16) for j in _picked(queue, 3)] == [
        (2, 2),
        (2, 3),
        (2, 2),
    ]


def test_a_short_delivery_does_not_cut_those_after_it_short() -> None:
    queue = DeliveryQueue(
        peer_inflight_bytes=8 * CHUNK, inflight_bytes=64 * CHUNK, batch_bytes=4 * CHUNK
    )
    queue.open("a")
    queue.add("a", _grant(1, 5))
    queue.add("a", _grant(2, 11))
    whole, short = _picked(queue, 2, finish=False)
    assert [len(job.granted) for job in (whole, short)] == [4, 1]
    assert queue.next(0.0) is None, "room for 3 of a batch of 4, while 5 are on their way"
    _ended(queue, short)
    (second,) = _picked(queue, 1, finish=False)
    assert len(second.granted) == 4
    _ended(queue, whole)
    (third,) = _picked(queue, 1, finish=False)
    assert len(third.granted) == 4
    _ended(queue, second)
    assert [len(job.granted) for job in _picked(queue, 1)] == [3], "the rest, though it is less"
    _ended(queue, third)
    assert queue.pending_bytes == 0


def test_a_batch_has_consecutive_tags_and_keeps_within_the_bounds() -> None:
    queue = DeliveryQueue(
        peer_inflight_bytes=5 * CHUNK, inflight_bytes=64 * CHUNK, batch_bytes=64 * CHUNK
    )
    queue.open("a")
    targets = SliceTable.contiguous([0] * 9, [CHUNK] * 9)
    tags = [1, 2, 3, 7, 8, 9, 10, 11, 12]
    chunks = GrantedChunks([0] * 9, list(range(9)), tags, targets)
    queue.add("a", Grant(1, 7, WINDOW, Lane.LOAD_PREFILL, 1e9, chunks))
    first, second = _picked(queue, 2, finish=False)
    assert list(first.granted.tags) == [1, 2, 3]
    assert list(second.granted.tags) == [7, 8]
    assert queue.next(0.0) is None
    queue.finished(first, [0, 2], {2: ChunkFailure.CORRUPT}, "bad")
    (report,) = queue.reports("a", 10)
    assert report.failures == ((3, ChunkFailure.CORRUPT),)
    assert queue.inflight_bytes == 3 * CHUNK
    _ended(queue, second)
    queue.finished(first, [1])
    (third,) = _picked(queue, 1, finish=False)
    assert list(third.granted.tags) == [9, 10, 11, 12]
    _ended(queue, third)
    assert queue.reports("a", 10)[0].done
    assert queue.pending_bytes == 0
