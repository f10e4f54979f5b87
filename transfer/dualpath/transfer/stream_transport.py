"""What tcp and shm have in common: listening, inviting, dialling, peers, windows.

Owns the table of connections, the accepting thread and the handshakes under way (bounded in
number and time). A subclass says how to bind and dial, and builds the two halves of a
connection. The contract is that of `transport.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial

from dualpath.transfer.errors import (
    DeadlineExceeded,
    DualPathError,
    InvalidRequest,
    PeerLost,
    PermissionDenied,
    Unavailable,
)
from dualpath.transfer.invitations import INVITATION_BYTES, Invitations, check_peer_name
from dualpath.transfer.lane import Lane
from dualpath.transfer.ledger import Ledger, PeerCounters
from dualpath.transfer.outbox import Outbox, check_batch, check_write
from dualpath.transfer.pacer import Pacer
from dualpath.transfer.region import Region, RegionDescriptor, check_on_host
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.slices import Slices
from dualpath.transfer.stream_channel import StreamSocket
from dualpath.transfer.stream_connection import Stream, StreamConnection
from dualpath.transfer.stream_frame import MalformedFrame
from dualpath.transfer.stream_gathering import Gatherings
from dualpath.transfer.stream_handshake import (
    HANDSHAKE_S,
    await_welcome,
    introduce,
    receive_hello,
    send_streams,
    send_welcome,
    turn_down,
)
from dualpath.transfer.stream_turns import StreamTurns
from dualpath.transfer.transport import (
    OnArrival,
    OnBatchCompletion,
    OnCompletion,
    OnHashed,
    OnPeerLost,
    PeerTraffic,
    Write,
    WriteBatch,
)
from dualpath.transfer.window import WindowTable

HANDSHAKES_MAX = 128
"""Accepted connections that have not said yet who they are. Of more, the one that has had the most
time is hung up on: whoever speaks at once gets through, however many say nothing."""
HANDSHAKE_S_MIN = 0.2
"""Time that each of them has to speak in any case; meanwhile new callers wait to be accepted."""
JOIN_S = 5.0
ACCEPT_RETRY_MS = 100

_log = logging.getLogger(__name__)


class StreamTransport(ABC):
    """Base of the transports over a stream socket; see the port's contract."""

    def __init__(
        self,
        name_of_self: str,
        on_peer_lost: OnPeerLost,
        *,
        queue_bytes_max: int,
        connections_max: int,
        send_pacer: Pacer,
        receive_pacer: Pacer,
    ) -> None:
        self._own_name = check_peer_name(name_of_self)
        self._on_peer_lost = on_peer_lost
        self._queue_bytes_max = queue_bytes_max
        self._connections_max = connections_max
        self._send_pacer = send_pacer
        self._receive_pacer = receive_pacer
        self._windows = WindowTable()
        self._invitations = Invitations()
        self._gatherings = Gatherings()
        self._ledger = Ledger()
        self._lock = threading.Lock()  # guards what follows
        self._connections: dict[str, StreamConnection] = {}
        self._threads: set[threading.Thread] = set()
        self._ending: set[StreamConnection] = set()
        self._handshakes: dict[socket.socket, tuple[str, float]] = {}  # from where, since when
        self._listener: socket.socket | None = None
        self._address = ""
        self._closed = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    # What differs.

    @property
    @abstractmethod
    def name(self) -> str:
        """`tcp` or `shm`."""

    @abstractmethod
    def _bind(self, address: str) -> tuple[socket.socket, str]:
        """A bound, listening socket and its address."""

    @abstractmethod
    def _dial(self, address: str, deadline: float) -> socket.socket:
        """A connected socket. Raises OSError, or InvalidRequest for the address."""

    def _secure_dialled(
        self, sock: socket.socket, peer: str, address: str, deadline: float
    ) -> StreamSocket:
        """What the dialler says everything by. Raises Unavailable, DeadlineExceeded."""
        return sock

    def _secure_accepted(self, sock: socket.socket, address: str, deadline: float) -> StreamSocket:
        """What the acceptor hears everything by. Raises Unavailable, OSError."""
        return sock

    @abstractmethod
    def _stream(
        self,
        index: int,
        sock: StreamSocket,
        outbox: Outbox,
        counters: PeerCounters,
        turns: StreamTurns,
        stop: threading.Event,
    ) -> Stream:
        """Prepare the socket of a connection's stream `index` and make its halves."""

    @property
    def _streams(self) -> int:
        """How many streams a connection has on our account; the peer may want more."""
        return 1

    def _stream_of(self, lane: Lane) -> int:
        """By which of them the lane goes."""
        return 0

    def _check_source(self, region: Region) -> None:
        """Raise InvalidRequest if `region` cannot be written from."""
        check_on_host(region)

    # Connections.

    @property
    def address(self) -> str:
        """Where peers dial, "" before `listen`."""
        return self._address

    def listen(self, address: str) -> str:
        """See Transport.listen."""
        with self._lock:
            self._check_open()
            if self._listener is not None:
                raise InvalidRequest(f"this transport listens at {self._address} already")
            try:
                self._listener, self._address = self._bind(address)
            except OSError as error:
                raise Unavailable(f"cannot listen at {address!r}: {error}") from error
            self._listener.setblocking(False)
            self._spawn(self._accept, f"dualpath-accept-{self._own_name}")
            return self._address

    def invite(self, peer: str) -> bytes:
        """See Transport.invite."""
        return self._invitations.issue(peer, time.monotonic())

    def connect(self, peer: str, address: str, invitation: bytes, *, deadline_s: float) -> None:
        """See Transport.connect."""
        check_peer_name(peer)
        if len(invitation) != INVITATION_BYTES:
            raise PermissionDenied(
                f"an invitation has {INVITATION_BYTES} bytes, not {len(invitation)}"
            )
        with self._lock:
            self._check_open()
        deadline = time.monotonic() + deadline_s
        socks: list[StreamSocket] = []
        try:
            socks.append(self._dialled(peer, address, deadline))
            secrets = introduce(socks[0], self._own_name, peer, invitation, deadline, self._streams)
            for secret in secrets:
                socks.append(self._dialled(peer, address, deadline))
                introduce(socks[-1], self._own_name, peer, secret, deadline)
            if secrets:
                await_welcome(socks[0], peer, deadline)
            connection = self._connection(socks, peer)
            self._register(connection)
        except BaseException:
            for sock in socks:
                sock.close()
            raise
        connection.start()

    def _dialled(self, peer: str, address: str, deadline: float) -> StreamSocket:
        try:
            sock = self._dial(address, deadline)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{peer!r} at {address} did not answer in time") from error
        except OSError as error:
            raise Unavailable(f"cannot reach {peer!r} at {address}: {error}") from error
        try:
            return self._secure_dialled(sock, peer, address, deadline)
        except BaseException:
            sock.close()
            raise

    def disconnect(self, peer: str) -> None:
        """See Transport.disconnect."""
        with self._lock:
            connection = self._connections.get(peer)
        if connection is not None:
            connection.end("disconnected")

    # Windows.

    def expose(
        self,
        region: Region,
        offset: int,
        nbytes: int,
        on_arrival: OnArrival,
        *,
        on_hashed: OnHashed | None = None,
    ) -> RegionDescriptor:
        """See Transport.expose."""
        return self._windows.expose(region, offset, nbytes, on_arrival, on_hashed=on_hashed)

    def arm(self, window: RegionDescriptor, targets: Sequence[tuple[int, Slices]]) -> None:
        """See Transport.arm."""
        self._windows.arm(window, targets)

    def arm_table(self, window: RegionDescriptor, first_tag: int, targets: SliceTable) -> None:
        """See Transport.arm_table."""
        self._windows.arm_table(window, first_tag, targets)

    def disarm(self, window: RegionDescriptor, tags: Collection[int]) -> frozenset[int]:
        """See Transport.disarm."""
        return self._windows.disarm(window, tags)

    def revoke(self, window: RegionDescriptor) -> None:
        """See Transport.revoke."""
        self._windows.revoke(window)

    def place(self, window: RegionDescriptor, tag: int, target: Slices, source: memoryview) -> str:
        """See Transport.place."""
        return self._windows.place(window, tag, target, source)

    # Writes.

    def write(self, peer: str, write: Write, on_completion: OnCompletion) -> None:
        """See Transport.write."""
        self._submit(peer, write, on_completion, -1)

    def write_truncated(
        self, peer: str, write: Write, nbytes: int, on_completion: OnCompletion
    ) -> None:
        """Send only the first `nbytes` bytes of `write`, then end the connection (for tests)."""
        self._submit(peer, write, on_completion, nbytes)

    def _submit(
        self, peer: str, write: Write, on_completion: OnCompletion, truncate_at: int
    ) -> None:
        check_write(write)
        self._check_source(write.source)
        self._connected(peer).submit(write, on_completion, truncate_at)

    def write_batch(self, peer: str, batch: WriteBatch, on_completion: OnBatchCompletion) -> None:
        """See Transport.write_batch."""
        check_batch(batch)
        self._check_source(batch.source)
        self._connected(peer).submit_batch(batch, on_completion)

    def _connected(self, peer: str) -> StreamConnection:
        with self._lock:
            connection = self._connections.get(peer)
        if connection is None:
            raise PeerLost(f"{peer!r} is not connected")
        return connection

    def traffic(self) -> Sequence[PeerTraffic]:
        """See Transport.traffic."""
        with self._lock:
            queued = {
                peer: connection.queued_bytes for peer, connection in self._connections.items()
            }
        return self._ledger.traffic(queued)

    def close(self) -> None:
        """See Transport.close."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            connections = [*self._connections.values(), *self._ending]
            self._connections.clear()
            threads = list(self._threads)
            for sock in self._handshakes:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        os.eventfd_write(self._wake_fd, 1)
        self._gatherings.close()
        self._windows.close()
        for connection in connections:
            connection.end("closed", closing=True)
        late = [repr(each) for each in connections if not each.join(JOIN_S)]
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(JOIN_S)
                late += [thread.name] if thread.is_alive() else []
        if late:
            _log.error("still running %s s after close: %s", JOIN_S, ", ".join(late))
        os.close(self._wake_fd)

    def __repr__(self) -> str:
        with self._lock:
            peers = ", ".join(sorted(self._connections)) or "no peers"
        return f"<{type(self).__name__} {self._own_name!r} at {self._address!r}: {peers}>"

    # Inside.

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the transport is closed", reason="closed")

    def _connection(self, socks: Sequence[StreamSocket], peer: str) -> StreamConnection:
        stop, turns = threading.Event(), StreamTurns()
        with self._lock:
            connected = dict(self._connections)
        counters = self._ledger.of(peer, connected)
        streams = []
        for index, sock in enumerate(socks):
            outbox = Outbox(peer, self._queue_bytes_max, turns.lanes)
            streams.append(self._stream(index, sock, outbox, counters, turns, stop))
        return StreamConnection(peer, streams, self._stream_of, stop, self._connection_ended)

    def _register(self, connection: StreamConnection) -> None:
        """Make it the peer's connection; the one it had before is lost."""
        while True:
            with self._lock:
                self._check_open()
                old = self._connections.get(connection.peer)
                if old is None:
                    if len(self._connections) >= self._connections_max:
                        raise Unavailable(
                            f"{self._connections_max} peers are connected; raise "
                            "connections_max or disconnect some"
                        )
                    self._connections[connection.peer] = connection
                    return
            old.end("replaced by a new connection")
            with self._lock:
                # Whoever ended it first may still be on the way to removing it.
                if self._connections.get(connection.peer) is old:
                    del self._connections[connection.peer]
                    self._ending.add(old)

    def _connection_ended(self, connection: StreamConnection, reason: str) -> None:
        with self._lock:
            if self._connections.get(connection.peer) is connection:
                del self._connections[connection.peer]
            # Kept until its threads have stopped, so that `close` can join them.
            self._ending = {each for each in self._ending if not each.join(0)}
            self._ending.add(connection)
        _log.info("%s: connection to %r ended: %s", self._own_name, connection.peer, reason)
        try:
            self._on_peer_lost(connection.peer, reason)
        except Exception:  # noqa: BLE001 - a callback of others
            _log.exception("on_peer_lost of %r raised", connection.peer)

    def _spawn(self, target: Callable[[], None], name: str) -> None:
        """Start a thread that `close` joins; called with the lock held."""
        self._threads = {thread for thread in self._threads if thread.is_alive()}
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        self._threads.add(thread)

    def _accept(self) -> None:
        listener = self._listener
        assert listener is not None
        ready, woken = select.poll(), select.poll()
        ready.register(listener, select.POLLIN)
        ready.register(self._wake_fd, select.POLLIN)
        woken.register(self._wake_fd, select.POLLIN)
        with listener:
            while not self._closed:
                ready.poll()
                try:
                    sock, address = listener.accept()
                except BlockingIOError:
                    continue
                except OSError as error:  # out of descriptors, for one: others may give some up
                    _log.warning("%s cannot accept: %s", self._own_name, error)
                    woken.poll(ACCEPT_RETRY_MS)
                    continue
                while (wait_s := self._seconds_to_room()) > 0:
                    woken.poll(wait_s * 1000)
                self._greet_soon(sock, str(address[0]) if address else "")

    def _seconds_to_room(self) -> float:
        """Until one more may be greeted; makes room if that is possible now."""
        with self._lock:
            if self._closed or len(self._handshakes) < HANDSHAKES_MAX:
                return 0.0
            # Of the address that has most: who floods from one does not harm callers from others.
            counts = Counter(address for address, _ in self._handshakes.values())
            most = max(counts, key=lambda address: counts[address])
            sock, since = next(
                (sock, since)
                for sock, (address, since) in self._handshakes.items()
                if address == most
            )
            left = since + HANDSHAKE_S_MIN - time.monotonic()
            if left <= 0:
                del self._handshakes[sock]
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            return max(0.0, left)

    def _greet_soon(self, sock: socket.socket, address: str) -> None:
        reason = "closed"
        with self._lock:
            if not self._closed:
                self._handshakes[sock] = address, time.monotonic()
                try:
                    self._spawn(partial(self._greet, sock, address), "dualpath-greet")
                except RuntimeError as error:  # out of threads
                    self._handshakes.pop(sock, None)
                    reason = str(error)
                else:
                    return
        _log.warning("%s hung up on a caller: %s", self._own_name, reason)
        sock.close()

    def _greet(self, accepted: socket.socket, address: str) -> None:
        sock: StreamSocket = accepted
        try:
            sock = self._secure_accepted(accepted, address, time.monotonic() + HANDSHAKE_S)
            said = receive_hello(sock)
            if (gathering := self._gatherings.take(said.invitation)) is not None:
                send_welcome(sock, self._own_name)
                if not self._gatherings.hand_over(gathering, said.invitation, sock):
                    sock.close()
                return
            peer = self._invitations.redeem(said.invitation, time.monotonic())
            if not peer:
                turn_down(sock, f"no invitation of {said.name!r}: it is wrong, used or expired")
            self._admit(sock, accepted, peer, max(said.streams, self._streams))
        except (OSError, MalformedFrame, DualPathError) as error:
            _log.info("%s turned a caller down: %s", self._own_name, error)
            sock.close()
        finally:
            with self._lock:
                self._handshakes.pop(accepted, None)

    def _admit(self, sock: StreamSocket, accepted: socket.socket, peer: str, streams: int) -> None:
        """Open the connection to a caller that was invited. Raises as the handshake."""
        further: Sequence[StreamSocket] = ()
        connection = None
        try:
            if streams > 1:
                with self._gatherings.open(streams - 1) as gathering:
                    send_streams(sock, gathering.invitations)
                    further = gathering.wait(HANDSHAKE_S)
            connection = self._connection((sock, *further), peer)
            self._register(connection)
            with self._lock:
                # From here on it is the connection's socket; `close` ends that.
                self._handshakes.pop(accepted, None)
            send_welcome(sock, self._own_name)
        except BaseException as error:
            if connection is not None:
                connection.end(f"handshake failed: {error}")
            for each in further:
                each.close()
            raise
        connection.start()


def seconds_left(deadline: float) -> float:
    """Time until `deadline` on the monotonic clock. Raises TimeoutError if there is none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline has passed")
    return left
