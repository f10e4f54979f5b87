"""The transport port's contract as checks that any implementation can run against itself.

`check_transport(make_pair)` runs all of `CHECKS`, each on a fresh pair; a test suite may run
them one by one by name. A check raises AssertionError, naming what was heard instead. Nothing
here depends on time, except that a wait over 20 seconds fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from dualpath.transfer.conformance_scene import (
    READER,
    WAIT_S,
    WRITER,
    Gate,
    MakePair,
    Scene,
    TransportPair,
    extents,
    pattern,
    scene_of,
)
from dualpath.transfer.errors import (
    DualPathError,
    InvalidRequest,
    Overloaded,
    PeerLost,
    PermissionDenied,
    Unavailable,
)
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import Region
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import WRITE_BYTES_MAX, Arrival, Completion, Write, WriteStatus

__all__ = ["CHECKS", "MakePair", "TransportPair", "check_transport"]

KIB = 1 << 10
MIB = 1 << 20

Check = Callable[[MakePair], None]

DONE, REFUSED = WriteStatus.DONE, WriteStatus.REFUSED
LOST, EXPIRED, CLOSED = WriteStatus.LOST, WriteStatus.EXPIRED, WriteStatus.CLOSED


def check_transport(make_pair: MakePair) -> None:
    """Run every check; the first that fails is named in its AssertionError."""
    for name, check in CHECKS.items():
        try:
            check(make_pair)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


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


# Order, deadlines, bounds.


def urgent_lanes_overtake(make_pair: MakePair) -> None:
    """A lane with a lower value goes before what waits on another."""
    with scene_of(make_pair) as scene:
        count, nbytes = 15, 1 * MIB
        arrivals = queued_behind_a_gate(
            scene, [Lane.BACKGROUND] * count + [Lane.LOAD_PREFILL], nbytes
        )
        assert arrivals.index(count + 1) < count, f"the load came last: {arrivals}"


def saves_keep_a_floor(make_pair: MakePair) -> None:
    """However many loads wait, saves get their share."""
    with scene_of(make_pair) as scene:
        lanes = [Lane.LOAD_PREFILL] * 60 + [Lane.SAVE]
        arrivals = queued_behind_a_gate(scene, lanes, 256 * KIB)
        assert arrivals.index(61) < 60, f"the save came last: {arrivals}"


def a_late_write_expires_once(make_pair: MakePair) -> None:
    """With the peer stalled a write expires in time; its source may change from then on."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(4 * MIB), Region.anonymous(4 * MIB)
        gate = Gate()
        window = scene.gated_window(target, gate)
        scene.send(source, window, Slices.contiguous(0, 4096))
        gate.wait_reached()
        tag, slices = scene.tag(), Slices.contiguous(4096, 3 * MIB)
        scene.reader.arm(window, [(tag, slices)])
        scene.write(source, window, slices, tag, deadline_s=0.05)
        scene.writer_heard.wait(
            "EXPIRED",
            lambda: any(each.status is EXPIRED for each in scene.writer_heard.completions),
        )
        source.view[4096:] = bytes(4 * MIB - 4096)
        gate.open()
        scene.writer_heard.wait_completions(2)
        later = scene.send(source, window, Slices.contiguous(0, 4096))
        statuses = scene.finish(3)
        assert statuses == [DONE, EXPIRED, DONE], scene.writer_heard
        if tag in {arrival.tag for arrival in scene.reader_heard.arrivals}:
            assert gather(target, slices) == pattern(4 * MIB)[4096 : 4096 + 3 * MIB]
        assert later in {arrival.tag for arrival in scene.reader_heard.arrivals}


