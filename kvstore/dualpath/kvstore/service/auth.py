"""Who calls: bearer tokens and client certificates over TCP, the file's mode on a Unix socket.

Guarantees that a handler runs only for an admitted caller, whom it finds in `caller_of_call`;
that tokens are compared by their digests, in constant time, and stand in no log or message. It
does not say what a caller may do: that is `access`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import grpc
import grpc.aio
from dualpath.kvstore.service.access_rules import AccessRules
from dualpath.kvstore.service.principal import (
    OPEN,
    principal_of_certificate,
    principal_of_uid,
)
from dualpath.proto.handlers import Around, BriefReads, Handler, Reading, around
from dualpath.proto.status import Context
from dualpath.transfer.errors import PermissionDenied

TOKEN_KEY = "authorization"
_SCHEME = "Bearer "
_OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})
_OPEN_READS_MAX = 32
_OPEN_READ_S = 2.0


@dataclass(frozen=True, slots=True)
class Caller:
    """An admitted caller. `principal` is stable and shows no secret; `local_socket`: it came
    over the Unix socket and can share memory. `peer`: gRPC's name of the connection."""

    principal: str
    local_socket: bool
    peer: str = ""

    @property
    def sharer(self) -> str:
        """As whom it takes its share of what is scarce. Where nobody proves who he is, each
        connection is one: a client that stalls or dies then takes nothing from the others."""
        return f"{OPEN}@{self.peer}" if self.principal == OPEN else self.principal


_caller: ContextVar[Caller] = ContextVar("caller")


def caller_of_call() -> Caller:
    """Who made the call that is being handled."""
    return _caller.get()


def principal_of_call() -> str:
    """His name; "" outside of calls: the daemon itself."""
    caller = _caller.get(None)
    return "" if caller is None else caller.principal


class Auth:
    """Decides from a call's metadata and peer who calls.

    With tokens, TCP callers need one of them or a certificate; callers of the Unix socket may omit
    it, since its file admits only the daemon's user, but a wrong one is refused there too.
    `certificates`: the TLS handshake demands a client certificate. `rules` is asked at each call,
    so that tokens come and go without a restart.
    """

    def __init__(self, rules: Callable[[], AccessRules], *, certificates: bool = False) -> None:
        self._rules = rules
        self._certificates = certificates
        # gRPC does not tell a Unix peer's credentials; but the socket admits nobody else.
        self._local_principal = principal_of_uid(os.geteuid())

    def caller(self, context: Context) -> Caller:
        """The caller of a call. Raises PermissionDenied, reason `token`."""
        header = ""
        for key, value in context.invocation_metadata() or ():
            if key == TOKEN_KEY:
                header = value if isinstance(value, str) else value.decode("latin-1")
        local = context.peer().startswith("unix:")
        certificate = _subject(context) if self._certificates and not local else ""
        caller = self.admit(header, local_socket=local, certificate=certificate)
        return replace(caller, peer=context.peer())

    def admit(self, header: str, *, local_socket: bool, certificate: str = "") -> Caller:
        """The caller that shows this `authorization` header ("" for none) and whose certificate
        names this subject."""
        tokens = self._rules().tokens
        if header and tokens:
            return Caller(_principal_of_header(header, tokens), local_socket)
        if local_socket:
            return Caller(self._local_principal, local_socket)
        if certificate:
            return Caller(principal_of_certificate(certificate), local_socket)
        if tokens:
            raise PermissionDenied(
                "this daemon asks for a token: send metadata 'authorization: Bearer <token>'",
                reason="token",
            )
        return Caller(OPEN, local_socket)


def _principal_of_header(header: str, tokens: Mapping[bytes, str]) -> str:
    if not header.startswith(_SCHEME):
        raise PermissionDenied("authorization must read 'Bearer <token>'", reason="token")
    shown = hashlib.sha256(header.removeprefix(_SCHEME).encode("latin-1", "replace")).digest()
    # All are compared, so that the time does not tell which one was close.
    matches = [name for digest, name in tokens.items() if hmac.compare_digest(shown, digest)]
    if not matches:
        raise PermissionDenied("the token is not one of this daemon's", reason="token")
    return matches[0]


def _subject(context: Context) -> str:
    """What a verified client certificate calls its owner: its common name, else its first
    alternative name; "" without one."""
    properties = context.auth_context()
    for name in ("x509_common_name", "x509_subject_alternative_name"):
        for value in properties.get(name, ()):
            text = bytes(value).decode(errors="replace")
            if text:
                return text
    return ""


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Admits callers before any handler runs or request is received, and lets `enter(caller)` of
    `within` run around it. Health checks are open to everybody, so they have to be brief."""

    def __init__(
        self,
        auth: Auth,
        within: Callable[[Caller], AbstractAsyncContextManager[None]] | None = None,
    ) -> None:
        self._auth = auth
        self._within = within or (lambda _: nullcontext())
        self._around: Around = self._admitted
        self._open_reads: Reading = BriefReads(_OPEN_READS_MAX, _OPEN_READ_S)
        # The handlers of a service do not change: each is wrapped once.
        self._wrapped: dict[str, tuple[Handler, Handler]] = {}

    async def intercept_service(
        self, continuation: Any, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return None
        found = self._wrapped.get(method)
        if found is None or found[0] is not handler:
            if method in _OPEN_METHODS:
                wrapped = around(handler, lambda _: nullcontext(), self._open_reads)
            else:
                wrapped = around(handler, self._around)
            found = self._wrapped[method] = (handler, wrapped)
        return found[1]

    @asynccontextmanager
    async def _admitted(self, context: Context) -> AsyncIterator[None]:
        caller = self._auth.caller(context)
        # Each call has a task of its own, and with it its own value.
        _caller.set(caller)
        async with self._within(caller):
            yield
