"""What the rdma transport is made of: messages, registrations, the choice of a port, requests."""

from __future__ import annotations

import contextlib
import gc
import random
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from dualpath.transfer.errors import InvalidRequest, Overloaded, Unavailable
from dualpath.transfer.lane import Lane
from dualpath.transfer.lane_marks import LaneMarks
from dualpath.transfer.outbox import Outbox
from dualpath.transfer.rdma import write_requests, write_requests_twin
from dualpath.transfer.rdma.config import RdmaConfig
from dualpath.transfer.rdma.messages import (
    MESSAGE_BYTES_MAX,
    SKIP_BYTES,
    Ask,
    Cancel,
    Done,
    Grant,
    Message,
    Opening,
    Release,
    pack,
    parse,
)
from dualpath.transfer.rdma.port_choice import choose_port
from dualpath.transfer.rdma.registration_cache import RegistrationCache
from dualpath.transfer.rdma.simulated_device import SimulatedDevice
from dualpath.transfer.rdma.simulated_fabric import SimulatedFabric
from dualpath.transfer.rdma.verbs import (
    DeviceInfo,
    GidEntry,
    LinkLayer,
    Opcode,
    Piece,
    PortInfo,
    WorkRequest,
)
from dualpath.transfer.rdma.work_rows import requests_in, signal
from dualpath.transfer.rdma.write_requests import WriteRequests
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.slices import Slices
from dualpath.transfer.stream_frame import MalformedFrame
from dualpath.transfer.tcp_transport import TcpConfig
from dualpath.transfer.transport import BATCH_WRITES_MAX, Write, WriteBatch

RowsOf = Callable[..., tuple[bytearray, int, int, int]]
ROWS_OF = [
    pytest.param(write_requests_twin.rows_of, id="python"),
    pytest.param(
        write_requests.rows_of,
        id="native",
        marks=pytest.mark.skipif(
            write_requests.rows_of is write_requests_twin.rows_of,
            reason="the native extension is not built",
        ),
    ),
]
WIDEST = SliceTable(
    1 << 40,
    1 << 20,
    1 << 20,
    [(1 << 50) + index for index in range(BATCH_WRITES_MAX)],
    list(range(BATCH_WRITES_MAX)),
    [1 << 18] * BATCH_WRITES_MAX,
)
MESSAGES: list[Message] = [
    Ask(7, 1 << 60, 4096),
    Ask(0, 1, 1, Opening(1 << 63, 5, (1 << 64) - BATCH_WRITES_MAX, WIDEST)),
    Cancel(3, 99),
    Grant(1023, (1 << 63) + 5, 0xFFFFFFFF, bytes(range(SKIP_BYTES))),
    Release(5),
    Done(4),
    Done(4, bytes([0, 4, 5])),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda each: type(each).__name__)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    data = pack(message)
    assert len(data) <= MESSAGE_BYTES_MAX
    heard = parse(data)
    if isinstance(message, Ask) and message.opening is not None:
        assert isinstance(heard, Ask)
        assert heard.opening is not None
        assert list(heard.opening.table.fields()) == list(message.opening.table.fields())
    else:
        assert heard == message


def test_a_message_that_was_tampered_with_is_malformed_or_another_message() -> None:
    draw = random.Random(5)
    for message in MESSAGES:
        data = pack(message)
        for _ in range(200):
            bad = bytearray(data[: draw.randint(0, len(data))])
            if bad and draw.random() < 0.7:
                bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
            with contextlib.suppress(MalformedFrame):
                assert parse(bytes(bad))


def test_the_choice_of_a_gid_is_looked_up() -> None:
    local = bytes((0xFE, 0x80)) + bytes(14)
    ipv4 = bytes(10) + b"\xff\xff" + bytes((10, 0, 0, 1))
    ipv6 = bytes((0x20, 1)) + bytes(14)
    gids = [
        GidEntry(0, local, "RoCE v1"),
        GidEntry(1, local, "RoCE v2"),
        GidEntry(2, ipv6, "RoCE v2"),
        GidEntry(3, ipv4, "RoCE v1"),
        GidEntry(5, ipv4, "RoCE v2"),
    ]

    def device(*ports: PortInfo) -> DeviceInfo:
        return DeviceInfo("mlx5_0", 1024, 16, 1024, True, ports)

    down = PortInfo(1, False, LinkLayer.ETHERNET, 0, 4096, gids)
    up = PortInfo(2, True, LinkLayer.ETHERNET, 0, 4096, gids)
    infiniband = PortInfo(1, True, LinkLayer.INFINIBAND, 12, 4096, gids[:1])
    assert choose_port(device(down, up)).gid.row == 5
    assert choose_port(device(down, up)).port.number == 2
    assert choose_port(device(up), gid_index=2).gid.gid == ipv6
    assert choose_port(device(infiniband)).port.lid == 12
    for info, number, index, said in (
        (device(down), 0, -1, "active"),
        (device(up), 3, -1, "no port 3"),
        (device(up), 2, 4, "index 4"),
        (device(PortInfo(1, True, LinkLayer.ETHERNET, 0, 4096, [])), 0, -1, "address"),
    ):
        with pytest.raises(Unavailable, match=said):
            choose_port(info, number, index)


