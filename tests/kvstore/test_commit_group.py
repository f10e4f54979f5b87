"""How a queue of blocks is cut into groups that one flush makes durable."""

from __future__ import annotations

from collections import deque

from dualpath.kvstore.commit_group import (
    GROUP_BYTES_MAX,
    GROUP_JOBS_MAX,
    HELD_BYTES,
    WORTH_BYTES,
    CommitGroup,
)
from dualpath.kvstore.commit_job import CommitJob
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.record import BlockRecord
from hypothesis import given
from hypothesis import strategies as st

MIB = 1 << 20
SPACE = Namespace("m", KVLayout(1, 1, 4096, "u8"))


def job(nbytes: int = MIB, *, ends: bool = False, more: bool = False) -> CommitJob:
    record = BlockRecord(SPACE.id, b"h" * 16, b"", 4096, 0, 0, 1, (7,), "", 0.0)
    return CommitJob(0, -1, record, SPACE, 0, nbytes, ends_put=ends, has_more=more)


def put(mib: int) -> list[CommitJob]:
    """Somebody puts so many blocks and waits."""
    return [job(more=True) for _ in range(mib - 1)] + [job(ends=True)]


def groups(queue: deque[CommitJob]) -> list[CommitGroup]:
    found = []
    while queue:
        group = CommitGroup()
        group.take(queue)
        found.append(group)
    return found


def test_two_who_put_much_get_groups_of_their_own() -> None:
    assert [len(group.jobs) for group in groups(deque(put(32) + put(32)))] == [32, 32]


def test_many_who_put_little_share_a_group() -> None:
    queue = deque(each for _ in range(40) for each in put(1))
    sizes = [group.nbytes for group in groups(queue)]
    assert sizes[0] == WORTH_BYTES
    assert sum(sizes) == 40 * MIB


def test_a_group_waits_for_the_rest_of_a_put_only_while_it_is_small() -> None:
    group, queue = CommitGroup(), deque(put(64))
    rest = [queue.pop() for _ in range(60)]
    assert group.take(queue) == 4
    assert group.expects_more
    queue.extend(reversed(rest[-28:]))
    assert group.take(queue) == 32
    assert group.nbytes == HELD_BYTES
    assert (group.expects_more, group.is_closed) == (False, False)


def test_a_put_that_has_ended_is_not_waited_for() -> None:
    group = CommitGroup()
    group.take(deque(put(3)))
    assert not group.expects_more
    assert not group.is_closed


def test_what_nobody_waits_for_goes_in_large_groups() -> None:
    sizes = [group.nbytes for group in groups(deque(job() for _ in range(300)))]
    assert sizes == [GROUP_BYTES_MAX, GROUP_BYTES_MAX, 44 * MIB]
    counts = [len(group.jobs) for group in groups(deque(job(4096) for _ in range(1500)))]
    assert counts == [GROUP_JOBS_MAX, 476]


@given(
    st.lists(
        st.tuples(st.integers(1, 40 * MIB), st.sampled_from(["", "ends", "more"])), max_size=200
    )
)
def test_every_job_is_in_one_group_in_its_order(jobs: list[tuple[int, str]]) -> None:
    made = [job(size, ends=kind == "ends", more=kind == "more") for size, kind in jobs]
    found = groups(deque(made))
    assert [id(each) for group in found for each in group.jobs] == [id(each) for each in made]
    for group in found:
        largest = max(each.nbytes for each in group.jobs)
        assert group.nbytes < GROUP_BYTES_MAX + largest
        assert group.nbytes == sum(each.nbytes for each in group.jobs)
        assert group.is_closed or group is found[-1]
