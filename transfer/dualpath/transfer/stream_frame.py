"""Frames of the stream transports (tcp and shm): encoding, and a parser without I/O.

A frame is a prefix (type u8, zero u8, body bytes u16, payload bytes u32, little endian), a body
of fixed form, and raw payload bytes that only WRITE and DATA have. `parse` never trusts a
length: whatever does not follow the form raises MalformedFrame, and costs the connection.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.invitations import INVITATION_BYTES, PEER_NAME_BYTES_MAX
from dualpath.transfer.lane import Lane
from dualpath.transfer.slice_table import PART_BYTES, SliceTable
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import BATCH_WRITES_MAX, WRITE_BYTES_MAX

STREAM_VERSION = 4
STREAMS_MAX = len(Lane)
"""Most streams of one connection."""
FRAGMENT_BYTES_MAX = 8 << 20
"""Most payload bytes of one frame."""
BODY_BYTES_MAX = 10240
HEAD_BYTES_MAX = BODY_BYTES_MAX + 8
ACKS_MAX = 256
"""Most acknowledgements of one frame."""

_PREFIX = struct.Struct("<BBHI")
PREFIX_BYTES = _PREFIX.size
_HELLO = struct.Struct("<8sBBB16s")
_WELCOME = struct.Struct("<8sHB")
_WRITE = struct.Struct("<QQIQB6Q")
_BATCH = struct.Struct("<QQIQBQQQH")
_SOURCE = struct.Struct("<HQ3Q")
_IDENT = struct.Struct("<Q")
_REGION = struct.Struct("<QQ")
_ACK = struct.Struct("<QB")
_MAGIC = b"dpstream"
_DENY_TEXT_BYTES_MAX = 512

REFUSALS = (
    "",  # 0: not refused
    "no_window",
    "not_armed",
    "other_slices",
    "fenced",
    "rejected",
    "cancelled",
    "bad_source",
)
"""Reasons of a refusal, by the code that travels."""


class MalformedFrame(Exception):
    """What the peer sent is not a frame of this version."""


class FrameType(enum.IntEnum):
    """First byte of a frame."""

    HELLO = 1
    WELCOME = 2
    DENY = 3
    WRITE = 4
    DATA = 5
    CANCEL = 6
    ACK = 7
    REGION = 8
    FORGET = 9
    BATCH_FROM = 10
    BATCH = 11
    RESULTS = 12
    STREAMS = 13


@dataclass(frozen=True, slots=True)
class Hello:
    """The dialler's first frame; it would like that many streams."""

    version: int
    name: str
    invitation: bytes
    streams: int = 1


@dataclass(frozen=True, slots=True)
class Welcome:
    """The acceptor's answer to a good Hello."""

    version: int
    name: str


@dataclass(frozen=True, slots=True)
class Deny:
    """The acceptor's answer to a Hello that it turns down; the connection ends."""

    reason: str


@dataclass(frozen=True, slots=True)
class Streams:
    """Before Welcome: the dialler opens a further stream with each of these invitations."""

    invitations: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class WriteFrame:
    """Opens a write; its first `payload` bytes follow. `ident` is unique on the connection."""

    ident: int
    key: int
    generation: int
    tag: int
    lane: int
    slices: Slices
    payload: int


@dataclass(frozen=True, slots=True)
class BatchFrame:
    """Opens writes with consecutive tags, whose bytes come one after another under one `ident`;
    the first `payload` of them follow."""

    ident: int
    key: int
    generation: int
    first_tag: int
    lane: int
    table: SliceTable
    payload: int


@dataclass(frozen=True, slots=True)
class DataFrame:
    """`payload` further bytes of an open write or batch follow."""

    ident: int
    payload: int


@dataclass(frozen=True, slots=True)
class CancelFrame:
    """No further bytes of this open write or batch will come."""

    ident: int


@dataclass(frozen=True, slots=True)
class AckFrame:
    """Writes that ended at the receiver: (ident, code in REFUSALS; 0 is done)."""

    acks: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class ResultsFrame:
    """A batch ended at the receiver, not all alike: a code in REFUSALS for each part."""

    ident: int
    codes: bytes


@dataclass(frozen=True, slots=True)
class RegionFrame:
    """A memfd of `nbytes` bytes comes with this frame's bytes; `region` names it from now on."""

    region: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ForgetFrame:
    """`region` will not be named again."""

    region: int


