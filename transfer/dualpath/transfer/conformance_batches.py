"""Conformance checks about batches: each part for itself, one completion for all."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

import xxhash
from dualpath.transfer.conformance_scene import (
    READER,
    WAIT_S,
    Gate,
    MakePair,
    Scene,
    expect,
    gather,
    scene_of,
)
from dualpath.transfer.errors import InvalidRequest, PeerLost
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import (
    BATCH_WRITES_MAX,
    Arrival,
    BatchCompletion,
    WriteBatch,
    WriteStatus,
)

KIB = 1 << 10
MIB = 1 << 20


class _Ends:
    """Completions of batches as they come."""

    def __init__(self) -> None:
        self._came = threading.Semaphore(0)
        self.told: list[BatchCompletion] = []

    def heard(self, completion: BatchCompletion) -> None:
        self.told.append(completion)
        self._came.release()

    def wait(self, count: int = 1) -> BatchCompletion:
        for _ in range(count):
            assert self._came.acquire(timeout=WAIT_S), f"completions so far: {self.told}"
        return self.told[-1]


def _send(
    scene: Scene,
    source: Region,
    window: RegionDescriptor,
    tables: tuple[SliceTable, SliceTable],
    ends: _Ends,
    *,
    first_tag: int = 10,
    deadline_s: float = WAIT_S,
) -> None:
    batch = WriteBatch(source, *_ordered(window, tables), Lane.LOAD_PREFILL, first_tag, deadline_s)
    scene.writer.write_batch(READER, batch, ends.heard)


def _ordered(
    window: RegionDescriptor, tables: tuple[SliceTable, SliceTable]
) -> tuple[SliceTable, RegionDescriptor, SliceTable]:
    return tables[0], window, tables[1]


def a_batch_lands_part_by_part(make_pair: MakePair) -> None:
    """Each part in its own slices, told by its own tag, before the one completion."""
    sizes = [300 * KIB + 5, 7, 70_001, 256 * KIB, 1]
    from_ = SliceTable.contiguous([400 * KIB * i for i in range(5)], sizes)
    shapes = [
        SliceTable.contiguous([11 + 320 * KIB * i for i in range(5)], sizes),
        SliceTable(5_000, 90, 4_096, [500_000 * i for i in range(5)], [3, 4_095, 0, 9, 1], sizes),
    ]
    for to in shapes:
        with scene_of(make_pair) as scene:
            source, target = scene.source(2 * MIB), Region.anonymous(3 * MIB)
            window, ends = scene.window(target), _Ends()
            scene.reader.arm_table(window, 10, to)
            _send(scene, source, window, (from_, to), ends)
            done = ends.wait()
            assert done.status is WriteStatus.DONE, done
            assert not done.refused, done
            assert done.first_tag == 10
            arrivals = scene.reader_heard.arrivals
            assert [each.tag for each in arrivals] == [10, 11, 12, 13, 14]
            assert [each.slices for each in arrivals] == [to.part(i) for i in range(5)]
            expected = bytearray(target.nbytes)
            for index in range(5):
                data, done_bytes = gather(source, from_.part(index)), 0
                for at, nbytes in to.part(index).pieces():
                    expected[at : at + nbytes] = data[done_bytes : done_bytes + nbytes]
                    done_bytes += nbytes
            assert target.view == expected, "bytes went elsewhere"


def parts_of_a_batch_are_refused_one_by_one(make_pair: MakePair) -> None:
    """What is not armed, or otherwise, or fenced, does not keep the others from landing."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(MIB), Region.anonymous(MIB)
        window, ends = scene.window(target), _Ends()
        table = SliceTable.contiguous([64 * KIB * i for i in range(6)], [64 * KIB] * 6)
        scene.reader.arm_table(window, 10, table.parts(0, 2))
        scene.reader.arm(window, [(13, Slices.contiguous(900 * KIB, 64 * KIB))])
        scene.reader.arm_table(window, 14, table.parts(4, 6))
        scene.reader.disarm(window, [15])
        _send(scene, source, window, (table, table), ends)
        done = ends.wait()
        assert done.status is WriteStatus.DONE, done
        assert done.refused == {12: "not_armed", 13: "other_slices", 15: "not_armed"}, done
        assert [each.tag for each in scene.reader_heard.arrivals] == [10, 11, 14]
        expected = bytearray(MIB)
        for index in (0, 1, 4):
            part = slice(index * 64 * KIB, (index + 1) * 64 * KIB)
            expected[part] = source.view[part]
        assert target.view == expected
        _send(scene, source, window, (table, table), ends, first_tag=100)
        refused = ends.wait().refused
        assert refused == dict.fromkeys(range(100, 106), "not_armed"), refused


def a_fence_stops_its_parts_of_a_batch_only(make_pair: MakePair) -> None:
    """Also while their bytes are arriving: the rest of the batch lands."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(16 * MIB), Region.anonymous(16 * MIB)
        gate, ends = Gate(), _Ends()
        window = scene.gated_window(target, gate)
        table = SliceTable.contiguous([MIB * i for i in range(16)], [MIB] * 16)
        scene.reader.arm_table(window, 10, table)
        _send(scene, source, window, (table, table), ends)
        gate.wait_reached()
        fenced = scene.reader.disarm(window, [12, 25])
        before = bytes(target.view[2 * MIB : 3 * MIB]) + bytes(target.view[15 * MIB :])
        gate.open()
        done = ends.wait()
        after = bytes(target.view[2 * MIB : 3 * MIB]) + bytes(target.view[15 * MIB :])
        assert after == before, "bytes landed after disarm"
        assert 25 in fenced
        assert set(done.refused) == fenced, done
        for index in (0, 1, *range(3, 15)):
            part = slice(index * MIB, (index + 1) * MIB)
            assert target.view[part] == source.view[part], f"part {index} differs"


def parts_may_be_rejected_on_arrival(make_pair: MakePair) -> None:
    """False from on_arrival refuses that part alone."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(256 * KIB), Region.anonymous(256 * KIB)
        window = scene.reader.expose(target, 0, target.nbytes, lambda arrival: arrival.tag != 11)
        table = SliceTable.contiguous([64 * KIB * i for i in range(4)], [64 * KIB] * 4)
        ends = _Ends()
        scene.reader.arm_table(window, 10, table)
        _send(scene, source, window, (table, table), ends)
        assert ends.wait().refused == {11: "rejected"}


