"""Run code around gRPC handlers of any of the four kinds, with the call's context at hand.

gRPC's own interceptor sees neither the peer nor the errors of a handler; `around` replaces the
handler by one that enters an async context manager first. `ErrorInterceptor` uses it to give
every call the status of its error (`dualpath.proto.status`).
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeAlias

import grpc
import grpc.aio
from dualpath.proto.status import Context, answering

Around: TypeAlias = Callable[[Context], AbstractAsyncContextManager[None]]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]


def around(handler: Handler, enter: Around) -> Handler:
    """The same handler, run inside `enter(context)`."""
    coders = (handler.request_deserializer, handler.response_serializer)
    # The registered behaviours are coroutines or async generators, which the stubs do not say.
    behaviour: Any
    if handler.request_streaming and handler.response_streaming:
        behaviour = _streaming(handler.stream_stream, enter)
        return grpc.stream_stream_rpc_method_handler(behaviour, *coders)
    if handler.request_streaming:
        behaviour = _single(handler.stream_unary, enter)
        return grpc.stream_unary_rpc_method_handler(behaviour, *coders)
    if handler.response_streaming:
        behaviour = _streaming(handler.unary_stream, enter)
        return grpc.unary_stream_rpc_method_handler(behaviour, *coders)
    behaviour = _single(handler.unary_unary, enter)
    return grpc.unary_unary_rpc_method_handler(behaviour, *coders)


def _single(inner: Any, enter: Around) -> Callable[[Any, Context], Awaitable[Any]]:
    async def call(request: Any, context: Context) -> Any:
        async with enter(context):
            return await inner(request, context)

    return call


def _streaming(inner: Any, enter: Around) -> Callable[[Any, Context], Any]:
    async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
        async with enter(context):
            async for response in inner(request, context):
                yield response

    async def run(request: Any, context: Context) -> None:
        async with enter(context):
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
