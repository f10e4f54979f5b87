"""The engine of one RDMA connection: its queue pairs, and the thread that posts and polls.

Owns the channels and the completion queue; hands completions to the writing and the landing side.
Everything that touches the device goes through its thread, but for `halt`. It waits on three
descriptors at once: the completion channel, the socket over which both ends met (its end is the
peer's end), and its own wake-up. Guarantees: a fence returns in bounded time, if need be by
halting the queue pairs, which ends the connection.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from dualpath.transfer.errors import PeerLost, Unavailable
from dualpath.transfer.lane import Lane
from dualpath.transfer.ledger import PeerCounters
from dualpath.transfer.outbox import Outbox, deliver
from dualpath.transfer.rdma import verbs
from dualpath.transfer.rdma.channel import Channel, receives_of
from dualpath.transfer.rdma.config import RdmaConfig
from dualpath.transfer.rdma.grant import Leave
from dualpath.transfer.rdma.lander import RdmaLander
from dualpath.transfer.rdma.meeting import meet
from dualpath.transfer.rdma.messages import Ask, Cancel, Done, Grant, Message, Release
from dualpath.transfer.rdma.port_choice import ChosenPort
from dualpath.transfer.rdma.registration_cache import RegistrationCache
from dualpath.transfer.rdma.verbs import (
    Device,
    PathSettings,
    QueuePairAddress,
    Received,
    WorkCompletion,
)
from dualpath.transfer.rdma.writer import Ended, RdmaWriter
from dualpath.transfer.stream_frame import MalformedFrame
from dualpath.transfer.stream_receiver import PeerClosed
from dualpath.transfer.transport import (
    OnBatchCompletion,
    OnCompletion,
    Write,
    WriteBatch,
    WriteStatus,
)

POLL_MAX = 64
FENCE_TURN_S = 0.05
"""How long the engine's own thread, in a fence, waits for one completion."""

_log = logging.getLogger(__name__)


