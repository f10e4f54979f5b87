"""Peers that fall silent, keys that are gone, packets that get lost: bounded, named, and no byte
lands after a fence. Over simulated devices, which can be stopped half way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from dualpath.transfer.conformance_scene import (
    READER,
    WAIT_S,
    WRITER,
    Gate,
    Recorder,
    Scene,
    TransportPair,
)
from dualpath.transfer.errors import Unavailable
from dualpath.transfer.lane import Lane
from dualpath.transfer.rdma.channel import Channel
from dualpath.transfer.rdma.config import RdmaConfig
from dualpath.transfer.rdma.rdma_transport import RdmaTransport
from dualpath.transfer.rdma.simulated_device import (
    PACKET_BYTES,
    SimulatedDevice,
    SimulatedVerbs,
)
from dualpath.transfer.rdma.simulated_fabric import SimulatedFabric
from dualpath.transfer.region import Region
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import (
    Arrival,
    BatchCompletion,
    Completion,
    Write,
    WriteBatch,
    WriteStatus,
)

MIB = 1 << 20
PATIENT = RdmaConfig(fence_wait_s=WAIT_S, withdraw_wait_s=WAIT_S, grace_s=WAIT_S)
IMPATIENT = RdmaConfig(fence_wait_s=0.02, grace_s=0.02)
DONE, LOST, EXPIRED = WriteStatus.DONE, WriteStatus.LOST, WriteStatus.EXPIRED


class Stage(Scene):
    """A connected pair on a fabric that can be disturbed."""

    fabric: SimulatedFabric
    devices: dict[str, SimulatedDevice]


@contextmanager
def stage_of(
    config: RdmaConfig, *, memory_windows: bool = True, reader_config: RdmaConfig | None = None
) -> Iterator[Stage]:
    heard = Recorder(), Recorder()
    with SimulatedFabric() as fabric:
        devices = {
            name: SimulatedDevice(fabric, name, memory_windows=memory_windows)
            for name in (WRITER, READER)
        }
        writer = RdmaTransport(WRITER, heard[0].on_lost, SimulatedVerbs(devices[WRITER]), config)
        reader = RdmaTransport(
            READER, heard[1].on_lost, SimulatedVerbs(devices[READER]), reader_config or config
        )
        try:
            pair = TransportPair(writer, reader, "127.0.0.1:0", Region.anonymous, 256 * MIB)
            stage = Stage(pair, *heard)
            stage.fabric, stage.devices = fabric, devices
            yield stage
        finally:
            for name in devices:
                fabric.release(name)
            writer.close()
            reader.close()


def half_written(stage: Stage, *, deadline_s: float = WAIT_S) -> tuple[Region, Region]:
    """A write that the writer's device has stopped in the middle of: its source and target."""
    stage.connect()
    source, target = stage.source(MIB), Region.anonymous(MIB)
    window, slices = stage.window(target), Slices.contiguous(0, MIB)
    stage.fabric.hold(WRITER, after_writes=2)
    # What is asked and said is no write: it passes.
    tag = stage.tag()
    stage.reader.arm(window, [(tag, slices)])
    stage.write(source, window, slices, tag, deadline_s=deadline_s)
    assert stage.fabric.wait_held(WRITER, WAIT_S)
    assert bytes(target.view[: 2 * PACKET_BYTES]) == bytes(source.view[: 2 * PACKET_BYTES])
    stage.reader_window = window  # type: ignore[attr-defined]
    return source, target


@pytest.mark.parametrize("memory_windows", [True, False])
def test_a_fence_of_a_silent_writer_ends_in_bounded_time(memory_windows: bool) -> None:
    with stage_of(IMPATIENT, memory_windows=memory_windows) as stage:
        _, target = half_written(stage)
        stage.reader.revoke(stage.reader_window)  # type: ignore[attr-defined]
        before = bytes(target.view)
        stage.fabric.release(WRITER)
        assert stage.finish(1) == [LOST]
        stage.writer_heard.wait_losses(1)
        stage.reader_heard.wait_losses(1)
        assert bytes(target.view) == before, "bytes landed after the fence"
        assert not stage.reader_heard.arrivals
        stage.connect()
        fresh = stage.window(target)
        stage.send(stage.source(MIB), fresh, Slices.contiguous(0, MIB))
        assert stage.finish(2) == [LOST, DONE]


def test_with_a_memory_window_the_fence_costs_no_connection_while_the_writer_is_silent() -> None:
    with stage_of(PATIENT, reader_config=IMPATIENT) as stage:
        half_written(stage)
        stage.reader.revoke(stage.reader_window)  # type: ignore[attr-defined]
        assert not stage.reader_heard.losses
        stage.fabric.release(WRITER)
        stage.writer_heard.wait_losses(1)
        assert "remote access" in stage.writer_heard.losses[0][1]