@dataclass(frozen=True, slots=True)
class BatchFromFrame:
    """Writes, or a single one, whose bytes the receiver takes from a region that it got before.

    `pledge` is the slot of the writer's pledge page that holds `batch.ident` for as long as the
    source may be read.
    """

    batch: BatchFrame
    pledge: int
    region: int
    source: SliceTable


Frame = (
    Hello
    | Welcome
    | Deny
    | Streams
    | WriteFrame
    | BatchFrame
    | DataFrame
    | CancelFrame
    | AckFrame
    | ResultsFrame
    | RegionFrame
    | ForgetFrame
    | BatchFromFrame
)


def _frame(kind: FrameType, body: bytes, payload: int = 0) -> bytes:
    return _PREFIX.pack(kind, 0, len(body), payload) + body


def hello(name: str, invitation: bytes, version: int = STREAM_VERSION, streams: int = 1) -> bytes:
    """Encode Hello."""
    raw = name.encode()
    head = _HELLO.pack(_MAGIC, version, streams - 1, len(raw), invitation)
    return _frame(FrameType.HELLO, head + raw)


def welcome(name: str) -> bytes:
    """Encode Welcome."""
    raw = name.encode()
    return _frame(FrameType.WELCOME, _WELCOME.pack(_MAGIC, STREAM_VERSION, len(raw)) + raw)


def deny(reason: str) -> bytes:
    """Encode Deny; a long reason is cut."""
    raw = reason.encode()[:_DENY_TEXT_BYTES_MAX]
    return _frame(FrameType.DENY, raw)


def streams(invitations: Sequence[bytes]) -> bytes:
    """Encode Streams."""
    return _frame(FrameType.STREAMS, b"".join(invitations))


def write(
    ident: int, key: int, generation: int, tag: int, lane: int, slices: Slices, payload: int
) -> bytes:
    """Encode the head of a WriteFrame; the caller sends the payload behind it."""
    body = _WRITE.pack(ident, key, generation, tag, lane, *slices.fields)
    return _frame(FrameType.WRITE, body, payload)


def batch(
    ident: int,
    key: int,
    generation: int,
    first_tag: int,
    lane: int,
    table: SliceTable,
    payload: int,
) -> bytes:
    """Encode the head of a BatchFrame; the caller sends the payload behind it."""
    body = _batch_body(ident, key, generation, first_tag, lane, table)
    return _frame(FrameType.BATCH, body, payload)


def _batch_body(
    ident: int, key: int, generation: int, first_tag: int, lane: int, table: SliceTable
) -> bytes:
    shape = (table.stride, table.count, table.length, len(table))
    head = _BATCH.pack(ident, key, generation, first_tag, lane, *shape)
    return head + table.to_bytes()


def results(ident: int, codes: bytes) -> bytes:
    """Encode ResultsFrame."""
    return _frame(FrameType.RESULTS, _IDENT.pack(ident) + codes)


def batch_from(
    ident: int,
    key: int,
    generation: int,
    first_tag: int,
    lane: int,
    table: SliceTable,
    pledge: int,
    region: int,
    source: SliceTable,
) -> bytes:
    """Encode BatchFromFrame; the parts of `source` have the sizes of those of `table`."""
    body = _batch_body(ident, key, generation, first_tag, lane, table)
    shape = _SOURCE.pack(pledge, region, source.stride, source.count, source.length)
    return _frame(FrameType.BATCH_FROM, body + shape + source.places_to_bytes())


def data(ident: int, payload: int) -> bytes:
    """Encode the head of a DataFrame."""
    return _frame(FrameType.DATA, _IDENT.pack(ident), payload)


def cancel(ident: int) -> bytes:
    """Encode CancelFrame."""
    return _frame(FrameType.CANCEL, _IDENT.pack(ident))


def acks(entries: Sequence[tuple[int, int]]) -> bytes:
    """Encode up to ACKS_MAX acknowledgements."""
    return _frame(FrameType.ACK, b"".join(_ACK.pack(*entry) for entry in entries))


def region(ident: int, nbytes: int) -> bytes:
    """Encode RegionFrame."""
    return _frame(FrameType.REGION, _REGION.pack(ident, nbytes))