def a_deadline_in_the_past_expires(make_pair: MakePair) -> None:
    """It is no error, and no byte goes."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(4 * KIB), Region.anonymous(4 * KIB)
        window, slices = scene.window(target), Slices.contiguous(0, 4 * KIB)
        scene.reader.arm(window, [(1, slices)])
        scene.write(source, window, slices, 1, deadline_s=-1.0)
        assert scene.finish(1) == [EXPIRED]


def a_full_queue_raises_overloaded(make_pair: MakePair) -> None:
    """`write` never blocks; what it accepted still completes."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(1 * MIB), Region.anonymous(1 * MIB)
        gate = Gate()
        window, slices = scene.gated_window(target, gate), Slices.contiguous(0, 1 * MIB)
        most = scene.pair.queue_bytes_max // MIB
        accepted, retry_after_s = 0, 0.0
        tags = list(range(1, most + 2))
        scene.reader.arm(window, [(tag, slices) for tag in tags])
        scene.write(source, window, slices, tags[0])
        gate.wait_reached()
        try:
            for tag in tags[1:]:
                scene.write(source, window, slices, tag)
                accepted += 1
        except Overloaded as error:
            retry_after_s = error.retry_after_s
        assert retry_after_s > 0, "Overloaded was not raised or does not say when to retry"
        assert accepted == most - 1, f"{accepted} of {most - 1} MiB were accepted"
        queued = [each.queued_bytes for each in scene.writer.traffic()]
        assert queued == [most * MIB], queued
        gate.open()
        assert scene.finish(most) == [DONE] * most


def bad_requests_name_the_value(make_pair: MakePair) -> None:
    """Bounds, sizes, tags, read-only memory: InvalidRequest, at once, and nothing happens."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(8 * KIB), Region.anonymous(8 * KIB)
        window, reader = scene.window(target), scene.reader
        good = Slices.contiguous(0, 4 * KIB)

        def write(slices: Slices, **changes: Slices) -> None:
            scene.write(source, window, slices, 1, **changes)  # type: ignore[arg-type]

        expect(InvalidRequest, lambda: write(good, source_slices=Slices.contiguous(0, 1)))
        expect(
            InvalidRequest, lambda: write(good, source_slices=Slices.contiguous(8 * KIB, 4 * KIB))
        )
        expect(InvalidRequest, lambda: write(Slices.contiguous(0, 0)))
        expect(InvalidRequest, lambda: write(Slices.contiguous(8 * KIB, 1)))
        expect(InvalidRequest, lambda: write(Slices.contiguous(0, WRITE_BYTES_MAX + 1)))
        expect(InvalidRequest, lambda: scene.write(source, window, good, -1))
        expect(InvalidRequest, lambda: scene.write(source, window, good, 1 << 64))
        for offset, nbytes in ((0, 8 * KIB + 1), (-1, 4), (0, 0), (8 * KIB, 1)):
            expect(InvalidRequest, partial(reader.expose, target, offset, nbytes, accept))
        frozen = Region(memoryview(bytes(4096)))
        expect(InvalidRequest, lambda: reader.expose(frozen, 0, 4096, accept))
        inner = reader.expose(target, 1024, 1024, accept)
        for slices in (Slices.contiguous(1023, 2), Slices.contiguous(2047, 2)):
            expect(InvalidRequest, partial(reader.arm, inner, [(1, slices)]))
        reader.arm(window, [(5, good)])
        expect(InvalidRequest, lambda: reader.arm(window, [(6, good), (5, good)]))
        expect(InvalidRequest, lambda: reader.arm(window, [(6, good), (6, good)]))
        assert reader.disarm(window, [5, 6]) == {5}, "a failed arm left a tag armed"
        assert not scene.writer_heard.completions


# Connections.


def a_stranger_cannot_connect(make_pair: MakePair) -> None:
    """An invitation is random, for one connection, and names it at the inviter."""
    with scene_of(make_pair, connected=False) as scene:
        address = scene.writer.listen(scene.pair.address)
        assert scene.writer.address == address

        def dial(invitation: bytes) -> None:
            scene.reader.connect(WRITER, address, invitation, deadline_s=WAIT_S)

        expect(PermissionDenied, lambda: dial(bytes(16)))
        expect(PermissionDenied, lambda: dial(b"short"))
        invitation = scene.writer.invite(READER)
        assert invitation != scene.writer.invite(READER)
        dial(invitation)
        expect(PermissionDenied, lambda: dial(invitation))
        source, target = scene.source(4 * KIB), Region.anonymous(4 * KIB)
        scene.send(source, scene.window(target), Slices.contiguous(0, 4 * KIB))
        assert scene.finish(1) == [DONE], "a failed dial hurt the connection"
        scene.reader.connect("w", address, scene.writer.invite("r"), deadline_s=WAIT_S)
        assert {each.peer for each in scene.writer.traffic()} >= {READER, "r"}
        assert {each.peer for each in scene.reader.traffic()} >= {WRITER, "w"}


def nobody_there_is_unavailable(make_pair: MakePair) -> None:
    """And a peer without a connection cannot be written to."""
    with scene_of(make_pair) as scene:
        address = scene.writer.address
        source, target = scene.source(4 * KIB), Region.anonymous(4 * KIB)
        window, slices = scene.window(target), Slices.contiguous(0, 4 * KIB)
        write = Write(source, slices, window, slices, Lane.SAVE, 1, WAIT_S)
        expect(PeerLost, lambda: scene.writer.write("nobody", write, lambda _: None))
        scene.writer.disconnect("nobody")
        scene.writer.close()
        expect(
            Unavailable,
            lambda: scene.reader.connect(WRITER, address, bytes(16), deadline_s=WAIT_S),
        )


def a_new_connection_replaces_the_old(make_pair: MakePair) -> None:
    """Writes of the old are LOST; the new one works."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(1 * MIB), Region.anonymous(1 * MIB)
        gate = Gate()
        window = scene.gated_window(target, gate)
        scene.send(source, window, Slices.contiguous(0, 4096))
        gate.wait_reached()
        scene.connect()
        assert scene.finish(1) == [LOST]
        scene.writer_heard.wait_losses(1)
        scene.reader_heard.wait_losses(1)
        gate.open()
        scene.send(source, window, Slices.contiguous(0, 1 * MIB))
        assert scene.finish(2) == [LOST, DONE]
        assert len(scene.writer_heard.losses) == 1, scene.writer_heard