def test_a_fence_waits_for_a_writer_that_is_merely_slow() -> None:
    with stage_of(PATIENT) as stage:
        source, target = half_written(stage)
        slices = Slices.contiguous(0, MIB)
        stage.fabric.release(WRITER)
        stage.reader.revoke(stage.reader_window)  # type: ignore[attr-defined]
        before = bytes(target.view)
        assert stage.finish(1)[0] in (DONE, WriteStatus.REFUSED)
        assert bytes(target.view) == before
        stage.send(source, stage.window(target), slices)
        assert stage.finish(2)[1] is DONE
        assert not stage.writer_heard.losses


def test_what_is_not_written_does_not_overtake_what_still_is() -> None:
    with stage_of(replace(PATIENT, fragment_bytes=2 * PACKET_BYTES)) as stage:
        stage.connect()
        source, target = stage.source(4 * PACKET_BYTES), Region.anonymous(4 * PACKET_BYTES)
        window = stage.window(target)
        table = SliceTable.contiguous([0, 2 * PACKET_BYTES], [2 * PACKET_BYTES] * 2)
        stage.reader.arm_table(window, 1, table.parts(0, 1))  # the second part is refused
        stage.fabric.hold(WRITER, after_writes=1)
        ended: list[BatchCompletion] = []
        over = threading.Event()

        def on_completion(completion: BatchCompletion) -> None:
            ended.append(completion)
            over.set()

        batch = WriteBatch(source, table, window, table, Lane.SAVE, 1, WAIT_S)
        stage.writer.write_batch(READER, batch, on_completion)
        assert stage.fabric.wait_held(WRITER, WAIT_S)
        # Both parts have been asked for; a round trip of the reader's passes the second by.
        back = Region.anonymous(4096)
        small = Slices.contiguous(0, 4096)
        back_window = stage.writer.expose(back, 0, 4096, lambda _: True)
        stage.writer.arm(back_window, [(9, small)])
        write = Write(stage.source(4096), small, back_window, small, Lane.SAVE, 9, 0.05)
        stage.reader.write(WRITER, write, stage.reader_heard.on_completion)
        stage.reader_heard.wait_completions(1)
        assert not stage.reader_heard.arrivals
        stage.fabric.release(WRITER)
        assert over.wait(WAIT_S)
        assert ended[0].refused == {2: "not_armed"}
        assert [arrival.tag for arrival in stage.reader_heard.arrivals] == [1]
        assert target.view[: 2 * PACKET_BYTES] == source.view[: 2 * PACKET_BYTES]


def test_a_fence_inside_a_completion_callback_hears_of_the_end_itself() -> None:
    with stage_of(PATIENT) as stage:
        _, target = half_written(stage)
        window = stage.reader_window  # type: ignore[attr-defined]
        back = Region.anonymous(4096)
        small = Slices.contiguous(0, 4096)
        back_window = stage.writer.expose(back, 0, 4096, lambda _: True)
        stage.writer.arm(back_window, [(1, small)])
        fenced: list[bytes] = []
        entered = Gate()

        def on_completion(completion: Completion) -> None:
            entered.pass_through()
            stage.reader.revoke(window)
            fenced.append(bytes(target.view))
            stage.reader_heard.on_completion(completion)

        # The reader writes: the writer's answer is behind its held write, so it is released first.
        write = Write(stage.source(4096), small, back_window, small, Lane.SAVE, 1, 0.05)
        stage.reader.write(WRITER, write, on_completion)
        entered.wait_reached()
        stage.fabric.release(WRITER)
        entered.open()
        stage.reader_heard.wait_completions(1)
        stage.finish(1)
        assert bytes(target.view) == fenced[0], "bytes landed after the fence"


def test_what_landed_is_told_only_when_its_key_is_void(monkeypatch: pytest.MonkeyPatch) -> None:
    told_before: list[bool] = []
    invalidate = Channel.invalidate

    def watched(channel: Channel, rkey: int, completed: Callable[[], None]) -> None:
        def void() -> None:
            told_before.append(told.wait(0.2))
            completed()

        invalidate(channel, rkey, void)

    monkeypatch.setattr(Channel, "invalidate", watched)
    told = threading.Event()

    def arrived(_arrival: Arrival) -> bool:
        told.set()
        return True

    with stage_of(PATIENT) as stage:
        stage.connect()
        source, target = stage.source(MIB), Region.anonymous(MIB)
        window = stage.reader.expose(target, 0, MIB, arrived)
        slices, tag = Slices.contiguous(0, MIB), stage.tag()
        stage.reader.arm(window, [(tag, slices)])
        stage.write(source, window, slices, tag)
        assert stage.finish(1) == [DONE]
        assert told.is_set()
        assert told_before == [False]


