"""Errors cross gRPC and come back as what they were."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from dualpath.proto.channel import client_options
from dualpath.proto.handlers import ErrorInterceptor
from dualpath.proto.status import MESSAGE_CHARS_MAX, Context, error_of, translated
from dualpath.proto.v1 import store_pb2, store_pb2_grpc
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

ERRORS: list[tuple[DualPathError, grpc.StatusCode]] = [
    (InvalidRequest("bad 7", reason="namespace"), grpc.StatusCode.INVALID_ARGUMENT),
    (PermissionDenied("no", reason="ticket_foreign"), grpc.StatusCode.PERMISSION_DENIED),
    (Unavailable("gone"), grpc.StatusCode.UNAVAILABLE),
    (PathDown("stalled"), grpc.StatusCode.UNAVAILABLE),
    (PeerLost("cut"), grpc.StatusCode.UNAVAILABLE),
    (Overloaded("later", retry_after_s=1.25), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
    (LeaseExpired("lease 9"), grpc.StatusCode.FAILED_PRECONDITION),
    (Corrupt("block 3"), grpc.StatusCode.DATA_LOSS),
]


async def _over_grpc(error: BaseException, kind: str) -> grpc.RpcError:
    """What a client gets when a handler of this kind raises."""

    async def taken(request: Any) -> None:
        # A call that ends while its client still sends may end with an error of gRPC's own there.
        if kind.startswith("stream"):
            async for _ in request:
                pass

    async def single(request: Any, context: Context) -> bytes:
        await taken(request)
        raise error

    async def stream(request: Any, context: Context) -> AsyncIterator[bytes]:
        await taken(request)
        yield b"first"
        raise error

    make: dict[str, Callable[..., Any]] = {
        "unary_unary": grpc.unary_unary_rpc_method_handler,
        "stream_unary": grpc.stream_unary_rpc_method_handler,
        "unary_stream": grpc.unary_stream_rpc_method_handler,
        "stream_stream": grpc.stream_stream_rpc_method_handler,
    }
    handler = make[kind](stream if kind.endswith("stream") else single)
    server = grpc.aio.server(interceptors=(ErrorInterceptor(),))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", {"M": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call: Any = getattr(channel, kind)("/t.T/M")
            request: Any = iter([b"x"]) if kind.startswith("stream") else b"x"
            try:
                if kind.endswith("stream"):
                    async for _ in call(request, timeout=10):
                        pass
                else:
                    await call(request, timeout=10)
            except grpc.RpcError as failed:
                return failed
        raise AssertionError("the call succeeded")
    finally:
        await server.stop(None)


def _run(coroutine: Awaitable[grpc.RpcError]) -> grpc.aio.AioRpcError:
    async def main() -> grpc.RpcError:
        return await coroutine

    failed = asyncio.run(main())
    assert isinstance(failed, grpc.aio.AioRpcError)
    return failed


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("kind", ["unary_unary", "stream_stream"])
def test_an_error_comes_back_with_class_reason_and_message(
    error: DualPathError, code: grpc.StatusCode, kind: str
) -> None:
    failed = _run(_over_grpc(error, kind))
    assert failed.code() is code
    back = error_of(failed)
    assert type(back) is type(error)
    assert back.reason == error.reason
    assert str(back) == str(error)
    if isinstance(error, Overloaded):
        assert isinstance(back, Overloaded)
        assert back.retry_after_s == error.retry_after_s


@pytest.mark.parametrize("kind", ["unary_unary", "stream_unary", "unary_stream", "stream_stream"])
def test_a_foreign_exception_is_internal_logged_and_not_shown(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        failed = _run(_over_grpc(RuntimeError("secret path /x"), kind))
    assert failed.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (failed.details() or "")
    assert "secret path /x" in caplog.text
    back = error_of(failed, "Lookup")
    assert type(back) is DualPathError
    assert back.reason == "internal"
    assert str(back).startswith("Lookup: ")


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_message_over_the_limit_is_the_callers_mistake(in_lab: Any, side: str) -> None:
    async def body(lab: Any) -> None:
        target = (await lab.daemon()).where["listen"]
        options = client_options() if side == "client" else (("grpc.max_send_message_length", -1),)
        async with grpc.aio.insecure_channel(target, options=options) as channel:
            stub: Any = store_pb2_grpc.StoreStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                await stub.Lookup(store_pb2.LookupRequest(hashes=bytes(6_799_995)), timeout=20)
        back = error_of(caught.value, "Lookup")
        assert type(back) is InvalidRequest
        assert "6800000 vs. 4194304" in str(back)
        assert "split" in str(back)

    in_lab(body)


def test_a_long_message_is_cut() -> None:
    failed = _run(_over_grpc(InvalidRequest("x" * 5000), "unary_unary"))
    assert len(failed.details() or "") == MESSAGE_CHARS_MAX


def test_a_server_that_is_not_there_is_unavailable() -> None:
    async def main() -> None:
        async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
            call: Any = channel.unary_unary("/t.T/M")
            with translated("Lookup at 127.0.0.1:1"):
                await call(b"", timeout=10)

    with pytest.raises(Unavailable, match=r"Lookup at 127\.0\.0\.1:1"):
        asyncio.run(main())