def disconnect_loses_what_is_pending(make_pair: MakePair) -> None:
    """Both sides are told once; a tag that was arriving is not accepted again."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(8 * MIB), Region.anonymous(8 * MIB)
        gate = Gate()
        window = scene.gated_window(target, gate)
        tags = [scene.send(source, window, slices) for slices in extents(8, 1 * MIB)]
        gate.wait_reached()
        scene.writer.disconnect(READER)
        assert scene.finish(8) == [LOST] * 8
        gate.open()
        for heard, peer in ((scene.writer_heard, READER), (scene.reader_heard, WRITER)):
            heard.wait_losses(1)
            assert [name for name, _ in heard.losses] == [peer]
        write = Write(source, extents(1, 1)[0], window, extents(1, 1)[0], Lane.SAVE, 1, WAIT_S)
        expect(PeerLost, lambda: scene.writer.write(READER, write, lambda _: None))
        unlanded = scene.reader.disarm(window, tags)
        arrived = {arrival.tag for arrival in scene.reader_heard.arrivals}
        assert not unlanded & arrived, "a tag both landed and was fenced"
        scene.connect()
        scene.send(source, window, Slices.contiguous(0, 8 * MIB))
        assert scene.finish(9)[-1] is DONE


def close_completes_everything(make_pair: MakePair) -> None:
    """Pending writes are CLOSED, the own on_peer_lost stays silent, the peer's does not."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(8 * MIB), Region.anonymous(8 * MIB)
        gate = Gate()
        window = scene.gated_window(target, gate)
        for slices in extents(8, 1 * MIB):
            scene.send(source, window, slices)
        gate.wait_reached()
        if scene.writer.name == "memory":
            gate.open()  # the reader's callback runs on the writer's own thread there
        scene.writer.close()
        scene.writer.close()
        assert set(scene.finish(8)) <= {CLOSED, DONE}
        gate.open()
        scene.reader_heard.wait_losses(1)
        assert not scene.writer_heard.losses
        write = Write(source, extents(1, 1)[0], window, extents(1, 1)[0], Lane.SAVE, 1, WAIT_S)
        expect(DualPathError, lambda: scene.writer.write(READER, write, lambda _: None))
        scene.reader.close()
        before = bytes(target.view)
        assert target.view == before