def test_registrations_are_bounded_and_what_is_in_use_stays() -> None:
    with SimulatedFabric() as fabric:
        device = SimulatedDevice(fabric, "d")
        cache = RegistrationCache(device, 2)
        a, b, c = (Region.anonymous(4096) for _ in range(3))
        held = cache.hold(a)
        cache.let_go(cache.hold(b))
        cache.let_go(cache.hold(c))
        assert len(cache) == len(device.ranges) == 2
        assert cache.hold(a).keys is held.keys
        with pytest.raises(Overloaded):
            cache.hold(b), cache.hold(c)
        cache.close()
        assert not device.ranges


def test_a_region_that_closes_in_use_is_deregistered_after_that() -> None:
    with SimulatedFabric() as fabric:
        device = SimulatedDevice(fabric, "d")
        cache = RegistrationCache(device, 4)
        closed, dropped = Region.anonymous(4096), Region.anonymous(4096)
        held = cache.hold(closed)
        cache.let_go(cache.hold(dropped))
        closed.close()
        assert len(device.ranges) == 2
        cache.let_go(held)
        assert len(device.ranges) == 1
        del dropped
        gc.collect()
        assert len(cache) == 0
        assert not device.ranges


def test_a_region_that_is_registered_again_and_again_is_watched_once() -> None:
    with SimulatedFabric() as fabric:
        cache = RegistrationCache(SimulatedDevice(fabric, "d"), 1)
        regions = [Region.anonymous(4096) for _ in range(2)]
        for _ in range(5):
            for region in regions:
                cache.let_go(cache.hold(region))
        assert [len(region.before_close) for region in regions] == [1, 1]


def _requests(
    rows_of: RowsOf, monkeypatch: pytest.MonkeyPatch, *of: Any, most: int
) -> list[WorkRequest]:
    """All requests of a write, taken at most `most` a post; and where each post ended."""
    monkeypatch.setattr(write_requests, "rows_of", rows_of)
    left = WriteRequests(*of)
    requests: list[WorkRequest] = []
    for number in range(1 << 20):
        if left.exhausted:
            return requests
        rows, count, last_at = left.take(most)
        made = requests_in(rows)
        assert len(made) == count <= most
        assert left.exhausted or count == most
        if made:
            signal(rows, last_at, number)
            *others, last = requests_in(rows)
            assert (others, last) == (made[:-1], replace(made[-1], ident=number, signaled=True))
        requests += made
    raise AssertionError("it does not end")