def forget(ident: int) -> bytes:
    """Encode ForgetFrame."""
    return _frame(FrameType.FORGET, _IDENT.pack(ident))


def parse(buffer: memoryview) -> tuple[Frame, int] | None:
    """Decode the frame at the start of `buffer`: the frame and its head's bytes.

    The payload, if any, follows the head. None if the head is not complete yet (heads have at
    most HEAD_BYTES_MAX bytes). Raises MalformedFrame.
    """
    if buffer.nbytes < _PREFIX.size:
        return None
    kind, zero, body_bytes, payload = _PREFIX.unpack_from(buffer)
    decoder = _DECODERS.get(kind)
    if decoder is None or zero != 0:
        raise MalformedFrame(f"unknown frame type {kind}/{zero}")
    if body_bytes > BODY_BYTES_MAX or payload > FRAGMENT_BYTES_MAX:
        raise MalformedFrame(f"frame of {body_bytes} + {payload} bytes is too long")
    if payload and kind not in _WITH_PAYLOAD:
        raise MalformedFrame(f"frame type {kind} has no payload, {payload} bytes announced")
    end = _PREFIX.size + body_bytes
    if buffer.nbytes < end:
        return None
    try:
        frame = decoder(buffer[_PREFIX.size : end], payload)
    except (struct.error, InvalidRequest, UnicodeDecodeError) as error:
        raise MalformedFrame(f"frame type {kind}: {error}") from error
    return frame, end


def head_bytes(buffer: bytes | bytearray | memoryview) -> int:
    """Bytes of the head whose prefix `buffer` starts with, not checked."""
    return PREFIX_BYTES + int(_PREFIX.unpack_from(buffer)[2])


def _name(body: memoryview, start: int, nbytes: int) -> str:
    if not 1 <= nbytes <= PEER_NAME_BYTES_MAX or body.nbytes != start + nbytes:
        raise MalformedFrame(f"a name of {nbytes} bytes in a body of {body.nbytes}")
    return bytes(body[start:]).decode()


def _magic(value: bytes) -> None:
    if value != _MAGIC:
        raise MalformedFrame(f"not this protocol: {value!r}")


def _parse_hello(body: memoryview, payload: int) -> Frame:
    magic, version, further, nbytes, invitation = _HELLO.unpack_from(body)
    _magic(magic)
    if further >= STREAMS_MAX:
        raise MalformedFrame(f"{further} further streams; there are {STREAMS_MAX} at most")
    return Hello(version, _name(body, _HELLO.size, nbytes), invitation, further + 1)


def _parse_welcome(body: memoryview, payload: int) -> Frame:
    magic, version, nbytes = _WELCOME.unpack_from(body)
    _magic(magic)
    return Welcome(version, _name(body, _WELCOME.size, nbytes))


def _parse_deny(body: memoryview, payload: int) -> Frame:
    return Deny(bytes(body[:_DENY_TEXT_BYTES_MAX]).decode(errors="replace"))


def _parse_streams(body: memoryview, payload: int) -> Frame:
    count, rest = divmod(body.nbytes, INVITATION_BYTES)
    if rest or not 1 <= count < STREAMS_MAX:
        raise MalformedFrame(f"invitations of {body.nbytes} bytes to further streams")
    raw = bytes(body)
    return Streams(
        tuple(raw[i : i + INVITATION_BYTES] for i in range(0, len(raw), INVITATION_BYTES))
    )


def _parse_write(body: memoryview, payload: int) -> Frame:
    ident, key, generation, tag, lane, *fields = _WRITE.unpack(body)
    slices = Slices(*fields)
    if not 1 <= slices.nbytes <= WRITE_BYTES_MAX:
        raise MalformedFrame(f"a write of {slices.nbytes} bytes")
    if lane not in _LANES:
        raise MalformedFrame(f"unknown lane {lane}")
    if not 1 <= payload <= slices.nbytes:
        raise MalformedFrame(f"{payload} bytes begin a write of {slices.nbytes}")
    return WriteFrame(ident, key, generation, tag, lane, slices, payload)


def _parse_data(body: memoryview, payload: int) -> Frame:
    if payload == 0:
        raise MalformedFrame("a data frame without data")
    return DataFrame(_IDENT.unpack(body)[0], payload)


