"""Where engines hand their memory over: a Unix socket beside the engines' gRPC socket.

Owns the socket, the check of who connects (the same user, or root) and of what is sent (a memfd
sealed against shrinking, of the announced size). A registration answers with an unguessable
handle and lives as long as the connection: when the engine dies or closes it, its loads are
aborted and fenced and its memory is unmapped.

Messages are fixed: 24 bytes each way, see `_REQUEST` and `_ANSWER`; the memfd travels with the
request by SCM_RIGHTS. An error's text follows its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from dualpath.agent.regions import Regions
from dualpath.transfer.errors import DualPathError, InvalidRequest, PermissionDenied, Unavailable
from dualpath.transfer.memfd_channel import close_fds, receive_with_fds, send_with_fds
from dualpath.transfer.region import Region
from dualpath.transfer.unix_path import claim, private_files, remove

MAGIC = b"dpregs01"
_REQUEST = struct.Struct("<8sBBxxxxxxQ")  # magic, operation, behind_compute_link, bytes or handle
_ANSWER = struct.Struct("<8sBxxxHxxQ")  # magic, ok, bytes of text that follow, handle
TEXT_BYTES_MAX = 2000
CONNECTIONS_MAX = 256
REGIONS_PER_CONNECTION_MAX = 256
ANSWER_S_MAX = 10.0
ACCEPT_AGAIN_S = 0.05
"""Pause after a connection that could not be accepted."""
_UCRED = struct.Struct("3i")

log = logging.getLogger(__name__)


class Operation(enum.IntEnum):
    """What a request asks for."""

    REGISTER = 1
    DROP = 2


@dataclass(slots=True, eq=False)
class _Engine:
    """One connected engine and what it registered."""

    sock: socket.socket
    pid: int
    handles: set[int] = field(default_factory=set)


class RegionSocket:
    """The agent's side. Belongs to the loop."""

    def __init__(self, path: str, regions: Regions, loop: asyncio.AbstractEventLoop) -> None:
        self.path = path
        self._regions = regions
        self._loop = loop
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Listen. Raises Unavailable if the path cannot be bound."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            claim(self.path)
            with private_files():
                listener.bind(self.path)
            listener.listen(64)
        except OSError as error:
            listener.close()
            raise Unavailable(f"cannot listen on {self.path}: {error}") from error
        listener.setblocking(False)
        self._listener = listener
        self._start(self._accept(listener), "region socket")

    async def close(self) -> None:
        """Stop, dropping all memory of the connected engines."""
        if self._listener is None:
            return
        self._listener.close()
        self._listener = None
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        remove(self.path)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = await self._loop.sock_accept(listener)
            except OSError as error:
                # Out of descriptors, or an engine that went at once: others still come.
                log.warning("an engine could not be accepted: %s", error)
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            sock.setblocking(False)
            if len(self._tasks) > CONNECTIONS_MAX:
                sock.close()
                log.warning("more than %d engines: one was turned away", CONNECTIONS_MAX)
                continue
            self._start(self._serve(sock), "engine")

    async def _serve(self, sock: socket.socket) -> None:
        engine = _Engine(sock, -1)
        try:
            engine.pid = _checked_peer(sock)
            while await self._request(engine):
                pass
        except (OSError, DualPathError) as error:
            log.warning("engine %d: %s", engine.pid, error)
        finally:
            for handle in tuple(engine.handles):
                self._regions.drop(handle)
            sock.close()
            if engine.handles:
                log.info("engine %d left; its memory was dropped", engine.pid)

    async def _request(self, engine: _Engine) -> bool:
        """Serve one request; False when the engine has gone."""
        message = bytearray(_REQUEST.size)
        fds: list[int] = []
        try:
            got = 0
            while got < len(message):
                await _readable(self._loop, engine.sock)
                try:
                    count, more = receive_with_fds(engine.sock, memoryview(message)[got:])
                except BlockingIOError:
                    continue
                fds += more
                if count == 0:
                    return False
                got += count
            try:
                handle = self._handle(engine, message, fds)
                answer = _ANSWER.pack(MAGIC, 1, 0, handle)
            except DualPathError as error:
                text = f"{error.reason}|{error}".encode()[:TEXT_BYTES_MAX]
                answer = _ANSWER.pack(MAGIC, 0, len(text), 0) + text
        finally:
            close_fds(fds)
        await asyncio.wait_for(self._loop.sock_sendall(engine.sock, answer), ANSWER_S_MAX)
        return True

    def _handle(self, engine: _Engine, message: bytearray, fds: list[int]) -> int:
        magic, operation, behind, value = _REQUEST.unpack(message)
        if magic != MAGIC:
            raise InvalidRequest(f"not a request of this version: {bytes(magic)!r}")
        if operation == Operation.DROP:
            if value not in engine.handles:
                raise InvalidRequest(f"no such region of this connection: {value:#x}")
            engine.handles.discard(value)
            self._regions.drop(value)
            return int(value)
        if operation != Operation.REGISTER:
            raise InvalidRequest(f"unknown operation {operation}")
        if len(fds) != 1:
            raise InvalidRequest(f"a registration carries one memfd, not {len(fds)} descriptors")
        if len(engine.handles) >= REGIONS_PER_CONNECTION_MAX:
            raise InvalidRequest(f"at most {REGIONS_PER_CONNECTION_MAX} regions a connection")
        region = Region.received(fds.pop(), value, writable=True)
        entry = self._regions.add(region, behind_compute_link=bool(behind), owned=True)
        engine.handles.add(entry.handle)
        return entry.handle

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class RegionClient:
    """The engine's side. Blocking, with a deadline; thread-safe."""

    def __init__(self, path: str) -> None:
        self._lock = threading.Lock()  # an answer belongs to the request before it
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(ANSWER_S_MAX)
        try:
            self._sock.connect(path)
        except OSError as error:
            self._sock.close()
            raise Unavailable(f"no agent takes memory at {path}: {error}") from error

    def register(self, region: Region, *, behind_compute_link: bool) -> int:
        """Hand a memfd region over; returns its handle. Raises InvalidRequest, Unavailable."""
        request = _REQUEST.pack(MAGIC, Operation.REGISTER, behind_compute_link, region.nbytes)
        return self._ask(request, [region.fd])

    def drop(self, handle: int) -> None:
        """Take a region back: it is fenced when this returns. An agent that has gone counts."""
        with contextlib.suppress(Unavailable):
            self._ask(_REQUEST.pack(MAGIC, Operation.DROP, 0, handle), [])

    @property
    def lost(self) -> bool:
        """Whether the agent has closed the connection, or has gone."""
        with self._lock:
            if self._sock.fileno() < 0:
                return True
            waiting = select.poll()
            waiting.register(self._sock, select.POLLIN)
            return bool(waiting.poll(0))  # nothing is said unasked

    def close(self) -> None:
        """Drop everything that was registered here."""
        self._sock.close()

    def _ask(self, request: bytes, fds: list[int]) -> int:
        with self._lock:
            try:
                sent = send_with_fds(self._sock, [request], fds)
                self._sock.sendall(request[sent:])
                magic, ok, text_bytes, handle = _ANSWER.unpack(self._receive(_ANSWER.size))
                text = self._receive(text_bytes).decode(errors="replace")
            except OSError as error:
                self._sock.close()  # a late answer must not be taken for another's
                raise Unavailable(f"the agent's region socket is gone: {error}") from error
        if magic != MAGIC:
            raise InvalidRequest("the agent's region socket speaks another version")
        if not ok:
            reason, _, detail = text.partition("|")
            raise InvalidRequest(detail, reason=reason)
        return int(handle)

    def _receive(self, nbytes: int) -> bytes:
        parts = bytearray()
        while len(parts) < nbytes:
            part = self._sock.recv(nbytes - len(parts))
            if not part:
                raise ConnectionResetError("closed by the agent")
            parts += part
        return bytes(parts)


async def _readable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock, wake)
    try:
        await ready
    finally:
        loop.remove_reader(sock)


def _checked_peer(sock: socket.socket) -> int:
    """Process id of the peer. Raises PermissionDenied unless it is our user or root."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(raw)
    if uid not in (0, os.getuid()):
        raise PermissionDenied(f"process {pid} of user {uid} may not share memory with this agent")
    return int(pid)
