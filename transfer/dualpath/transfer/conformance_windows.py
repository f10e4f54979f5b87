"""Conformance checks about windows: what lands, what is refused, what a fence stops."""

from __future__ import annotations

from dataclasses import replace

from dualpath.transfer.conformance_scene import (
    READER,
    WAIT_S,
    WRITER,
    MakePair,
    expect,
    extents,
    gather,
    scene_of,
    wait_for_byte,
)
from dualpath.transfer.errors import (
    InvalidRequest,
)
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import Region
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import Arrival, Completion, Write, WriteStatus

KIB = 1 << 10
MIB = 1 << 20

DONE, REFUSED = WriteStatus.DONE, WriteStatus.REFUSED


# Landing.


def a_write_lands_in_its_slices_only(make_pair: MakePair) -> None:
    """The bytes are in place on arrival, the rest of the region is untouched."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(256 * KIB), Region.anonymous(256 * KIB)
        seen: list[bytes] = []

        def on_arrival(arrival: Arrival) -> bool:
            start = arrival.slices.start
            seen.append(bytes(target.view[start : start + arrival.slices.nbytes]))
            assert not scene.writer_heard.completions, "DONE came before the arrival"
            return True

        window = scene.reader.expose(target, 0, target.nbytes, on_arrival)
        scene.send(source, window, Slices.contiguous(1000, 70_001))
        assert scene.finish(1) == [DONE]
        assert seen == [bytes(source.view[1000:71_001])]
        assert target.view[:1000] == bytes(1000)
        assert target.view[71_001:] == bytes(target.nbytes - 71_001)


def strided_ranges_land_byte_for_byte(make_pair: MakePair) -> None:
    """Source and target may be cut differently, and begin inside a slice."""
    shapes = [
        (Slices.strided(100, 50_000, 20, 40_960), Slices.contiguous(7, 20 * 40_960)),
        (Slices.contiguous(0, 600_000), Slices.strided(3, 1_200, 1_000, 600)),
        (Slices.strided(1, 9_000, 100, 8_191), Slices.strided(5, 20_000, 65, 13_000)),
        (Slices.strided(0, 3, 5_000, 1), Slices.contiguous(0, 5_000)),
    ]
    with scene_of(make_pair) as scene:
        source, target = scene.source(2 * MIB), Region.anonymous(2 * MIB)
        window = scene.window(target)
        for count, (whole_from, whole_to) in enumerate(shapes, start=1):
            nbytes = min(whole_from.nbytes, whole_to.nbytes) - 11
            from_, to = whole_from.part(11, nbytes), whole_to.part(5, nbytes)
            tag = scene.tag()
            scene.reader.arm(window, [(tag, to)])
            scene.write(source, window, to, tag, source_slices=from_)
            assert scene.finish(count)[-1] is DONE, scene.writer_heard
            assert gather(target, to) == gather(source, from_), f"shape {count} differs"


def large_and_small_writes_all_land(make_pair: MakePair) -> None:
    """From a single byte to several MiB, many at a time."""
    sizes = [1, 2, 255, 256, 257, 4096, 65_535, 65_536, 1 << 20, (3 << 20) + 5] * 3
    with scene_of(make_pair) as scene:
        total = sum(sizes)
        source, target = scene.source(total), Region.anonymous(total)
        window = scene.window(target)
        offset = 0
        for size in sizes:
            scene.send(source, window, Slices.contiguous(offset, size))
            offset += size
        assert scene.finish(len(sizes)) == [DONE] * len(sizes)
        assert len(scene.reader_heard.wait_arrivals(len(sizes))) == len(sizes)
        assert target.view == source.view


def either_side_may_write(make_pair: MakePair) -> None:
    """A connection is full duplex."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(8 * MIB), Region.anonymous(8 * MIB)
        back_source, back_target = scene.source(8 * MIB), Region.anonymous(8 * MIB)
        window = scene.window(target)
        back = scene.writer.expose(back_target, 0, 8 * MIB, scene.writer_heard.on_arrival)
        for slices in extents(16, 512 * KIB):
            tag = scene.send(source, window, slices)
            scene.writer.arm(back, [(tag, slices)])
            write = Write(back_source, slices, back, slices, Lane.SAVE, tag, WAIT_S)
            scene.reader.write(WRITER, write, scene.reader_heard.on_completion)
        assert scene.finish(16) == [DONE] * 16
        assert {each.status for each in scene.reader_heard.wait_completions(16)} == {DONE}
        assert target.view == source.view
        assert back_target.view == back_source.view