class RdmaEngine:
    """The sending half of a connection (see StreamConnection), and the thread of both."""

    def __init__(
        self,
        sock: socket.socket,
        outbox: Outbox,
        device: Device,
        chosen: ChosenPort,
        registrations: RegistrationCache,
        counters: PeerCounters,
        lander: RdmaLander,
        config: RdmaConfig,
    ) -> None:
        self._socket = sock
        self._outbox = outbox
        self._device = device
        self._config = config
        self._chosen = chosen
        self._lander = lander
        self._lock = threading.Lock()  # guards the outbox, `_ended`, `_commands`
        self._ended = False
        self._commands: deque[Callable[[], None]] = deque()
        self._writer = RdmaWriter(
            outbox,
            self._lock,
            registrations,
            counters,
            fragment_bytes=config.fragment_bytes,
            inflight_bytes_max=config.inflight_bytes_max,
        )
        self._hardware = threading.Lock()  # held to halt or free the queue pairs
        self._halted = False
        self._failure = ""
        self._patience_s = config.fence_wait_s
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._waking = threading.Lock()  # held to use or close `_wake_fd`
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._channels: list[Channel] = []
        self._queue = self._make_channels()
        self._by_number = {channel.number: channel for channel in self._channels}
        self._poll = select.poll()
        for fd in (self._queue.fileno(), sock.fileno(), self._wake_fd):
            self._poll.register(fd, select.POLLIN)

    def _make_channels(self) -> verbs.CompletionQueue:
        classes = self._config.classes()
        sends = min(self._device.info.requests_max, 1024)
        depth = len(classes) * (sends + receives_of(self._config.slots))
        queue = self._device.completion_queue(min(depth, self._device.info.completions_max))
        try:
            for _ in classes:
                self._channels.append(
                    Channel(self._device, queue, self._chosen, self._config.slots)
                )
        except BaseException:
            for channel in self._channels:
                channel.halt()
                channel.close()
            queue.close()
            os.close(self._wake_fd)
            raise
        return queue

    # The sending half; any thread.

    @property
    def queued_bytes(self) -> int:
        """Bytes of writes that have no completion yet."""
        return self._outbox.queued_bytes

    def submit(self, write: Write, on_completion: OnCompletion, truncate_at: int = -1) -> None:
        """Queue a checked write. Raises Overloaded, or PeerLost once ended."""
        with self._lock:
            self._check_open()
            pending = self._outbox.add(write, on_completion, time.monotonic())
            pending.truncate_at = truncate_at
        self._wake()

    def submit_batch(self, batch: WriteBatch, on_completion: OnBatchCompletion) -> None:
        """Queue a checked batch. Raises as `submit`."""
        with self._lock:
            self._check_open()
            self._outbox.add_batch(batch, on_completion, time.monotonic())
        self._wake()

    def end(self, status: WriteStatus, reason: str) -> bool:
        """Complete all pending writes with `status`; False if that was done before."""
        with self._lock:
            if self._ended:
                return False
            self._ended = True
        self.halt()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._lock:
            ended = self._writer.drain(status, reason)
        self._wake()
        self._lander.wake()
        self._ready.set()
        for each in ended:
            deliver(self._outbox.peer, each.pending, each.status, each.detail, each.refused)
        return True

    def release(self) -> None:
        """Free everything; called once, after both threads have stopped."""
        self.halt()
        with self._hardware:
            self._writer.release()
            self._lander.release()
            for channel in self._channels:
                channel.close()
            self._queue.close()
        with self._waking:
            os.close(self._wake_fd)
            self._wake_fd = -1

    def wait_ready(self, deadline: float) -> bool:
        """Wait until the queue pairs are joined, or the connection has ended; whether it lives."""
        self._ready.wait(max(0.0, deadline - time.monotonic()))
        return self._ready.is_set() and not self._ended

    def _check_open(self) -> None:
        if self._ended:
            raise PeerLost(f"the connection to {self._outbox.peer!r} has ended")

    def _wake(self) -> None:
        with self._waking:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def _command(self, command: Callable[[], None]) -> None:
        """Let the engine's thread carry something out."""
        with self._lock:
            self._commands.append(command)
        if threading.current_thread() is not self._thread:
            self._wake()

    # Fences; any thread.

    def halt(self) -> None:
        """Stop the queue pairs: no byte goes in or out of memory once this has returned."""
        with self._hardware:
            if not self._halted:
                for channel in self._channels:
                    try:
                        channel.halt()
                    except Unavailable:
                        _log.exception("a queue pair to %r cannot be reset", self._outbox.peer)
                self._halted = True
        self._lander.halted()

    def fence(self, leave: Leave) -> None:
        """Return once nothing more is written under `leave`: because the writer is done, or its
        memory window was withdrawn, or else the queue pairs were halted."""
        if self._await_end(leave, self._patience_s):
            return
        self._patience_s = 0.0  # who did not come to an end once is not waited for again
        if leave.window is not None:
            self._command(partial(self._lander.withdraw, leave))
            if self._await_end(leave, self._config.withdraw_wait_s):
                return
        self._failure = "a fence: the peer did not come to the end of its writes"
        _log.warning("the connection to %r ends for %s", self._outbox.peer, self._failure)
        self.halt()
        self._wake()

    def _await_end(self, leave: Leave, seconds: float) -> bool:
        if threading.current_thread() is not self._thread:
            return leave.ended.wait(0 if self._halted else seconds) or self._halted
        # In a callback on the engine's own thread: nobody else would hear of the end.
        until = time.monotonic() + seconds
        while not leave.ended.is_set() and not self._halted:
            try:
                busy = self._turn() or self._sleep(FENCE_TURN_S)
            except Exception as error:  # noqa: BLE001 - `run` raises it, not the callback
                self._failure = str(error) or type(error).__name__
                self.halt()
                break
            if not busy and time.monotonic() >= until:
                return leave.ended.is_set()
        return True

    # The thread.

    def run(self) -> None:
        """Meet the peer, then post and poll until the connection ends.

        Raises PeerClosed, MalformedFrame, OSError, Truncated or Unavailable.
        """
        self._thread = threading.current_thread()
        try:
            slots = meet(
                self._socket,
                self._config.slots,
                [channel.own for channel in self._channels],
                self._join,
            )
            self._socket.setblocking(False)
            slots = min(slots, self._config.slots)
            self._lander.begin(slots, self._say_done, self.fence)
            of_lane = {lane: self._channels[self._config.index_of(lane)] for lane in Lane}
            self._writer.begin(of_lane, slots)
            self._ready.set()
            while not self._ended:
                busy = self._turn()
                self._deliver()
                if self._failure:
                    raise Unavailable(self._failure, reason="fenced")
                if not busy and not self._writer.ended:
                    self._sleep(self._idle_s())
        except Unavailable:
            if not self._ended:
                raise
        finally:
            self._deliver()

    def _join(self, peers: Sequence[QueuePairAddress]) -> None:
        for channel, peer, (level, traffic) in zip(
            self._channels, peers, self._config.classes(), strict=True
        ):
            path = PathSettings(
                port=self._chosen.port.number,
                gid_index=self._chosen.gid.row,
                service_level=level,
                traffic_class=traffic,
                retries=self._config.retries,
                receiver_retries=self._config.retries,
                timeout_exponent=self._config.timeout_exponent,
            )
            channel.join(peer, path)

    def _turn(self) -> bool:
        """Everything that can be done now; whether there was anything."""
        if self._halted:
            return False
        with self._lock:
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:
            command()
        now = time.monotonic()
        self._writer.expire(now, self._config.grace_s)
        self._writer.ask()
        busy = bool(commands)
        for channel in self._channels:
            busy |= channel.flush()
        completions = self._queue.poll(POLL_MAX)
        for completion in completions:
            self._handle(completion)
        if not completions and (silent_until := self._silent_until()) and now >= silent_until:
            raise Unavailable(
                f"the device has completed nothing for {self._config.silent_s} s: the peer does "
                "not answer"
            )
        return busy or bool(completions)

    def _silent_until(self) -> float | None:
        """When the device has been silent for too long, if it does not complete something."""
        since = [at for channel in self._channels if (at := channel.waiting_since) is not None]
        return min(since) + self._config.silent_s if since else None

    def _handle(self, completion: WorkCompletion) -> None:
        channel = self._by_number.get(completion.queue_pair)
        if completion.status != verbs.SUCCESS or channel is None:
            if self._halted:
                return
            name = verbs.STATUS_NAMES.get(completion.status, "see ibv_wc_status")
            raise Unavailable(f"work completion with status {completion.status} ({name})")
        if completion.what is Received.MESSAGE:
            self._hear(channel, channel.received(completion.ident, completion.nbytes))
        elif completion.what is Received.IMMEDIATE:
            channel.received_immediate(completion.ident)
            self._lander.written(completion.immediate)
        else:
            channel.completed(completion.ident)

    def _hear(self, channel: Channel, message: Message) -> None:
        if isinstance(message, Ask):
            self._lander.asked(channel, message)
        elif isinstance(message, Grant):
            self._writer.granted(message)
        elif isinstance(message, Done):
            self._writer.done(message)
        elif isinstance(message, Cancel):
            self._lander.cancelled(channel, message)
        elif isinstance(message, Release):
            self._lander.released(message)
        else:
            raise MalformedFrame(f"unexpected {type(message).__name__}")

    def _say_done(self, channel: Channel, done: Done) -> None:
        """Called by the landing thread."""
        self._command(lambda: channel.say(done))

    def _deliver(self) -> None:
        while self._writer.ended:
            each: Ended = self._writer.ended.popleft()
            deliver(self._outbox.peer, each.pending, each.status, each.detail, each.refused)

    def _idle_s(self) -> float:
        with self._lock:
            if self._commands:
                return 0.0
            moments = [self._writer.next_deadline(), self._silent_until()]
        known = [moment for moment in moments if moment is not None]
        return max(0.0, min(known) - time.monotonic()) if known else math.inf

    def _sleep(self, seconds: float) -> bool:
        """Wait until something happens; False if nothing did."""
        if self._halted:
            return False
        self._queue.arm()
        completions = self._queue.poll(POLL_MAX)
        for completion in completions:
            self._handle(completion)
        if completions:
            return True
        timeout_ms = None if seconds == math.inf else math.ceil(seconds * 1000)
        found = self._poll.poll(timeout_ms)
        for fd, _ in found:
            if fd == self._wake_fd:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
            elif fd == self._queue.fileno():
                self._queue.acknowledge()
            elif not self._ended:
                self._hang_up()
        return bool(found)

    def _hang_up(self) -> None:
        """The socket says something: that the peer is gone, or what does not belong there."""
        with contextlib.suppress(BlockingIOError):
            if self._socket.recv(1):
                raise MalformedFrame("bytes on the socket after the queue pairs were joined")
            for completion in self._queue.poll(POLL_MAX):
                self._handle(completion)  # which may name the cause
            raise PeerClosed
