"""The local socket: engines of this machine look up, lease and map without gRPC.

Owns a Unix socket, a thread that accepts and one thread a connection: a client that stalls or dies
holds up nobody else, and everything it held is given back when its connection ends. The number of
connections is bounded, in all and of one process; whoever does not say hello in time is cut off.
The arena goes to whoever may read all that can lie in it, sealed: it can be neither written nor
truncated.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable

from dualpath.kvstore import local_protocol as protocol
from dualpath.kvstore.local_frames import LocalFrames
from dualpath.kvstore.local_protocol import ANSWER, Hello, Kind, MalformedMessage, Welcome
from dualpath.kvstore.service.auth import Auth
from dualpath.kvstore.service.gate import Gate
from dualpath.kvstore.service.local_calls import LocalCalls
from dualpath.kvstore.service.local_puts import PUTS_MAX, LocalPuts
from dualpath.kvstore.service.principal import Rights, principal_of_socket, principal_of_uid
from dualpath.kvstore.store_api import Store
from dualpath.transfer.errors import (
    DeadlineExceeded,
    DualPathError,
    InvalidRequest,
    PermissionDenied,
    Unavailable,
)
from dualpath.transfer.unix_path import claim, private_files, remove

CONNECTIONS_MAX = 256
CONNECTIONS_PER_PROCESS_MAX = 64
HELLO_S_MAX = 5.0
"""Longest time from a connection's begin to its hello."""
MESSAGE_S_MAX = 10.0
"""Longest time for one message to come or to be taken."""
FETCHED_S_MAX = 10.0
"""Longest time that a client keeps fetched chunks without saying anything."""
SPIN_S = 200e-6
"""Longest time that a client's next message is waited for without sleeping. A client that asks
again at once gets its answers in two thirds of the time; one that does not costs this once in a
while."""
JOIN_S_MAX = 5.0
LOCAL_OWNER = "local:"
"""What the owner of a connection's leases begins with; its number and its principal follow."""
_BACKLOG = 64
_ACCEPT_AGAIN_S = 0.05
_CREDENTIALS = struct.Struct("3i")

_log = logging.getLogger(__name__)


