"""Work requests as rows of bytes: the form in which a batch of writes is posted with one call.

A request has a row for each piece of local memory, all but the last marked MORE; its first row
has everything else. Rows of many requests lie one after another. The native poster reads them as
they are (`transfer/native/verbs_post.c`); `requests_in` is for implementations that need objects.
Pure.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Sequence

from dualpath.transfer.rdma.verbs import Opcode, Piece, WorkRequest

ROW = struct.Struct("=QQQIIIIII")
"""ident, address, remote address; bytes, lkey, rkey, immediate, opcode, flags."""
SIGNALED, MORE = 1, 2
OPCODES = {
    Opcode.WRITE: 0,
    Opcode.WRITE_IMM: 1,
    Opcode.SEND: 2,
    Opcode.INVALIDATE: 7,
    Opcode.BIND: 8,
}
"""Those of libibverbs (ibv_wr_opcode)."""
WRITE, WRITE_IMM = OPCODES[Opcode.WRITE], OPCODES[Opcode.WRITE_IMM]

_OPCODE_OF = {number: opcode for opcode, number in OPCODES.items()}
_IDENT = struct.Struct("=Q")
_FLAGS_AT = 44 if sys.byteorder == "little" else 47  # the byte of the flags that has SIGNALED

assert ROW.size == 48


def write_rows(pieces: Sequence[tuple[int, int]], lkey: int, remote: int, rkey: int) -> bytes:
    """A WRITE of these pieces, (address, bytes), one after another to `remote`."""
    if len(pieces) == 1:
        address, nbytes = pieces[0]
        return ROW.pack(0, address, remote, nbytes, lkey, rkey, 0, WRITE, 0)
    last = len(pieces) - 1
    return b"".join(
        ROW.pack(0, address, remote, nbytes, lkey, rkey, 0, WRITE, MORE if index < last else 0)
        for index, (address, nbytes) in enumerate(pieces)
    )


def signal(rows: bytearray, at: int, ident: int) -> None:
    """Let the request whose rows begin at `at` complete as `ident`."""
    _IDENT.pack_into(rows, at, ident)
    rows[at + _FLAGS_AT] |= SIGNALED


def rows_of(requests: Iterable[WorkRequest]) -> tuple[bytes, list[object]]:
    """Any requests as rows, and the objects that BINDs name by their place: window, memory."""
    rows = bytearray()
    objects: list[object] = []
    for each in requests:
        opcode, flags = OPCODES[each.opcode], SIGNALED if each.signaled else 0
        pieces = each.pieces
        if each.opcode is Opcode.BIND:
            pieces = (Piece(len(objects), each.nbytes, 0),)
            objects += each.window, each.memory
        elif each.opcode is Opcode.INVALIDATE:
            pieces = (Piece(0, 0, 0),)
        last = len(pieces) - 1
        for index, (address, nbytes, lkey) in enumerate(pieces):
            rows += ROW.pack(
                each.ident,
                address,
                each.remote_address,
                nbytes,
                lkey,
                each.rkey,
                each.immediate,
                opcode,
                flags | (MORE if index < last else 0),
            )
    return bytes(rows), objects


def requests_in(rows: bytes | bytearray) -> list[WorkRequest]:
    """WRITEs and SENDs as objects."""
    found: list[WorkRequest] = []
    pieces: list[Piece] = []
    for ident, address, remote, nbytes, lkey, rkey, immediate, opcode, flags in ROW.iter_unpack(
        rows
    ):
        if not pieces:
            head = ident, _OPCODE_OF[opcode], bool(flags & SIGNALED), remote, rkey, immediate
        pieces.append(Piece(address, nbytes, lkey))
        if not flags & MORE:
            number, kind, told, to, key, said = head
            found.append(WorkRequest(number, kind, told, tuple(pieces), to, key, said))
            pieces = []
    return found