def a_landed_tag_may_be_armed_again(make_pair: MakePair) -> None:
    """A tag is free once its write has landed."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(4 * KIB), Region.anonymous(4 * KIB)
        window, slices = scene.window(target), Slices.contiguous(0, 4 * KIB)
        for count in (1, 2):
            scene.reader.arm(window, [(7, slices)])
            scene.write(source, window, slices, 7)
            assert scene.finish(count) == [DONE] * count


# Refusals.


def a_second_write_of_a_tag_is_refused(make_pair: MakePair) -> None:
    """Each armed tag is accepted at most once."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(8 * KIB), Region.anonymous(8 * KIB)
        window, slices = scene.window(target), Slices.contiguous(0, 4 * KIB)
        tag = scene.send(source, window, slices)
        assert scene.finish(1) == [DONE]
        other = Slices.contiguous(4 * KIB, 4 * KIB)
        scene.write(source, window, slices, tag, source_slices=other)
        assert scene.writer_heard.wait_completions(2)[1].status is REFUSED
        assert target.view[: 4 * KIB] == source.view[: 4 * KIB]
        assert len(scene.reader_heard.arrivals) == 1


def what_was_not_armed_is_refused(make_pair: MakePair) -> None:
    """Unknown tags, other slices, forged keys, old generations: refused, nothing touched."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(64 * KIB), Region.anonymous(64 * KIB)
        window, slices = scene.window(target), Slices.contiguous(0, 4 * KIB)
        scene.reader.arm(window, [(1, slices), (2, slices), (3, slices)])
        scene.write(source, window, slices, 99)
        scene.write(source, window, Slices.contiguous(4, 4 * KIB), 1)
        scene.write(source, window, Slices.contiguous(0, 4 * KIB - 1), 1)
        scene.write(source, replace(window, key=window.key ^ 1), slices, 2)
        scene.write(source, replace(window, generation=window.generation + 1), slices, 3)
        outside = replace(window, nbytes=1 << 30)
        scene.write(source, outside, Slices.contiguous(1 << 20, 4096), 1, source_slices=slices)
        assert scene.finish(6) == [REFUSED] * 6
        assert all(each.detail for each in scene.writer_heard.completions)
        assert target.view == bytes(64 * KIB)
        assert not scene.reader_heard.arrivals
        scene.write(source, window, slices, 1)
        assert DONE in scene.finish(7), "a refused write used up its tag"


def a_rejected_arrival_is_refused(make_pair: MakePair) -> None:
    """False, or an exception, from on_arrival is answered REFUSED, detail `rejected`."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(4 * KIB), Region.anonymous(4 * KIB)

        def raising(arrival: Arrival) -> bool:
            raise RuntimeError("raised on purpose by a conformance check")

        for count, on_arrival in enumerate((lambda arrival: False, raising), start=1):
            window = scene.reader.expose(target, 0, 4 * KIB, on_arrival)
            scene.send(source, window, Slices.contiguous(0, 4 * KIB))
            completion = scene.writer_heard.wait_completions(count)[-1]
            assert completion.status is REFUSED, completion
            assert completion.detail == "rejected", completion
        assert not scene.writer_heard.losses


# Fences.


