"""What the two ends of an RDMA connection say to each other about the bytes.

Owns the form of the messages, little endian, each in one SEND; pure. `parse` checks everything
that does not depend on the connection's state and raises MalformedFrame.

The writer opens an exchange in a *slot* by `Ask` (or `Cancel`); the receiver answers with `Grant`,
if there is anything to write; the writer writes, the last with the slot as immediate, or says
`Release`; the receiver ends the exchange with `Done`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.slice_table import PART_BYTES, SliceTable
from dualpath.transfer.stream_frame import REFUSALS, MalformedFrame
from dualpath.transfer.transport import BATCH_WRITES_MAX, WRITE_BYTES_MAX

MESSAGE_BYTES_MAX = 6144
SKIP_BYTES = BATCH_WRITES_MAX // 8

_ASK, _CANCEL, _GRANT, _RELEASE, _DONE = range(1, 6)
_HEAD = struct.Struct("<BBHIQ")  # kind, flag, slot, nbytes, ident
_OPENING = struct.Struct("<QIQQQQH")  # key, generation, first tag, stride, count, length, parts
_GRANTED = struct.Struct(f"<QI{SKIP_BYTES}s")
assert _HEAD.size + _OPENING.size + BATCH_WRITES_MAX * PART_BYTES <= MESSAGE_BYTES_MAX


@dataclass(frozen=True, slots=True)
class Opening:
    """What a write, or a batch of them, is: comes with its first bytes."""

    key: int
    generation: int
    first_tag: int
    table: SliceTable


@dataclass(frozen=True, slots=True)
class Ask:
    """May I write the next `nbytes` bytes of write `ident`?"""

    slot: int
    ident: int
    nbytes: int
    opening: Opening | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """No further byte of write `ident` will come."""

    slot: int
    ident: int


@dataclass(frozen=True, slots=True)
class Grant:
    """Write: the region begins at `address`, under `rkey`; bit i of `skip` leaves part i out."""

    slot: int
    address: int
    rkey: int
    skip: bytes


@dataclass(frozen=True, slots=True)
class Release:
    """The grant in this slot will not be used, or no more of it."""

    slot: int


@dataclass(frozen=True, slots=True)
class Done:
    """The exchange is over. `codes` (in REFUSALS) come once the whole write has ended: one for
    each of its parts, or one for all of them."""

    slot: int
    codes: bytes = b""


Message = Ask | Cancel | Grant | Release | Done


def pack(message: Message) -> bytes:
    """The bytes of a message."""
    if isinstance(message, Ask):
        opening = message.opening
        head = _HEAD.pack(_ASK, opening is not None, message.slot, message.nbytes, message.ident)
        return head if opening is None else head + _pack_opening(opening)
    if isinstance(message, Cancel):
        return _HEAD.pack(_CANCEL, 0, message.slot, 0, message.ident)
    if isinstance(message, Grant):
        granted = _GRANTED.pack(message.address, message.rkey, message.skip)
        return _HEAD.pack(_GRANT, 0, message.slot, 0, 0) + granted
    if isinstance(message, Release):
        return _HEAD.pack(_RELEASE, 0, message.slot, 0, 0)
    return _HEAD.pack(_DONE, 0, message.slot, 0, 0) + message.codes


def parse(data: bytes) -> Message:
    """Inverse of `pack`."""
    if len(data) < _HEAD.size:
        raise MalformedFrame(f"a message of {len(data)} bytes")
    kind, flag, slot, nbytes, ident = _HEAD.unpack_from(data)
    rest = data[_HEAD.size :]
    if kind == _ASK:
        if not 1 <= nbytes <= WRITE_BYTES_MAX:
            raise MalformedFrame(f"asked for {nbytes} bytes")
        if flag:
            return Ask(slot, ident, nbytes, _parse_opening(rest))
        _expect_no_more(rest)
        return Ask(slot, ident, nbytes)
    if kind == _GRANT:
        if len(rest) != _GRANTED.size:
            raise MalformedFrame(f"a grant of {len(rest)} bytes")
        return Grant(slot, *_GRANTED.unpack(rest))
    if kind == _DONE:
        if len(rest) > BATCH_WRITES_MAX or any(code >= len(REFUSALS) for code in rest):
            raise MalformedFrame("a verdict that is too long or unknown")
        return Done(slot, rest)
    _expect_no_more(rest)
    if kind == _CANCEL:
        return Cancel(slot, ident)
    if kind == _RELEASE:
        return Release(slot)
    raise MalformedFrame(f"a message of the unknown kind {kind}")


def _expect_no_more(rest: bytes) -> None:
    if rest:
        raise MalformedFrame(f"{len(rest)} bytes behind a message")


def _pack_opening(opening: Opening) -> bytes:
    table = opening.table
    head = _OPENING.pack(
        opening.key,
        opening.generation,
        opening.first_tag,
        table.stride,
        table.count,
        table.length,
        len(table),
    )
    return head + table.to_bytes()


def _parse_opening(rest: bytes) -> Opening:
    if len(rest) < _OPENING.size:
        raise MalformedFrame(f"an opening of {len(rest)} bytes")
    key, generation, first_tag, stride, count, length, parts = _OPENING.unpack_from(rest)
    if not 1 <= parts <= BATCH_WRITES_MAX or len(rest) != _OPENING.size + parts * PART_BYTES:
        raise MalformedFrame(f"a batch of {parts} writes in {len(rest)} bytes")
    try:
        table = SliceTable.from_bytes(stride, count, length, rest[_OPENING.size :])
    except InvalidRequest as error:
        raise MalformedFrame(str(error)) from error
    if table.size_min < 1 or table.nbytes > WRITE_BYTES_MAX:
        raise MalformedFrame(f"a batch of {table.nbytes} bytes, or with an empty part")
    if first_tag + parts > 1 << 64:
        raise MalformedFrame(f"tags from {first_tag} on")
    return Opening(key, generation, first_tag, table)
