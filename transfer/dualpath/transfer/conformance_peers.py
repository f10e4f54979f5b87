"""Conformance checks about peers: lanes, deadlines, bounds, connections, counters."""

from __future__ import annotations

from functools import partial

from dualpath.transfer.conformance_scene import (
    READER,
    WAIT_S,
    WRITER,
    Gate,
    MakePair,
    accept,
    expect,
    extents,
    gather,
    pattern,
    queued_behind_a_gate,
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
from dualpath.transfer.transport import WRITE_BYTES_MAX, Write, WriteStatus

KIB = 1 << 10
MIB = 1 << 20

DONE, REFUSED = WriteStatus.DONE, WriteStatus.REFUSED
LOST, EXPIRED, CLOSED = WriteStatus.LOST, WriteStatus.EXPIRED, WriteStatus.CLOSED


# Order, deadlines, bounds.


def urgent_lanes_overtake(make_pair: MakePair) -> None:
    """A lane with a lower value goes before what waits on another."""
    with scene_of(make_pair) as scene:
        count, nbytes = 24, 1 * MIB  # more than a transport has in flight
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
    """Payload bytes and number of what landed, and refusals at the side that refused."""
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
        assert (received.received_writes, received.refused_writes) == (4, 1)
        scene.reader.disconnect(WRITER)
        assert not scene.reader.traffic()[0].connected


CHECKS = (
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
