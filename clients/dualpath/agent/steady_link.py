"""A session with another process that is made again whenever it was lost.

Owns, for one peer: the gRPC channel, the attachment of the data plane (Attach, then dial with
the invitation) and one long-lived stream with its reader and writer. After a loss everything is
torn down, the dialect is told, and a new attempt follows after a growing pause. Knows nothing of
what the messages mean: that is the dialect's.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import grpc
import grpc.aio
from dualpath.agent.network import Network
from dualpath.proto.dial import open_channel
from dualpath.proto.status import translated
from dualpath.proto.tls import NO_TLS, Tls
from dualpath.proto.v1 import common_pb2
from dualpath.transfer.errors import DualPathError, PathDown, Unavailable

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
RequestT_co = TypeVar("RequestT_co", covariant=True)
ResponseT_contra = TypeVar("ResponseT_contra", contravariant=True)

OUTGOING_MAX = 4096
"""Most messages that wait for the stream; beyond it the peer counts as lost."""
PAUSE_S_MIN = 0.05
SPACING_S = 0.05
"""Between two attempts at least, also when somebody waits for the next one."""
CLOSE_S_MAX = 2.0
"""How long a channel may take to close; a process that ends closes it anyhow."""

log = logging.getLogger(__name__)

Metadata = tuple[tuple[str, str], ...]


def metadata_of(token: str) -> Metadata:
    """Call metadata that shows `token` ("" for none)."""
    return (("authorization", f"Bearer {token}"),) if token else ()


class LinkState(enum.Enum):
    """Where the session stands."""

    CONNECTING = "connecting"
    UP = "up"
    DOWN = "down"
    """Between two attempts."""
    CLOSED = "closed"


class Dialect(Protocol[RequestT_co, ResponseT_contra]):
    """The calls of one service, and what to do with its messages. Called in the loop."""

    def bind(self, channel: grpc.aio.Channel) -> None:
        """Make the stubs on a fresh channel."""

    async def attach(
        self, request: common_pb2.AttachRequest, *, timeout: float, metadata: Metadata
    ) -> common_pb2.AttachResponse:
        """Call Attach."""

    def open_stream(self, *, metadata: Metadata) -> Any:
        """Open the long-lived stream (a grpc.aio.StreamStreamCall)."""

    def hello(self, attached: common_pb2.AttachResponse) -> RequestT_co:
        """The first message of the stream."""

    async def prepare(self, attached: common_pb2.AttachResponse, first: ResponseT_contra) -> None:
        """`first` answered `hello`; what this raises refuses the session."""

    def on_up(self) -> None:
        """The session is there: messages can be sent."""

    def on_response(self, response: ResponseT_contra) -> None:
        """A later message came."""

    def on_down(self, reason: str) -> None:
        """The session was lost after `on_up`; nothing that was asked for will be answered."""


@dataclass(frozen=True, slots=True)
class Way:
    """How the other side can be reached: its control address, our networks by the name of their
    transport, in order of preference, and the number of its rail that they lead to."""

    target: str
    networks: Mapping[str, Network]
    rail: int = 0


class SteadyLink(Generic[RequestT, ResponseT]):
    """See the module docstring. Each new attempt goes by the next of its ways, of which there is
    one, to `target`, unless `set_ways` has told of more."""

    def __init__(
        self,
        label: str,
        target: str,
        dialect: Dialect[RequestT, ResponseT],
        networks: Mapping[str, Network],
        *,
        name: str,
        token: str,
        tls: Tls = NO_TLS,
        timeout_s: float,
        pause_s_max: float,
        rail: int = 0,
    ) -> None:
        self.label = label
        self.at = 0
        """By which of its ways it goes, or was tried last."""
        self.peer = ""
        """Name of the other side in `network`, while up."""
        self.network: Network | None = None
        self.attached: common_pb2.AttachResponse | None = None
        self.state = LinkState.CONNECTING
        self.reason = "not connected yet"
        """Why it is not up, for people."""
        self.metadata = metadata_of(token)
        self._tls = tls
        self._dialect = dialect
        self._ways: Sequence[Way] = (Way(target, networks, rail),)
        self._name = name
        self._timeout_s = timeout_s
        self._pause_s_max = pause_s_max
        self._outgoing: deque[RequestT] = deque()
        self._wake = asyncio.Event()
        self._lost = asyncio.Event()
        self._loss = ""
        self._settled = asyncio.Event()
        self._risen = asyncio.Event()
        self._resting = False
        """Between attempts, until somebody is in a `_hurry`."""
        self._hurry = asyncio.Event()
        self._attempt = 0
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to connect."""
        self._task = asyncio.create_task(self._run(), name=f"link to {self.label}")

    async def settled(self, timeout_s: float) -> bool:
        """Wait until the attempt that is under way came to an end; say whether the link is up.

        Returns at once between attempts, so that an absent peer costs its callers nothing.
        """
        if self.state is LinkState.CONNECTING:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), timeout_s)
        return self.up

    async def tried(self, timeout_s: float) -> bool:
        """As `settled`, but between attempts the next one begins now: for what has no other way to
        go, and would fail though the peer is back."""
        if self._resting:
            self._begin_attempt()
            self._hurry.set()
        return await self.settled(timeout_s)

    async def wait_up(self, timeout_s: float) -> bool:
        """Wait until the link is up, over several attempts if need be; False if time ran out."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._risen.wait(), timeout_s)
        return self.up

    def set_ways(self, ways: Sequence[Way]) -> None:
        """What there is from the next attempt on, in the order in which they are tried."""
        assert ways
        self._ways = tuple(ways)

    @property
    def up(self) -> bool:
        """Whether messages can be sent."""
        return self.state is LinkState.UP

    def send(self, request: RequestT) -> None:
        """Queue a message for the stream. Raises PathDown if the link is not up."""
        if not self.up:
            raise PathDown(f"{self.label} is not connected: {self.reason}")
        if len(self._outgoing) >= OUTGOING_MAX:
            self.lose("outgoing queue full")
            raise PathDown(f"{self.label} does not read its stream")
        self._outgoing.append(request)
        self._wake.set()

    def lose(self, reason: str) -> None:
        """Give the session up and make it again."""
        if self.state is not LinkState.CLOSED and not self._lost.is_set():
            self._loss = reason
            self._lost.set()
            self._wake.set()

    async def close(self) -> None:
        """End the session for good."""
        self._closing = True
        self.state = LinkState.CLOSED
        while self._task is not None and not self._task.done():
            # Again, if a wait that ended at the same moment has swallowed it.
            self._task.cancel()
            await asyncio.wait((self._task,), timeout=CLOSE_S_MAX)
        self._settled.set()

    async def _run(self) -> None:
        pause_s = PAUSE_S_MIN
        while not self._closing:
            self._begin_attempt()
            was_up = False
            try:
                was_up = await self._session()
            except DualPathError as error:
                self._note(str(error))
            except (grpc.RpcError, TimeoutError) as error:
                self._note(str(error) or f"no answer within {self._timeout_s:g} s")
            except Exception:  # the loop must go on: the next attempt may succeed
                log.exception("link to %s failed", self.label)
                self._note("internal error")
            self.at = (self.at + 1) % len(self._ways)
            if was_up:
                self._begin_attempt()
                pause_s = PAUSE_S_MIN
            elif not self._closing:
                self.state = LinkState.DOWN
                self._settled.set()
            await self._pause(pause_s * random.uniform(0.7, 1.0))
            pause_s = min(pause_s * 2, self._pause_s_max)

    async def _pause(self, pause_s: float) -> None:
        """Until the next attempt; once one is wanted, for SPACING_S at most."""
        self._hurry.clear()
        self._resting = True
        spacing_s = min(SPACING_S, pause_s)
        await asyncio.sleep(spacing_s)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), pause_s - spacing_s)
        self._resting = False

    def _begin_attempt(self) -> None:
        if not self._closing:
            self.state = LinkState.CONNECTING
            self._settled.clear()

    def _note(self, reason: str) -> None:
        if reason != self.reason:
            log.warning("%s: %s is not reachable: %s", self._name, self.label, reason)
        self.reason = reason

    async def _session(self) -> bool:
        """One session from attach to loss; True if it was up."""
        self._attempt += 1
        self._outgoing.clear()
        self._lost.clear()
        self._loss = ""
        peer = f"{self.label}#{self._attempt}"
        self.at %= len(self._ways)
        way = self._ways[self.at]
        stack = contextlib.AsyncExitStack()
        async with stack:
            channel = open_channel(way.target, self._tls)
            stack.push_async_callback(_closed, channel)
            self._dialect.bind(channel)
            with translated(f"attach to {self.label}"):
                attached = await self._dialect.attach(
                    common_pb2.AttachRequest(
                        name=self._name, transports=list(way.networks), rail=way.rail
                    ),
                    timeout=self._timeout_s,
                    metadata=self.metadata,
                )
            network = way.networks.get(attached.transport)
            if network is None:
                raise Unavailable(
                    f"{self.label} chose transport {attached.transport!r}; "
                    f"known are {', '.join(way.networks)}"
                )
            network.watch(peer, lambda reason: self.lose(f"data connection: {reason}"))
            stack.callback(network.forget, peer)
            await network.connect(
                peer, attached.address, attached.invitation, deadline_s=self._timeout_s
            )
            call = self._dialect.open_stream(metadata=self.metadata)
            stack.callback(call.cancel)
            with translated(f"stream to {self.label}"):
                async with asyncio.timeout(self._timeout_s):
                    await call.write(self._dialect.hello(attached))
                    first = await call.read()
                    if first is grpc.aio.EOF:
                        details = await call.details()
                        raise Unavailable(f"{self.label} closed the stream: {details}")
            self.peer, self.network, self.attached = peer, network, attached
            await self._dialect.prepare(attached, first)
            if self._lost.is_set():
                raise Unavailable(f"{self.label} was lost while it was set up: {self._loss}")
            self.state = LinkState.UP
            self.reason = ""
            self._settled.set()
            self._risen.set()
            self._dialect.on_up()
            log.info("%s: %s is up (%s)", self._name, self.label, attached.transport)
            await self._serve(call)
        return True

    async def _serve(self, call: Any) -> None:
        reader = asyncio.create_task(self._read(call), name=f"reader of {self.label}")
        writer = asyncio.create_task(self._write(call), name=f"writer to {self.label}")
        lost = asyncio.create_task(self._lost.wait(), name=f"loss of {self.label}")
        tasks = (reader, writer, lost)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Most losses are short: who asks from now on waits for the first new attempt.
            self._begin_attempt()
            self._risen.clear()
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            errors = [str(r) for r in results if isinstance(r, Exception)]
            reason = self._loss or "; ".join(errors) or "the stream ended"
            self.reason = reason
            self.attached = None
            self._dialect.on_down(reason)
            if self._closing:
                log.info("%s: %s is closed", self._name, self.label)
            else:
                log.warning("%s: lost %s: %s", self._name, self.label, reason)

    async def _read(self, call: Any) -> None:
        with translated(f"stream of {self.label}"):
            while True:
                response = await call.read()
                if response is grpc.aio.EOF:
                    return
                self._dialect.on_response(response)

    async def _write(self, call: Any) -> None:
        with translated(f"stream of {self.label}"):
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._outgoing:
                    await call.write(self._outgoing.popleft())


async def _closed(channel: grpc.aio.Channel) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(channel.close(None), CLOSE_S_MAX)