@pytest.mark.parametrize("rows_of", ROWS_OF)
def test_requests_write_each_byte_of_a_fragment_to_its_place(
    rows_of: RowsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(11)
    for _ in range(200):
        sizes = [draw.randint(1, 900) for _ in range(draw.randint(1, 9))]
        length = draw.randint(1, 300)
        count = max(sizes) // length + 2
        source_table = SliceTable(
            length + draw.randint(0, 50),
            count,
            length,
            [4000 * index for index in range(len(sizes))],
            [draw.randint(0, length) for _ in sizes],
            sizes,
        )
        target_table = SliceTable.contiguous([1000 * index for index in range(len(sizes))], sizes)
        if draw.random() < 0.5:
            source_table, target_table = target_table, source_table
        region = Region.anonymous(1 << 16)
        window = RegionDescriptor(1, 1, 0, 1 << 16)
        batch = WriteBatch(region, source_table, window, target_table, Lane.SAVE, 1, deadline_s=1.0)
        pending = Outbox("p", 1 << 20).add_batch(batch, lambda _: None, 0.0)
        offset = draw.randrange(sum(sizes))
        nbytes = draw.randint(1, sum(sizes) - offset)
        skipped = {index for index in range(len(sizes)) if draw.random() < 0.2}
        skip = bytearray(SKIP_BYTES)
        for index in skipped:
            skip[index >> 3] |= 1 << (index & 7)
        grant = Grant(9, 1 << 32, 77, bytes(skip))
        source, pieces_max = Piece(1 << 40, 0, 5), draw.randint(1, 4)
        of = (pending, offset, nbytes, grant, source, pieces_max)
        requests = _requests(rows_of, monkeypatch, *of, most=draw.randint(1, 64))
        written: list[tuple[int, int]] = []
        for request in requests:
            assert len(request.pieces) <= pieces_max
            assert request.rkey == 77
            at = request.remote_address - (1 << 32)
            for piece in request.pieces:
                start = piece.address - (1 << 40)
                assert piece.lkey == 5
                written += zip(
                    range(start, start + piece.nbytes), range(at, at + piece.nbytes), strict=True
                )
                at += piece.nbytes
        pairs = []
        for index in range(len(sizes)):
            from_, to = source_table.part(index), target_table.part(index)
            bytes_of = [
                [at + i for at, n in slices.pieces() for i in range(n)] for slices in (from_, to)
            ]
            pairs += [(index, *pair) for pair in zip(*bytes_of, strict=True)]
        wanted = [pair[1:] for pair in pairs[offset : offset + nbytes] if pair[0] not in skipped]
        assert written == wanted
        assert [request.opcode for request in requests[:-1]] == [Opcode.WRITE] * (len(requests) - 1)
        assert not requests or (requests[-1].opcode, requests[-1].immediate) == (
            Opcode.WRITE_IMM,
            9,
        )


@pytest.mark.parametrize("rows_of", ROWS_OF)
def test_a_single_write_is_gathered_as_well_and_need_not_tell(
    rows_of: RowsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_requests, "rows_of", rows_of)
    region = Region.anonymous(1 << 16)
    window = RegionDescriptor(1, 1, 0, 1 << 16)
    write = Write(
        region,
        Slices.strided(0, 200, 10, 100),
        window,
        Slices.contiguous(7, 1000),
        Lane.SAVE,
        1,
        1.0,
    )
    pending = Outbox("p", 1 << 20).add(write, lambda _: None, 0.0)
    grant = Grant(1, 0, 7, bytes(SKIP_BYTES))
    rows, count, last_at = WriteRequests(
        pending, 0, 1000, grant, Piece(0, 0, 5), 16, tell=False
    ).take(64)
    assert (count, last_at) == (1, 0)
    (request,) = requests_in(rows)
    assert len(request.pieces) == 10
    assert request.opcode is Opcode.WRITE


@pytest.mark.parametrize("rows_of", ROWS_OF)
@pytest.mark.parametrize(
    "wrong",
    [
        {3: 11},  # an offset behind the end
        {4: 21},  # an end behind all bytes
        {5: b""},
        {8: 0},
        {8: 17},
        {9: 0},
        {9: 65},
        {1: (5, 10, array("Q", [0, 0]), array("Q", [0, 0]))},
        {2: (1, 1, array("Q", [0]), array("Q", [0, 0]))},
    ],
)
def test_rows_of_bytes_that_are_not_there_are_refused(
    rows_of: RowsOf, wrong: dict[int, object]
) -> None:
    places = (1, 1, array("Q", [0, 10]), array("Q", [0, 0]))
    good = [array("Q", [10, 10]), places, places, 5, 10, b"\0", (0, 1), (0, 1), 16, 64, 1]
    assert rows_of(*good)[1:] == (1, 0, 10)
    with pytest.raises(ValueError, match=r"bytes|too many|slices|as many"):
        rows_of(*(wrong.get(at, value) for at, value in enumerate(good)))


@pytest.mark.parametrize(
    "settings",
    [
        {"retries": 7},
        {"service_levels": (1, 2)},
        {"service_levels": (0, 0, 0, 16)},
        {"slots": 0},
        {"fragment_bytes": 1 << 30},
        {"timeout_exponent": 0},
        {"registrations_max": 0},
    ],
)
def test_settings_out_of_bounds_are_named(settings: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(settings))):
        RdmaConfig(**settings)  # type: ignore[arg-type]


def test_lanes_that_are_marked_alike_share_a_queue_pair() -> None:
    marks = TcpConfig(marks=LaneMarks((8, 8, 10, 8)))
    assert RdmaConfig().classes() == [(0, 32)]
    assert RdmaConfig(set_up=marks).classes() == [(0, 32), (0, 40)]
    apart = RdmaConfig(set_up=marks, service_levels=(1, 0, 0, 0))
    assert apart.classes() == [(1, 32), (0, 32), (0, 40)]
    assert [apart.index_of(lane) for lane in Lane] == [0, 1, 2, 1]