def a_revoked_window_takes_nothing(make_pair: MakePair) -> None:
    """Also not for a write submitted before; revoking twice is allowed."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(8 * KIB), Region.anonymous(8 * KIB)
        window, slices = scene.window(target), Slices.contiguous(0, 4 * KIB)
        scene.reader.arm(window, [(1, slices)])
        scene.reader.revoke(window)
        scene.reader.revoke(window)
        scene.write(source, window, slices, 1)
        assert scene.finish(1) == [REFUSED]
        assert target.view == bytes(8 * KIB)
        expect(InvalidRequest, lambda: scene.reader.arm(window, [(2, slices)]))
        again = scene.window(target)
        assert again.key != window.key, "a key was used twice"
        assert again.generation > window.generation


def revoke_fences_what_is_arriving(make_pair: MakePair) -> None:
    """When it has returned the region does not change, whatever is on its way."""
    for moment in (0, 1, 4, 7):
        with scene_of(make_pair) as scene:
            source, target = scene.source(12 * MIB), Region.anonymous(12 * MIB)
            window = scene.window(target)
            for slices in extents(4, 3 * MIB):
                scene.send(source, window, slices)
            if moment:
                wait_for_byte(target, moment * MIB)
            scene.reader.revoke(window)
            before = bytes(target.view)
            statuses = scene.finish(4)
            assert target.view == before, f"bytes landed after revoke (moment {moment})"
            landed = len(scene.reader_heard.arrivals)
            assert statuses.count(DONE) <= landed, scene.writer_heard


def disarm_fences_its_tags_only(make_pair: MakePair) -> None:
    """It returns those that had not landed; the others go on."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(16 * MIB), Region.anonymous(16 * MIB)
        window = scene.window(target)
        tags = [scene.send(source, window, slices) for slices in extents(8, 2 * MIB)]
        scene.reader_heard.wait_arrivals(1)
        fenced = scene.reader.disarm(window, tags[4:])
        before = bytes(target.view[8 * MIB :])
        statuses = dict(zip(tags, scene.finish(8), strict=True))
        assert target.view[8 * MIB :] == before, "bytes landed after disarm"
        arrived = {arrival.tag for arrival in scene.reader_heard.arrivals}
        assert fenced == set(tags[4:]) - arrived
        assert all(statuses[tag] is DONE for tag in tags[:4]), statuses
        assert all(statuses[tag] is REFUSED for tag in fenced), statuses
        assert scene.reader.disarm(window, tags) == frozenset()
        scene.reader.revoke(window)
        assert scene.reader.disarm(window, tags) == frozenset()


def fences_may_be_set_inside_callbacks(make_pair: MakePair) -> None:
    """Every method may be called from any thread, also from the transport's own."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(64 * KIB), Region.anonymous(64 * KIB)

        def on_arrival(arrival: Arrival) -> bool:
            scene.reader.disarm(window, [arrival.tag, 2])
            scene.reader.revoke(window)
            return scene.reader_heard.on_arrival(arrival)

        def on_completion(completion: Completion) -> None:
            write = Write(source, slices, window, slices, Lane.SAVE, 2, WAIT_S)
            scene.writer.write(READER, write, scene.writer_heard.on_completion)
            scene.writer_heard.on_completion(completion)
            scene.writer.traffic()

        slices = Slices.contiguous(0, 64 * KIB)
        window = scene.reader.expose(target, 0, 64 * KIB, on_arrival)
        scene.reader.arm(window, [(1, slices), (2, slices)])
        write = Write(source, slices, window, slices, Lane.LOAD_DECODE, 1, WAIT_S)
        scene.writer.write(READER, write, on_completion)
        assert scene.finish(2) == [DONE, REFUSED]


def bytes_of_this_process_land_by_the_same_rules(make_pair: MakePair) -> None:
    """`place` scatters under an armed tag, once, and not after a fence."""
    with scene_of(make_pair) as scene:
        target = Region.anonymous(64 * KIB)
        source = memoryview(bytes(range(256)) * 32)
        slices = Slices.strided(KIB, 16 * KIB, 2, 4 * KIB)
        window = scene.reader.expose(target, 0, 64 * KIB, scene.reader_heard.on_arrival)
        scene.reader.arm(window, [(tag, slices) for tag in (1, 2, 3)])
        assert scene.reader.place(window, 4, slices, source) == "not_armed"
        assert scene.reader.place(window, 1, slices.part(0, KIB), source) == "other_slices"
        assert scene.reader.place(window, 1, slices, source) == ""
        assert scene.reader.place(window, 1, slices, source) == "not_armed"
        assert [arrival.tag for arrival in scene.reader_heard.wait_arrivals(1)] == [1]
        view = target.view
        assert view[KIB : 5 * KIB] == source[: 4 * KIB]
        assert view[17 * KIB : 21 * KIB] == source[4 * KIB :]
        assert not any(view[5 * KIB : 17 * KIB])
        scene.reader.disarm(window, [2])
        assert scene.reader.place(window, 2, slices, source) == "not_armed"
        scene.reader.revoke(window)
        assert scene.reader.place(window, 3, slices, source) == "no_window"


CHECKS = (
    a_write_lands_in_its_slices_only,
    strided_ranges_land_byte_for_byte,
    large_and_small_writes_all_land,
    either_side_may_write,
    a_landed_tag_may_be_armed_again,
    a_second_write_of_a_tag_is_refused,
    what_was_not_armed_is_refused,
    a_rejected_arrival_is_refused,
    a_revoked_window_takes_nothing,
    revoke_fences_what_is_arriving,
    disarm_fences_its_tags_only,
    fences_may_be_set_inside_callbacks,
    bytes_of_this_process_land_by_the_same_rules,
)
