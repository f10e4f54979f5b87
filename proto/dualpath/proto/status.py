"""The error tree <-> gRPC status, once, for every edge.

Owns the table of codes, the two trailers (`dualpath-reason`, `retry-after-ms`) and the two
directions: servers call `answering` around a handler, clients call `translated` around a call.
An exception that is not of the tree becomes INTERNAL: its trace is logged at the server and not
sent. It knows nothing of the services; deadlines and retries are the callers' business.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio
from dualpath.transfer.errors import (
    Corrupt,
    DeadlineExceeded,
    DualPathError,
    InvalidRequest,
    LeaseExpired,
    Overloaded,
    PathDown,
    PeerLost,
    PermissionDenied,
    Unavailable,
)

REASON_KEY = "dualpath-reason"
RETRY_AFTER_KEY = "retry-after-ms"
MESSAGE_CHARS_MAX = 1000
"""Longer messages are cut: trailers beyond 8 KiB break the call at many proxies."""
RETRY_AFTER_S_DEFAULT = 1.0
_HANDSHAKE = re.compile(r"handshak|certificate|SSL_ERROR|Verification", re.IGNORECASE)
_TOO_LARGE = "message larger than max"

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

_log = logging.getLogger(__name__)

# Most specific first: the first class that matches gives the code.
_CODES: tuple[tuple[type[DualPathError], grpc.StatusCode], ...] = (
    (PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (LeaseExpired, grpc.StatusCode.FAILED_PRECONDITION),
    (Corrupt, grpc.StatusCode.DATA_LOSS),
)
_CLASSES: dict[grpc.StatusCode, type[DualPathError]] = {
    **{code: kind for kind, code in _CODES},
    grpc.StatusCode.UNAUTHENTICATED: PermissionDenied,
    grpc.StatusCode.UNIMPLEMENTED: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.ABORTED: Unavailable,
    grpc.StatusCode.CANCELLED: Unavailable,
}
_BY_REASON: dict[tuple[grpc.StatusCode, str], type[Unavailable]] = {
    (grpc.StatusCode.UNAVAILABLE, PathDown.reason): PathDown,
    (grpc.StatusCode.UNAVAILABLE, PeerLost.reason): PeerLost,
}


def code_of(error: BaseException) -> grpc.StatusCode:
    """The status code of an error; INTERNAL for what is not of the tree."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def trailers_of(error: BaseException) -> tuple[tuple[str, str], ...]:
    """Trailing metadata of an error: its reason and, when throttled, when to retry."""
    reason = error.reason if isinstance(error, DualPathError) else "internal"
    trailers = [(REASON_KEY, reason)]
    if isinstance(error, Overloaded):
        trailers.append((RETRY_AFTER_KEY, str(max(0, round(error.retry_after_s * 1000)))))
    return tuple(trailers)


def message_of(error: BaseException) -> str:
    """What a client may read of an error. Foreign exceptions show their class only."""
    if not isinstance(error, DualPathError):
        return f"internal error ({type(error).__name__}); the server's log has the trace"
    text = str(error)
    return text if len(text) <= MESSAGE_CHARS_MAX else text[: MESSAGE_CHARS_MAX - 3] + "..."


async def abort(context: Context, error: BaseException) -> NoReturn:
    """End a call with an error's status. Never returns."""
    code = code_of(error)
    if code is grpc.StatusCode.INTERNAL:
        _log.error("internal error in a call of %s", context.peer(), exc_info=error)
    await context.abort(code, message_of(error), trailers_of(error))
    raise AssertionError("abort returned")  # unreachable; context.abort always raises


@asynccontextmanager
async def answering(context: Context) -> AsyncIterator[None]:
    """Around a handler's body: turn what it raises into the call's status."""
    try:
        yield
    except (grpc.aio.AbortError, asyncio.CancelledError, GeneratorExit):
        raise
    except Exception as error:  # noqa: BLE001 - the edge: nothing may leak as UNKNOWN
        if context.cancelled() or context.done():
            return  # nobody is left to be told
        await abort(context, error)


def error_of(error: grpc.RpcError, call: str = "") -> DualPathError:
    """The tree's error of a failed call. `call` is prepended to the message if given."""
    code = error.code() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else None
    details = (error.details() or "") if code is not None else str(error)
    trailers = _trailers(error)
    reason = trailers.get(REASON_KEY)
    message = f"{call}: {details}" if call else details
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and reason is None and _TOO_LARGE in details:
        # By gRPC itself, on either side: to send it again would not help.
        return InvalidRequest(f"{message}; split the batch", reason="too_large")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        retry_after_s = _retry_after_s(trailers.get(RETRY_AFTER_KEY))
        return Overloaded(message, retry_after_s=retry_after_s, reason=reason)
    if code is None:
        return DualPathError(message, reason=reason or "internal")
    if code is grpc.StatusCode.UNAVAILABLE and reason is None and _HANDSHAKE.search(details):
        return Unavailable(
            f"{message}; check tls_ca, tls_cert, tls_key and tls_name of both sides", reason="tls"
        )
    kind = _BY_REASON.get((code, reason or ""), _CLASSES.get(code, DualPathError))
    if reason is None:
        reason = "internal" if kind is DualPathError else kind.reason
    return kind(message, reason=reason)


@contextmanager
def translated(call: str = "") -> Iterator[None]:
    """Around a client's call (also an `await` of it): raise the tree's error instead."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_of(error, call) from error


def _trailers(error: grpc.RpcError) -> dict[str, str]:
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return {}
    return {
        str(key): value.decode("ascii", "replace") if isinstance(value, bytes) else value
        for key, value in error.trailing_metadata() or ()
    }


def _retry_after_s(text: str | None) -> float:
    try:
        return max(0.0, int(text) / 1000) if text is not None else RETRY_AFTER_S_DEFAULT
    except ValueError:
        return RETRY_AFTER_S_DEFAULT