def each_write_completes_exactly_once(make_pair: MakePair) -> None:
    """Through connections that come and go."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(4 * MIB), Region.anonymous(4 * MIB)
        window = scene.window(target)
        submitted = 0
        for turn in range(6):
            for slices in extents(8, 512 * KIB):
                scene.send(source, window, slices)
                submitted += 1
            if turn % 2:
                scene.reader_heard.wait_arrivals(turn)
            (scene.writer if turn % 3 else scene.reader).disconnect(READER if turn % 3 else WRITER)
            scene.writer_heard.wait_losses(turn + 1)
            scene.reader_heard.wait_losses(turn + 1)
            scene.connect()
        statuses = scene.finish(submitted)
        assert set(statuses) <= {DONE, LOST}, statuses
        done = [each.tag for each in scene.writer_heard.completions if each.status is DONE]
        arrived = [arrival.tag for arrival in scene.reader_heard.arrivals]
        assert set(done) <= set(arrived), "DONE without an arrival"
        assert len(set(arrived)) == len(arrived), "a tag arrived twice"


def traffic_is_counted(make_pair: MakePair) -> None:
    """Payload bytes of what landed, and refusals at the side that refused."""
    with scene_of(make_pair) as scene:
        source, target = scene.source(1 * MIB), Region.anonymous(1 * MIB)
        window = scene.window(target)
        for slices in extents(4, 256 * KIB):
            scene.send(source, window, slices)
        scene.write(source, window, Slices.contiguous(0, 1), 999)
        assert scene.finish(5) == [DONE] * 4 + [REFUSED]
        (sent,) = scene.writer.traffic()
        (received,) = scene.reader.traffic()
        assert (sent.peer, sent.connected, sent.queued_bytes) == (READER, True, 0)
        assert sent.sent_bytes >= 1 * MIB
        assert (received.peer, received.received_bytes) == (WRITER, 1 * MIB)
        assert received.refused_writes == 1
        scene.reader.disconnect(WRITER)
        assert not scene.reader.traffic()[0].connected


CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
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
        urgent_lanes_overtake,
        saves_keep_a_floor,
        a_late_write_expires_once,
        a_deadline_in_the_past_expires,
        a_full_queue_raises_overloaded,
        bad_requests_name_the_value,
        a_stranger_cannot_connect,
        nobody_there_is_unavailable,
        a_new_connection_replaces_the_old,
        disconnect_loses_what_is_pending,
        close_completes_everything,
        each_write_completes_exactly_once,
        traffic_is_counted,
    )
}


def expect(error: type[Exception], act: Callable[[], object]) -> None:
    """Fail unless `act` raises `error` with a message."""
    message = None
    try:
        act()
    except error as raised:
        message = str(raised)
    assert message is not None, f"{error.__name__} was not raised"
    assert message, f"{error.__name__} without a message"


def accept(arrival: Arrival) -> bool:
    """An on_arrival that takes everything."""
    return True


def gather(region: Region, slices: Slices) -> bytes:
    """The bytes of `slices`, one after another."""
    return b"".join(bytes(region.view[at : at + nbytes]) for at, nbytes in slices.pieces())


def wait_for_byte(region: Region, offset: int) -> None:
    """Wait until something has landed at `offset`, which held zeros."""
    deadline = time.monotonic() + WAIT_S
    while region.view[offset : offset + 64] == bytes(64):
        assert time.monotonic() < deadline, f"nothing landed at {offset}"


def queued_behind_a_gate(scene: Scene, lanes: list[Lane], nbytes: int) -> list[int]:
    """Stall the reader, submit a write on each of `lanes`, and return the tags as they came.

    A first write, tag 0, holds the reader up until all were submitted; tags count from 1.
    """
    source = scene.source(nbytes)
    target = Region.anonymous(nbytes)
    gate = Gate()
    window, slices = scene.gated_window(target, gate), Slices.contiguous(0, nbytes)
    scene.reader.arm(window, [(tag, slices) for tag in range(len(lanes) + 1)])
    scene.write(source, window, slices, 0)
    gate.wait_reached()
    for tag, lane in enumerate(lanes, start=1):
        scene.write(source, window, slices, tag, lane=lane)
    gate.open()
    assert scene.finish(len(lanes) + 1) == [DONE] * (len(lanes) + 1)
    return [arrival.tag for arrival in scene.reader_heard.arrivals if arrival.tag]
