"""Principals: the name under which a connection acts, and what it may do.

A principal is a text whose scheme says how it was proved: `uid:1000` (credentials of a Unix
socket), `token:NAME` (a bearer token), `cert:NAME` (a client certificate) or `open` (loopback, or
`insecure`, where nobody is asked). Owns the spelling and its limits; decides nothing.
"""

from __future__ import annotations

import enum
import hashlib
import socket
import struct

from dualpath.transfer.errors import InvalidRequest

PRINCIPAL_BYTES_MAX = 96
"""As much as a block's record keeps of its writer."""
OPEN = "open"
_TOKEN = "token:"
_CREDENTIALS = struct.Struct("3i")


class Rights(enum.Flag):
    """What a rule gives. READ: look up, lease, read. WRITE: reserve and seal. ADMIN: invalidate,
    and with all namespaces also drain and see who uses the daemon."""

    NONE = 0
    READ = enum.auto()
    WRITE = enum.auto()
    ADMIN = enum.auto()


ALL_RIGHTS = Rights.READ | Rights.WRITE | Rights.ADMIN


def principal_of_uid(uid: int) -> str:
    """Of a user of this machine."""
    return f"uid:{uid}"


def principal_of_socket(connection: socket.socket) -> str:
    """Who is at the other end of a Unix socket, by SO_PEERCRED: the user that connected it."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    return principal_of_uid(uid)


def principal_of_token(name: str) -> str:
    """Of a named token."""
    return checked_principal(f"{_TOKEN}{name}")


def principal_of_digest(digest: bytes) -> str:
    """Of a token without a name: a part of its SHA-256 that tells nothing of it."""
    return f"{_TOKEN}{digest[:6].hex()}"


def is_of_token(principal: str) -> bool:
    """Whether it was proved by a token."""
    return principal.startswith(_TOKEN)


def principal_of_certificate(name: str) -> str:
    """Of a client certificate whose subject is `name`; long names end in a digest instead."""
    clean = "".join(char if char.isprintable() else "?" for char in name)
    principal = f"cert:{clean}"
    if len(principal.encode()) > PRINCIPAL_BYTES_MAX:
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        kept = principal.encode()[: PRINCIPAL_BYTES_MAX - len(digest) - 1]
        principal = f"{kept.decode(errors='ignore')}~{digest}"
    return principal


def checked_principal(principal: str) -> str:
    """Raises InvalidRequest for one that a block's record cannot hold."""
    if len(principal.encode()) > PRINCIPAL_BYTES_MAX or not principal.isprintable():
        raise InvalidRequest(
            f"principal {principal[:40]!r}: {len(principal.encode())} bytes; printable text of at "
            f"most {PRINCIPAL_BYTES_MAX} bytes is valid"
        )
    return principal
