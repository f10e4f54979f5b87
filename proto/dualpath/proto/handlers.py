"""Run code around gRPC handlers of any of the four kinds, before the request is received.

gRPC's own interceptor sees neither the peer nor the errors of a handler; `around` replaces the
handler by one that enters an async context manager first. `ErrorInterceptor` uses it to give
every call the status of its error (`dualpath.proto.status`). gRPC receives a single request before
it calls a handler, but the requests of a stream when they are asked for; both look the same on the
wire. So each handler becomes one of a stream: whoever is refused costs no message's memory, and
a message that is none is answered as its sender's mistake.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio
from dualpath.proto.status import Context, answering
from dualpath.transfer.errors import DeadlineExceeded, InvalidRequest
from google.protobuf.message import DecodeError

Around: TypeAlias = Callable[[Context], AbstractAsyncContextManager[None]]
Reading: TypeAlias = Callable[[], AbstractAsyncContextManager[None]]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]
_Take: TypeAlias = Callable[[Any, Context], Awaitable[Any]]
_Decode: TypeAlias = Callable[[bytes], Any]


def around(handler: Handler, enter: Around, reading: Reading | None = None) -> Handler:
    """The same handler, run inside `enter(context)`; a single request is received inside
    `reading()`, within the former."""
    take = _taker(handler, reading)
    encode = handler.response_serializer
    # The registered behaviours are coroutines or async generators, which the stubs do not say.
    inner: Any
    if handler.response_streaming:
        inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
        made: Any = _streaming(inner, enter, take)
        return grpc.stream_stream_rpc_method_handler(made, None, encode)
    inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
    made = _single(inner, enter, take)
    return grpc.stream_unary_rpc_method_handler(made, None, encode)


class BriefReads:
    """`Reading` for requests of anybody: `most` at once, each for `limit_s`. Of too many the one
    that has taken longest is ended: what is sent at once always gets through."""

    def __init__(self, most: int, limit_s: float) -> None:
        self._most = most
        self._limit_s = limit_s
        self._under_way: dict[asyncio.Timeout, None] = {}

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[None]:
        """See the class."""
        try:
            async with asyncio.timeout(self._limit_s) as limit:
                if len(self._under_way) >= self._most:
                    oldest = next(iter(self._under_way))
                    del self._under_way[oldest]
                    oldest.reschedule(0)
                self._under_way[limit] = None
                try:
                    yield
                finally:
                    self._under_way.pop(limit, None)
        except TimeoutError:
            raise DeadlineExceeded("the request did not come at once", reason="stalled") from None


class _Decoded:
    """The messages of a stream of bytes."""

    def __init__(self, messages: AsyncIterator[bytes], decode: _Decode) -> None:
        self._messages = messages
        self._decode = decode

    def __aiter__(self) -> _Decoded:
        return self

    async def __anext__(self) -> Any:
        return _decoded(self._decode, await anext(self._messages))


def _decoded(decode: _Decode, message: bytes) -> Any:
    try:
        return decode(message)
    except DecodeError as error:
        raise InvalidRequest(
            f"{len(message)} bytes are no message of this call: {error}", reason="malformed"
        ) from None


def _taker(handler: Handler, reading: Reading | None) -> _Take | None:
    """What a handler asks for its request; None if it takes the stream as it is."""
    decode = handler.request_deserializer
    if handler.request_streaming:
        if decode is None:
            return None

        async def stream(requests: Any, context: Context) -> Any:
            return _Decoded(requests, decode)

        return stream

    async def single(requests: Any, context: Context) -> Any:
        if reading is None:
            message = await context.read()
        else:
            async with reading():
                message = await context.read()
        if message is grpc.aio.EOF:
            raise InvalidRequest("the call has no message", reason="malformed")
        return message if decode is None else _decoded(decode, message)

    return single


def _single(
    inner: Any, enter: Around, take: _Take | None
) -> Callable[[Any, Context], Awaitable[Any]]:
    async def call(request: Any, context: Context) -> Any:
        async with enter(context):
            if take is not None:
                request = await take(request, context)
            return await inner(request, context)

    return call


def _streaming(inner: Any, enter: Around, take: _Take | None) -> Callable[[Any, Context], Any]:
    async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
        async with enter(context):
            if take is not None:
                request = await take(request, context)
            async for response in inner(request, context):
                yield response

    async def run(request: Any, context: Context) -> None:
        async with enter(context):
            if take is not None:
                request = await take(request, context)
            await inner(request, context)

    # Handlers that answer by `context.write` are coroutines; gRPC tells them apart as we do.
    return generate if inspect.isasyncgenfunction(inner) else run


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Gives every call of our own services the status of the error that its handler raised."""

    def __init__(self) -> None:
        # The handlers of a service do not change: each is wrapped once.
        self._wrapped: dict[str, tuple[Handler, Handler]] = {}

    async def intercept_service(
        self, continuation: Any, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        found = self._wrapped.get(method)
        if found is None or found[0] is not handler:
            found = self._wrapped[method] = (handler, around(handler, answering))
        return found[1]