def test_a_withdrawn_key_ends_the_connection_by_name() -> None:
    with stage_of(PATIENT) as stage:
        half_written(stage)
        with stage.fabric.changed:
            ranges = stage.devices[READER].ranges
            for key in [key for key, opened in ranges.items() if opened.queue_pair]:
                del ranges[key]
        stage.fabric.release(WRITER)
        assert stage.finish(1) == [LOST]
        stage.writer_heard.wait_losses(1)
        stage.reader_heard.wait_losses(1)
        assert "remote access" in stage.writer_heard.losses[0][1]


def test_lost_packets_are_sent_again() -> None:
    with stage_of(PATIENT) as stage:
        _, target = half_written(stage)
        stage.fabric.lose(WRITER, PATIENT.retries)
        stage.fabric.release(WRITER)
        assert stage.finish(1) == [DONE]
        assert not stage.writer_heard.losses
        assert bytes(target.view) == bytes(stage.source(MIB).view)


def test_retries_end() -> None:
    with stage_of(PATIENT) as stage:
        half_written(stage)
        stage.fabric.lose(WRITER, 1 << 20)
        stage.fabric.release(WRITER)
        assert stage.finish(1) == [LOST]
        stage.writer_heard.wait_losses(1)
        assert "retries exhausted" in stage.writer_heard.losses[0][1]
        stage.reader_heard.wait_losses(1)


def test_a_device_that_completes_nothing_ends_the_connection() -> None:
    with stage_of(replace(PATIENT, silent_s=0.1)) as stage:
        half_written(stage)
        assert stage.finish(1) == [LOST]
        stage.writer_heard.wait_losses(1)
        assert "completed nothing" in stage.writer_heard.losses[0][1]
        stage.fabric.release(WRITER)
        stage.reader_heard.wait_losses(1)


def test_a_write_cut_short_on_purpose_ends_the_connection_and_the_rest_stays() -> None:
    with stage_of(PATIENT) as stage:
        stage.connect()
        source, target = stage.source(MIB), Region.anonymous(MIB)
        window, slices = stage.window(target), Slices.contiguous(0, MIB)
        stage.reader.arm(window, [(1, slices)])
        write = Write(source, slices, window, slices, Lane.SAVE, 1, WAIT_S)
        writer = stage.writer
        assert isinstance(writer, RdmaTransport)
        writer.write_truncated(READER, write, 100_000, stage.writer_heard.on_completion)
        assert stage.finish(1) == [LOST]
        stage.reader_heard.wait_losses(1)
        assert target.view[:100_000] == source.view[:100_000]
        assert target.view[100_000:] == bytes(MIB - 100_000)
        assert not stage.reader_heard.arrivals


def test_after_expired_the_source_is_not_read_any_more() -> None:
    with stage_of(IMPATIENT) as stage:
        source, target = half_written(stage, deadline_s=0.05)
        assert stage.finish(1) == [EXPIRED]
        source.view[:] = bytes(MIB)
        before = bytes(target.view)
        stage.fabric.release(WRITER)
        stage.writer_heard.wait_losses(1)
        stage.reader_heard.wait_losses(1)
        assert bytes(target.view) == before


def test_a_write_that_expires_while_it_is_read_keeps_the_connection_if_that_ends_soon() -> None:
    with stage_of(PATIENT) as stage:
        source, target = half_written(stage, deadline_s=0.02)
        stage.fabric.release(WRITER)
        assert stage.finish(1)[0] in (EXPIRED, DONE)
        stage.send(source, stage.window(target), Slices.contiguous(0, MIB))
        assert stage.finish(2)[1] is DONE
        assert not stage.writer_heard.losses


def test_ends_that_have_lanes_apart_on_one_side_only_do_not_connect() -> None:
    apart = RdmaConfig(service_levels=(0, 1, 2, 3))
    with stage_of(apart, reader_config=PATIENT) as stage, pytest.raises(Unavailable):
        stage.connect()


def test_a_region_that_is_closed_is_no_longer_registered() -> None:
    with stage_of(PATIENT) as stage:
        stage.connect()
        source, target = stage.source(MIB), Region.anonymous(MIB)
        window = stage.window(target)
        stage.send(source, window, Slices.contiguous(0, MIB))
        assert stage.finish(1) == [DONE]
        stage.reader.revoke(window)

        def spans(name: str, nbytes: int) -> int:
            ranges = stage.devices[name].ranges.values()
            return sum(each.end - each.start == nbytes for each in ranges)

        assert spans(WRITER, MIB) == 1
        source.close()
        assert spans(WRITER, MIB) == 0
        target.close()
        stage.reader.close()
        assert spans(READER, MIB) == 0
