"""One connection of a stream transport: its streams, their threads and their end.

A stream has two halves. There is one stream, or one for each class of lanes that the network tells
apart. Guarantees that a connection ends once, whoever notices first: pending writes complete, both
threads stop, the socket is closed by the last of them, and the transport is told.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from dualpath.transfer.errors import DualPathError
from dualpath.transfer.lane import Lane
from dualpath.transfer.stream_channel import StreamSocket
from dualpath.transfer.stream_frame import MalformedFrame
from dualpath.transfer.stream_receiver import PeerClosed
from dualpath.transfer.stream_sender import Truncated
from dualpath.transfer.transport import (
    OnBatchCompletion,
    OnCompletion,
    Write,
    WriteBatch,
    WriteStatus,
)

_log = logging.getLogger(__name__)

OnEnd = Callable[["StreamConnection", str], None]
"""Called once, without locks, when a connection ended for any reason but `close`."""


class SendingHalf(Protocol):
    """What a connection needs of the side that writes; StreamSender is the usual one."""

    @property
    def queued_bytes(self) -> int:
        """Bytes of writes that have no completion yet."""

    def submit(self, write: Write, on_completion: OnCompletion, truncate_at: int = -1) -> None:
        """See StreamSender.submit."""

    def submit_batch(self, batch: WriteBatch, on_completion: OnBatchCompletion) -> None:
        """See StreamSender.submit_batch."""

    def run(self) -> None:
        """Send until the connection ends."""

    def end(self, status: WriteStatus, reason: str) -> bool:
        """Complete all pending writes with `status`; False if that was done before."""

    def release(self) -> None:
        """Give up what it holds; called once, after both threads have stopped."""


class ReceivingHalf(Protocol):
    """What a connection needs of the side that receives."""

    def run(self) -> None:
        """Receive until the connection ends."""


@dataclass(frozen=True, slots=True)
class Stream:
    """A socket and who sends and receives by it."""

    sock: StreamSocket
    sender: SendingHalf
    receiver: ReceivingHalf


class StreamConnection:
    """Running from `start` to `end`; the threads are daemons, joined by `join`.

    Writes of a lane go by `streams[stream_of(lane)]`."""

    def __init__(
        self,
        peer: str,
        streams: Sequence[Stream],
        stream_of: Callable[[Lane], int],
        stop: threading.Event,
        on_end: OnEnd,
    ) -> None:
        self.peer = peer
        self._streams = streams
        self._senders = {lane: streams[stream_of(lane)].sender for lane in Lane}
        self._stop = stop
        self._on_end = on_end
        self._ended = threading.Lock()  # taken by whoever ends the connection, never released
        self._threads: list[threading.Thread] = []
        for stream in streams:
            send = partial(self._send, stream)
            sending = threading.Thread(target=send, name=f"dualpath-send-{peer}", daemon=True)
            receive = partial(self._receive, stream, sending)
            name = f"dualpath-receive-{peer}"
            receiving = threading.Thread(target=receive, name=name, daemon=True)
            self._threads += (sending, receiving)

    @property
    def first(self) -> Stream:
        """The first of its streams."""
        return self._streams[0]

    @property
    def queued_bytes(self) -> int:
        """Bytes of writes that have no completion yet."""
        return self.first.sender.queued_bytes

    def start(self) -> None:
        """Begin to send and to receive."""
        for thread in self._threads:
            thread.start()

    def submit(self, write: Write, on_completion: OnCompletion, truncate_at: int = -1) -> None:
        """Queue a checked write; see StreamSender.submit."""
        self._senders[write.lane].submit(write, on_completion, truncate_at)

    def submit_batch(self, batch: WriteBatch, on_completion: OnBatchCompletion) -> None:
        """Queue a checked batch; see StreamSender.submit_batch."""
        self._senders[batch.lane].submit_batch(batch, on_completion)

    def end(self, reason: str, *, closing: bool = False) -> None:
        """End the connection; nothing if it has ended. `closing`: by our own `close`."""
        if not self._ended.acquire(blocking=False):
            return
        self._stop.set()
        for stream in self._streams:
            stream.sender.end(WriteStatus.CLOSED if closing else WriteStatus.LOST, reason)
        if not closing:
            self._on_end(self, reason)

    def join(self, timeout_s: float) -> bool:
        """Wait for the threads, except the caller's own; False if one still runs."""
        for thread in self._threads:
            if thread is not threading.current_thread() and thread.ident is not None:
                thread.join(timeout_s)
        return not any(
            thread.is_alive()
            for thread in self._threads
            if thread is not threading.current_thread()
        )

    def _send(self, stream: Stream) -> None:
        self._run(stream.sender.run)

    def _receive(self, stream: Stream, sending: threading.Thread) -> None:
        self._run(stream.receiver.run)
        sending.join()
        stream.sender.release()
        with contextlib.suppress(OSError):
            stream.sock.close()

    def _run(self, half: Callable[[], None]) -> None:
        try:
            half()
        except PeerClosed:
            self.end("closed by the peer")
        except MalformedFrame as error:
            self.end(f"malformed: {error}")
        except (OSError, DualPathError, Truncated) as error:
            self.end(str(error) or type(error).__name__)
        except Exception as error:  # noqa: BLE001 - a bug must not leave it half alive
            _log.exception("the connection to %r failed", self.peer)
            self.end(f"internal error: {error}")

    def __repr__(self) -> str:
        state = "ended" if self._stop.is_set() else "open"
        return f"<StreamConnection {self.peer!r} {state} queued={self.queued_bytes}>"
