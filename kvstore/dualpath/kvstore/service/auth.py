"""Who may call: bearer tokens over TCP, the file's permissions on a Unix socket.

Guarantees that a handler runs only for an admitted caller, and that tokens are compared in
constant time. It does not bind callers to namespaces and does not encrypt.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from dualpath.proto.handlers import around
from dualpath.proto.status import Context
from dualpath.transfer.errors import PermissionDenied

TOKEN_KEY = "authorization"
_SCHEME = "Bearer "
_OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})


@dataclass(frozen=True, slots=True)
class Caller:
    """An admitted caller. `principal` is stable and shows no secret; `local_socket`: it came
    over the Unix socket and can share memory."""

    principal: str
    local_socket: bool


class Auth:
    """Decides from a call's metadata and peer who calls.

    With tokens, TCP callers need one of them; callers of the Unix socket may omit it, since its
    file admits only the daemon's user, but a wrong one is refused there too.
    """

    def __init__(self, tokens: tuple[str, ...]) -> None:
        self._digests = tuple(hashlib.sha256(token.encode()).digest() for token in tokens)

    def caller(self, context: Context) -> Caller:
        """The caller of a call. Raises PermissionDenied, reason `token`."""
        header = ""
        for key, value in context.invocation_metadata() or ():
            if key == TOKEN_KEY:
                header = value if isinstance(value, str) else value.decode("latin-1")
        return self.admit(header, local_socket=context.peer().startswith("unix:"))

    def admit(self, header: str, *, local_socket: bool) -> Caller:
        """The caller that shows this `authorization` header ("" for none)."""
        if not self._digests:
            return Caller("unix" if local_socket else "open", local_socket)
        if not header:
            if local_socket:
                return Caller("unix", local_socket)
            raise PermissionDenied(
                "this daemon asks for a token: send metadata 'authorization: Bearer <token>'",
                reason="token",
            )
        if not header.startswith(_SCHEME):
            raise PermissionDenied("authorization must read 'Bearer <token>'", reason="token")
        shown = hashlib.sha256(header.removeprefix(_SCHEME).encode("latin-1", "replace")).digest()
        # All are compared, so that the time does not tell which one was close.
        matches = [hmac.compare_digest(shown, digest) for digest in self._digests]
        if not any(matches):
            raise PermissionDenied("the token is not one of this daemon's", reason="token")
        return Caller(f"token:{shown[:6].hex()}", local_socket)


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Admits callers before any handler runs. Health checks are open to everybody."""

    def __init__(self, auth: Auth) -> None:
        self._auth = auth

    async def intercept_service(
        self, continuation: Any, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method in _OPEN_METHODS:
            return handler
        return around(handler, self._admitted)

    @asynccontextmanager
    async def _admitted(self, context: Context) -> AsyncIterator[None]:
        self._auth.caller(context)
        yield