class LocalSocket:
    """See the module docstring. `start` and `close` once each; `clock` is the store's."""

    def __init__(
        self,
        path: str,
        store: Store,
        auth: Auth,
        gate: Gate,
        *,
        clock: Callable[[], float],
        message_s: float = MESSAGE_S_MAX,
        hello_s: float = HELLO_S_MAX,
        fetched_s: float = FETCHED_S_MAX,
    ) -> None:
        self.path = path
        self._store = store
        self._auth = auth
        self._gate = gate
        self._clock = clock
        self._message_s = message_s
        self._hello_s = hello_s
        self._fetched_s = fetched_s
        self._lock = threading.Lock()
        self._connections: dict[threading.Thread, tuple[LocalFrames, int, str]] = {}
        self._numbers = itertools.count(1)
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._closing = threading.Event()
        self._spin_s = SPIN_S if len(os.sched_getaffinity(0)) > 1 else 0.0
        # One thread at a time: they would keep each other from running.
        self._spinner = threading.Lock()
        self._put_turns = threading.BoundedSemaphore(PUTS_MAX)

    def __len__(self) -> int:
        """Connections."""
        return len(self._connections)

    def drop_principals(self, gone: Callable[[str], bool]) -> None:
        """End the connections of principals that are no more. From any thread."""
        with self._lock:
            connections = list(self._connections.values())
        for frames, _, principal in connections:
            if gone(principal):
                frames.shut()

    def start(self) -> None:
        """Listen. Raises InvalidRequest, Unavailable if the path cannot be bound."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            claim(self.path)
            with private_files():
                listener.bind(self.path)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            raise Unavailable(f"unix: cannot listen on {self.path}: {error}") from error
        except BaseException:
            listener.close()
            raise
        self._listener = listener
        self._acceptor = threading.Thread(
            target=self._accept, args=(listener,), name="local-accept", daemon=True
        )
        self._acceptor.start()

    def close(self) -> None:
        """End all connections and give back what they held. Idempotent."""
        with self._lock:
            listener, self._listener = self._listener, None
            self._closing.set()
        if listener is None or self._acceptor is None:
            return
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept, which a close would not
        self._acceptor.join(JOIN_S_MAX)
        listener.close()
        remove(self.path)
        with self._lock:
            connections = dict(self._connections)
        for frames, _, _ in connections.values():
            frames.shut()
        for thread in connections:
            thread.join(JOIN_S_MAX)
            if thread.is_alive():
                _log.error("%s did not end within %g s", thread.name, JOIN_S_MAX)

    def _accept(self, listener: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = listener.accept()
            except OSError as error:
                if self._closing.is_set():
                    return
                # Out of descriptors, or a client that went at once: others still come.
                _log.warning("a local client could not be accepted: %s", error)
                self._closing.wait(_ACCEPT_AGAIN_S)
                continue
            try:
                self._open(sock)
            except Exception:  # noqa: BLE001 - the socket must go on serving others
                sock.close()
                _log.exception("a local client could not be served")

    def _open(self, sock: socket.socket) -> None:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        process = _CREDENTIALS.unpack(raw)[0]
        frames = LocalFrames(sock, message_s=self._message_s)
        number = next(self._numbers)
        thread = threading.Thread(
            target=self._serve, args=(frames, number), name=f"local-{number}", daemon=True
        )
        with self._lock:
            of_process = sum(pid == process for _, pid, _ in self._connections.values())
            full = len(self._connections) >= CONNECTIONS_MAX
            if self._closing.is_set() or full or of_process >= CONNECTIONS_PER_PROCESS_MAX:
                _log.warning("process %d has %d connections: refused one", process, of_process)
                frames.close()
                return
            self._connections[thread] = frames, process, ""
        thread.start()

    def _serve(self, frames: LocalFrames, number: int) -> None:
        calls: LocalCalls | None = None
        try:
            calls = self._greet(frames, number)
            if calls is not None:
                while self._answer(frames, calls):
                    pass
        except DualPathError as error:
            _log.info("local client %d: %s", number, error)
        except Exception:  # noqa: BLE001 - the end of a thread that nobody waits for
            _log.exception("local client %d was cut off", number)
        finally:
            try:
                if calls is not None:
                    calls.close()
            finally:
                frames.close()
                with self._lock:
                    self._connections.pop(threading.current_thread(), None)

    def _greet(self, frames: LocalFrames, number: int) -> LocalCalls | None:
        """Take the hello; None if the client is refused or has gone."""
        came = frames.receive(protocol.HELLO_BYTES_MAX, idle_s=self._hello_s)
        if came is None:
            return None
        kind, request, body = came
        try:
            if kind != Kind.HELLO:
                raise MalformedMessage(f"a connection begins with a hello, not {kind}")
            hello = Hello.of(body)
            version = hello.version
            principal = self._principal(frames.socket, hello.token)
        except DualPathError as error:
            frames.send(Kind.ERROR, request, protocol.error_parts(error))
            raise
        finally:
            frames.consume(body)
        self._known_as(principal)
        # Who lost his token before he was known here was not found by `drop_principals`.
        self._gate.access.require_admitted(principal)
        arena = self._store.arena
        refusal = self._why_no_arena(principal)
        welcome = Welcome(version, 0 if refusal else arena.nbytes, refusal)
        fds = () if refusal else (arena.fd,)
        frames.send(Kind.HELLO | ANSWER, request, welcome.parts(), fds)
        owner = f"{LOCAL_OWNER}{number}:{principal}"
        puts = LocalPuts(
            self._store,
            self._gate,
            principal=principal,
            owner=owner,
            fds=frames.fds,
            turns=self._put_turns,
        )
        return LocalCalls(
            self._store,
            self._gate,
            principal=principal,
            owner=owner,
            arena=not refusal,
            puts=puts,
            clock=self._clock,
        )

    def _known_as(self, principal: str) -> None:
        thread = threading.current_thread()
        with self._lock:
            frames, process, _ = self._connections[thread]
            self._connections[thread] = frames, process, principal

    def _principal(self, sock: socket.socket, token: bytes) -> str:
        if token:
            header = f"Bearer {token.decode('latin-1')}"
            return self._auth.admit(header, local_socket=True).principal
        found = principal_of_socket(sock)
        if found not in (principal_of_uid(0), principal_of_uid(os.geteuid())):
            raise PermissionDenied(
                f"{found} may not use this daemon's local socket without a token", reason="token"
            )
        return found

    def _why_no_arena(self, principal: str) -> str:
        """Blocks of every namespace can lie in the arena, so that it goes only to a principal that
        may read all, known or not; "" for one that may."""
        if self._store.arena.fd < 0:
            return "the arena is private to the daemon"
        if not self._gate.access.may_everywhere(principal, Rights.READ):
            return (
                f"{principal} may not read every namespace, and the arena holds blocks of all: "
                "ask for a rule that gives it read everywhere, or read over gRPC"
            )
        return ""

    def _answer(self, frames: LocalFrames, calls: LocalCalls) -> bool:
        """Serve one request; False once the client has gone."""
        idle_s = 0.0
        if calls.fetched_at is not None:
            idle_s = calls.fetched_at + self._fetched_s - time.monotonic()
            if idle_s <= 0:
                raise DeadlineExceeded(f"kept fetched chunks for over {self._fetched_s} s")
        elif not calls.awaits_memory:
            self._spin(frames)
        came = frames.receive(
            protocol.REQUEST_BYTES_MAX, idle_s=idle_s, with_fds=calls.awaits_memory
        )
        if came is None:
            return False
        kind, request, body = came
        malformed: InvalidRequest | None = None
        try:
            parts = calls.answer(kind, body)
            kind |= ANSWER
        except MalformedMessage as error:
            malformed = error
            kind, parts = Kind.ERROR, protocol.error_parts(error)
        except DualPathError as error:
            kind, parts = Kind.ERROR, protocol.error_parts(error)
        except Exception as error:  # noqa: BLE001 - the client is told, and goes on
            _log.exception("a request of a local client failed")
            kind, parts = Kind.ERROR, protocol.error_parts(error)
        finally:
            frames.consume(body)
        frames.send(kind, request, parts)
        if malformed is not None:
            raise malformed
        return True

    def _spin(self, frames: LocalFrames) -> None:
        if self._spin_s and self._spinner.acquire(blocking=False):
            try:
                frames.spin(self._spin_s)
            finally:
                self._spinner.release()
