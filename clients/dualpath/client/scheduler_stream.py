"""One long-lived stream to the scheduler that is opened again whenever it breaks.

Owns the channel, the wait between two attempts, and whether it is the same run of the scheduler
that answers. What is said on it is its user's business. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio
from dualpath.proto.dial import open_channel
from dualpath.proto.status import error_of
from dualpath.proto.tls import NO_TLS, Tls
from dualpath.proto.v1 import scheduler_pb2_grpc
from dualpath.scheduler.run_name import RUN_KEY
from dualpath.transfer.errors import (
    DeadlineExceeded,
    DualPathError,
    InvalidRequest,
    PermissionDenied,
    Unavailable,
)

RETRY_S_MIN = 0.05
RETRY_S_MAX = 2.0
CONNECT_S_MAX = 10.0
"""For the connection and the scheduler's first word, at each attempt."""
Said = TypeVar("Said")
Told = TypeVar("Told")

log = logging.getLogger(__name__)


class SchedulerStream(Generic[Said, Told]):
    """`call` is "Lead" or "Enqueue". `greet(known)` returns what is said first on each stream,
    `known`: to the same run of the scheduler as before; `hear` gets every answer. `ended` is called
    once if the scheduler refuses for good: wrong input, no right, another leader."""

    def __init__(
        self,
        address: str,
        call: str,
        greet: Callable[[bool], list[Said]],
        hear: Callable[[Told], None],
        ended: Callable[[DualPathError], None],
        *,
        token: str = "",
        tls: Tls = NO_TLS,
    ) -> None:
        self.address = address
        self._greet, self._hear, self._ended = greet, hear, ended
        self._channel = open_channel(address, tls)
        # The stubs know the blocking kind of calls only.
        stub: Any = scheduler_pb2_grpc.SchedulerStub(self._channel)
        self._open: Callable[..., Any] = getattr(stub, call)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._outgoing: asyncio.Queue[Said] = asyncio.Queue()
        self._run = ""
        self._up = asyncio.Event()
        self._failure: DualPathError | None = None
        self._task = asyncio.create_task(self._keep(), name=f"{call} at scheduler {address}")

    @property
    def up(self) -> bool:
        """Whether the scheduler listens now."""
        return self._up.is_set()

    async def ready(self, deadline_s: float) -> None:
        """Wait until the scheduler answers. Raises Unavailable, or why it refuses."""
        waiting = asyncio.ensure_future(self._up.wait())
        try:
            await asyncio.wait(
                {waiting, self._task}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            waiting.cancel()
        if self._failure is not None:
            raise self._failure
        if not self.up:
            raise Unavailable(
                f"no scheduler answers at {self.address} within {deadline_s:g} s: start `dualpath "
                "scheduler`, or correct the address"
            )

    def say(self, message: Said) -> None:
        """Send it, if the stream is up; what is said while it is not belongs into `greet`."""
        if self.up:
            self._outgoing.put_nowait(message)

    async def close(self) -> None:
        """End the stream. Idempotent."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._channel.close()

    async def _keep(self) -> None:
        pause_s = RETRY_S_MIN
        while True:
            try:
                await self._serve()
                error: DualPathError = Unavailable("the scheduler ended the stream")
            except grpc.RpcError as raised:
                error = error_of(raised, f"scheduler {self.address}")
            except DualPathError as raised:
                error = raised
            if self.up:
                pause_s = RETRY_S_MIN
            self._up.clear()
            if _final(error):
                self._failure = error
                self._ended(error)
                return
            log.info("stream to scheduler %s: %s; again in %g s", self.address, error, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(RETRY_S_MAX, 2 * pause_s)

    async def _serve(self) -> None:
        """One stream, from its first to its last word."""
        call = self._open(metadata=self._metadata)
        try:
            run = await _within(_run_of(call))
            if run:
                known, self._run = run == self._run, run
                with contextlib.suppress(asyncio.InvalidStateError):  # it is over: see its status
                    await self._converse(call, self._greet(known))
            code = await _within(call.code())
            if code is not grpc.StatusCode.OK:
                metadata = await call.initial_metadata(), await call.trailing_metadata()
                raise grpc.aio.AioRpcError(code, *metadata, await call.details())
        finally:
            call.cancel()

    async def _converse(self, call: Any, greeting: list[Said]) -> None:
        """Say and hear, until the scheduler ends it."""
        for message in greeting:
            await _within(call.write(message))
        self._outgoing = asyncio.Queue()
        self._up.set()
        writing = asyncio.create_task(self._write(call))
        try:
            while (answer := await call.read()) is not grpc.aio.EOF:
                self._hear(answer)
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    async def _write(self, call: Any) -> None:
        while True:
            await call.write(await self._outgoing.get())


async def _run_of(call: Any) -> str:
    """Which run of the scheduler answers; "": none does."""
    metadata = await call.initial_metadata()
    return str(dict(metadata or ()).get(RUN_KEY, ""))


async def _within(work: Awaitable[Any]) -> Any:
    try:
        async with asyncio.timeout(CONNECT_S_MAX):
            return await work
    except TimeoutError as error:
        raise DeadlineExceeded("the scheduler did not answer in time") from error


def _final(error: DualPathError) -> bool:
    """Whether to open the stream again would not help."""
    return isinstance(error, InvalidRequest | PermissionDenied) or error.reason == "replaced"
