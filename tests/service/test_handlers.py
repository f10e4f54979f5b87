"""What happens before a handler gets its request: admission first, then a message that is one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from dualpath.proto.handlers import BriefReads, ErrorInterceptor, around
from dualpath.proto.status import Context, error_of
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import DeadlineExceeded, InvalidRequest, PermissionDenied

WAIT_S = 20.0
KINDS = ["unary_unary", "stream_unary", "unary_stream", "stream_stream"]
NO_MESSAGE = b"\xff" * 100

_MAKE: dict[str, Callable[..., Any]] = {
    "unary_unary": grpc.unary_unary_rpc_method_handler,
    "stream_unary": grpc.stream_unary_rpc_method_handler,
    "unary_stream": grpc.unary_stream_rpc_method_handler,
    "stream_stream": grpc.stream_stream_rpc_method_handler,
}


def _handler(kind: str, decode: Callable[[bytes], Any]) -> Any:
    """Answers with the hashes of what it gets."""

    async def single(request: Any, context: Context) -> bytes:
        if kind == "unary_unary":
            return bytes(request.hashes)
        return b"".join([message.hashes async for message in request])

    async def stream(request: Any, context: Context) -> AsyncIterator[bytes]:
        if kind == "unary_stream":
            yield bytes(request.hashes)
        else:
            async for message in request:
                yield bytes(message.hashes)

    return _MAKE[kind](stream if kind.endswith("stream") else single, decode)


async def _call(kind: str, handler: Any, message: bytes) -> bytes:
    """The answer of a server with this handler. Raises what the client is told."""
    server = grpc.aio.server(interceptors=(ErrorInterceptor(),))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", {"M": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            made: Any = getattr(channel, kind)("/t.T/M")
            call = made(iter([message]) if kind.startswith("stream") else message, timeout=WAIT_S)
            if kind.endswith("stream"):
                return b"".join([part async for part in call])
            return bytes(await call)
    except grpc.RpcError as failed:
        raise error_of(failed) from None
    finally:
        await server.stop(None)


@pytest.mark.parametrize("kind", KINDS)
def test_handlers_of_all_kinds_get_their_requests(kind: str) -> None:
    message = store_pb2.LookupRequest(hashes=b"abc").SerializeToString()
    handler = _handler(kind, store_pb2.LookupRequest.FromString)
    assert asyncio.run(_call(kind, handler, message)) == b"abc"


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_are_no_message_are_the_callers_mistake_and_no_trace_is_logged(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    handler = _handler(kind, store_pb2.LookupRequest.FromString)
    with caplog.at_level(logging.ERROR), pytest.raises(InvalidRequest, match="100 bytes") as caught:
        asyncio.run(_call(kind, handler, NO_MESSAGE))
    assert caught.value.reason == "malformed"
    # gRPC may still wake the loop of an earlier test, which is closed: that is asyncio's to tell.
    assert not [record for record in caplog.records if record.name != "asyncio"]


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_is_refused_has_his_message_neither_received_nor_parsed(kind: str) -> None:
    parsed = []

    @asynccontextmanager
    async def refuse(context: Context) -> AsyncIterator[None]:
        if context.peer():
            raise PermissionDenied("not you", reason="token")
        yield

    def decode(message: bytes) -> Any:
        parsed.append(message)

    with pytest.raises(PermissionDenied, match="not you"):
        asyncio.run(_call(kind, around(_handler(kind, decode), refuse), NO_MESSAGE))
    assert not parsed


def test_a_call_without_a_message_is_the_callers_mistake() -> None:
    async def body() -> bytes:
        handler = _handler("unary_unary", store_pb2.LookupRequest.FromString)
        server = grpc.aio.server(interceptors=(ErrorInterceptor(),))
        methods = grpc.method_handlers_generic_handler("t.T", {"M": handler})
        server.add_generic_rpc_handlers((methods,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                # A stream of none looks to the server like a call whose message does not come.
                made: Any = channel.stream_unary("/t.T/M")
                return bytes(await made(iter(()), timeout=WAIT_S))
        finally:
            await server.stop(None)

    with pytest.raises(grpc.RpcError) as caught:
        asyncio.run(body())
    assert error_of(caught.value).reason == "malformed"


def test_of_too_many_brief_reads_the_oldest_ends_and_the_newest_gets_through() -> None:
    async def body() -> None:
        reads = BriefReads(2, WAIT_S)
        entered: list[int] = []

        async def stall(index: int) -> None:
            async with reads():
                entered.append(index)
                await asyncio.Event().wait()

        stalled = [asyncio.ensure_future(stall(index)) for index in range(2)]
        while len(entered) < 2:
            await asyncio.sleep(0)
        async with reads():
            pass  # it speaks at once
        with pytest.raises(DeadlineExceeded, match="at once"):
            await asyncio.wait_for(stalled[0], WAIT_S)
        assert not stalled[1].done()
        stalled[1].cancel()

    asyncio.run(body())


def test_a_brief_read_that_does_not_end_is_ended() -> None:
    async def body() -> None:
        async with BriefReads(2, 0.01)():
            await asyncio.get_running_loop().create_future()

    with pytest.raises(DeadlineExceeded):
        asyncio.run(body())