def _parse_cancel(body: memoryview, payload: int) -> Frame:
    return CancelFrame(_IDENT.unpack(body)[0])


def _parse_acks(body: memoryview, payload: int) -> Frame:
    if not 1 <= body.nbytes <= ACKS_MAX * _ACK.size:
        raise MalformedFrame(f"acknowledgements of {body.nbytes} bytes")
    entries = tuple((ident, code) for ident, code in _ACK.iter_unpack(body))
    for _, code in entries:
        if code >= len(REFUSALS):
            raise MalformedFrame(f"unknown refusal {code}")
    return AckFrame(entries)


def _parse_region(body: memoryview, payload: int) -> Frame:
    return RegionFrame(*_REGION.unpack(body))


def _parse_forget(body: memoryview, payload: int) -> Frame:
    return ForgetFrame(_IDENT.unpack(body)[0])


def _parse_batch(body: memoryview, payload: int) -> Frame:
    frame, end = _batch_of(body, payload)
    if body.nbytes != end or not 1 <= payload <= frame.table.nbytes:
        raise MalformedFrame(f"{payload} bytes begin a batch of {frame.table.nbytes}")
    return frame


def _parse_batch_from(body: memoryview, payload: int) -> Frame:
    frame, end = _batch_of(body, 0)
    pledge, region_ident, stride, count, length = _SOURCE.unpack_from(body, end)
    # Raises InvalidRequest unless there are as many places as sizes.
    places, sizes = body[end + _SOURCE.size :], frame.table.sizes
    source = SliceTable.from_bytes(stride, count, length, places, sizes)
    return BatchFromFrame(frame, pledge, region_ident, source)


def _batch_of(body: memoryview, payload: int) -> tuple[BatchFrame, int]:
    """The frame, and where its table ends."""
    *head, stride, count, length, parts = _BATCH.unpack_from(body)
    ident, key, generation, first_tag, lane = head
    if not 1 <= parts <= BATCH_WRITES_MAX:
        raise MalformedFrame(f"a batch of {parts} writes")
    end = _BATCH.size + parts * PART_BYTES
    table = SliceTable.from_bytes(stride, count, length, body[_BATCH.size : end])
    if table.size_min < 1 or table.nbytes > WRITE_BYTES_MAX or len(table) != parts:
        raise MalformedFrame(f"a batch of {table.nbytes} bytes, or with an empty write, or cut")
    if lane not in _LANES:
        raise MalformedFrame(f"unknown lane {lane}")
    return BatchFrame(ident, key, generation, first_tag, lane, table, payload), end


def _parse_results(body: memoryview, payload: int) -> Frame:
    codes = bytes(body[_IDENT.size :])
    if not 1 <= len(codes) <= BATCH_WRITES_MAX or max(codes) >= len(REFUSALS):
        raise MalformedFrame(f"results of {len(codes)} writes, or of an unknown code")
    return ResultsFrame(_IDENT.unpack_from(body)[0], codes)


_WITH_PAYLOAD = frozenset((FrameType.WRITE, FrameType.BATCH, FrameType.DATA))
_LANES = frozenset(int(lane) for lane in Lane)

_DECODERS: dict[int, Callable[[memoryview, int], Frame]] = {
    FrameType.HELLO: _parse_hello,
    FrameType.WELCOME: _parse_welcome,
    FrameType.DENY: _parse_deny,
    FrameType.STREAMS: _parse_streams,
    FrameType.WRITE: _parse_write,
    FrameType.DATA: _parse_data,
    FrameType.CANCEL: _parse_cancel,
    FrameType.ACK: _parse_acks,
    FrameType.REGION: _parse_region,
    FrameType.FORGET: _parse_forget,
    FrameType.BATCH_FROM: _parse_batch_from,
    FrameType.BATCH: _parse_batch,
    FrameType.RESULTS: _parse_results,
}

assert _HELLO.size + PEER_NAME_BYTES_MAX <= BODY_BYTES_MAX
assert _ACK.size * ACKS_MAX <= BODY_BYTES_MAX
assert _BATCH.size + _SOURCE.size + 36 * BATCH_WRITES_MAX <= BODY_BYTES_MAX
assert struct.calcsize("16s") == INVITATION_BYTES