def what_a_transport_has_hashed_is_told_once_with_its_digest(make_pair: MakePair) -> None:
    """By `on_hashed` or `on_arrival`, never by both; False refuses that part alone."""
    sizes = [256 * KIB, 300 * KIB + 5, 100, 256 * KIB, 5_000]
    table = SliceTable.contiguous([400 * KIB * i for i in range(5)], sizes)
    with scene_of(make_pair) as scene:
        source, target = scene.source(2 * MIB), Region.anonymous(2 * MIB)
        told: list[int] = []

        def on_arrival(arrival: Arrival) -> bool:
            told.append(arrival.tag)
            return arrival.tag != 13

        def on_hashed(tags: Sequence[int], digests: Sequence[int]) -> Sequence[bool]:
            for tag, digest in zip(tags, digests, strict=True):
                data = gather(source, table.part((tag - 10) % 10))
                assert digest == xxhash.xxh3_64_intdigest(data), f"digest of tag {tag}"
            told.extend(tags)
            return [tag != 13 for tag in tags]

        window = scene.reader.expose(target, 0, 2 * MIB, on_arrival, on_hashed=on_hashed)
        ends = _Ends()
        scene.reader.arm_table(window, 10, table)
        _send(scene, source, window, (table, table), ends)
        assert ends.wait().refused == {13: "rejected"}
        scene.reader.arm(window, [(20, table.part(0))])
        scene.write(source, window, table.part(0), 20)
        assert scene.finish(1) == [WriteStatus.DONE]
        assert sorted(told) == [10, 11, 12, 13, 14, 20], told
        assert gather(target, table.part(1)) == gather(source, table.part(1))


def a_batch_completes_once_however_it_ends(make_pair: MakePair) -> None:
    """Lost, expired or closed, it is told once and for all of its parts."""
    table = SliceTable.contiguous([MIB * i for i in range(4)], [MIB] * 4)
    for status in (WriteStatus.LOST, WriteStatus.EXPIRED, WriteStatus.CLOSED):
        with scene_of(make_pair) as scene:
            source, target = scene.source(4 * MIB), Region.anonymous(4 * MIB)
            gate, ends = Gate(), _Ends()
            window = scene.gated_window(target, gate)
            scene.reader.arm_table(window, 10, table)
            deadline_s = 0.05 if status is WriteStatus.EXPIRED else WAIT_S
            _send(scene, source, window, (table, table), ends, deadline_s=deadline_s)
            gate.wait_reached()
            if status is WriteStatus.LOST:
                scene.writer.disconnect(READER)
            elif status is WriteStatus.CLOSED:
                scene.writer.close()
            done = ends.wait()
            gate.open()
            assert done.status is status, done
            assert len(ends.told) == 1


def bad_batches_name_the_value(make_pair: MakePair) -> None:
    """Nothing of a batch that is refused by the call is queued."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(64 * KIB), Region.anonymous(64 * KIB)
        window, ends = scene.window(target), _Ends()

        def extents(*offsets: int, nbytes: int = KIB) -> SliceTable:
            return SliceTable.contiguous(offsets, [nbytes] * len(offsets))

        good, send = extents(0, KIB), partial(_send, scene, source, window, ends=ends)
        expect(InvalidRequest, lambda: send((good, extents(0))))
        expect(InvalidRequest, lambda: send((good, extents(0, KIB, nbytes=512))))
        expect(InvalidRequest, lambda: send((good, extents(0, 64 * KIB))))
        expect(InvalidRequest, lambda: send((extents(0, 64 * KIB), good)))
        expect(InvalidRequest, lambda: send((good, good), first_tag=(1 << 64) - 1))
        expect(InvalidRequest, lambda: send((good, good), deadline_s=float("inf")))
        many = extents(*[0] * (BATCH_WRITES_MAX + 1), nbytes=1)
        expect(InvalidRequest, lambda: send((many, many)))
        expect(InvalidRequest, lambda: scene.reader.arm_table(window, 1, extents(64 * KIB)))
        scene.reader.arm_table(window, 1, good)
        expect(InvalidRequest, lambda: scene.reader.arm_table(window, 2, good))
        assert scene.reader.disarm(window, range(1, 5)) == {1, 2}
        batch = WriteBatch(source, good, window, good, Lane.SAVE, 1, WAIT_S)
        expect(PeerLost, lambda: scene.writer.write_batch("nobody", batch, ends.heard))
        assert not ends.told


CHECKS = (
    a_batch_lands_part_by_part,
    parts_of_a_batch_are_refused_one_by_one,
    a_fence_stops_its_parts_of_a_batch_only,
    parts_may_be_rejected_on_arrival,
    what_a_transport_has_hashed_is_told_once_with_its_digest,
    a_batch_completes_once_however_it_ends,
    bad_batches_name_the_value,
)
