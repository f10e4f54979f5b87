"""One connection of a stream transport: both halves, their threads and their end.

Guarantees that a connection ends once, whoever notices first: pending writes complete, both
threads stop, the socket is closed by the last of them, and the transport is told.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable

from dualpath.transfer.errors import DualPathError
from dualpath.transfer.stream_frame import MalformedFrame
from dualpath.transfer.stream_receiver import PeerClosed, StreamReceiver
from dualpath.transfer.stream_sender import StreamSender, Truncated
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


class StreamConnection:
    """Running from `start` to `end`; the threads are daemons, joined by `join`."""

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        sender: StreamSender,
        receiver: StreamReceiver,
        stop: threading.Event,
        on_end: OnEnd,
    ) -> None:
        self.peer = peer
        self._socket = sock
        self._sender = sender
        self._receiver = receiver
        self._stop = stop
        self._on_end = on_end
        self._ended = threading.Lock()  # taken by whoever ends the connection, never released
        self._threads = (
            threading.Thread(target=self._send, name=f"dualpath-send-{peer}", daemon=True),
            threading.Thread(target=self._receive, name=f"dualpath-receive-{peer}", daemon=True),
        )

    @property
    def queued_bytes(self) -> int:
        """Bytes of writes that have no completion yet."""
        return self._sender.queued_bytes

    def start(self) -> None:
        """Begin to send and to receive."""
        for thread in self._threads:
            thread.start()

    def submit(self, write: Write, on_completion: OnCompletion, truncate_at: int = -1) -> None:
        """Queue a checked write; see StreamSender.submit."""
        self._sender.submit(write, on_completion, truncate_at)

    def submit_batch(self, batch: WriteBatch, on_completion: OnBatchCompletion) -> None:
        """Queue a checked batch; see StreamSender.submit_batch."""
        self._sender.submit_batch(batch, on_completion)

    def end(self, reason: str, *, closing: bool = False) -> None:
        """End the connection; nothing if it has ended. `closing`: by our own `close`."""
        if not self._ended.acquire(blocking=False):
            return
        self._stop.set()
        self._sender.end(WriteStatus.CLOSED if closing else WriteStatus.LOST, reason)
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

    def _send(self) -> None:
        try:
            self._sender.run()
        except (OSError, Truncated) as error:
            self.end(str(error) or type(error).__name__)
        except Exception as error:  # noqa: BLE001 - a bug must not leave it half alive
            _log.exception("sending to %r failed", self.peer)
            self.end(f"internal error: {error}")

    def _receive(self) -> None:
        try:
            self._receiver.run()
        except PeerClosed:
            self.end("closed by the peer")
        except MalformedFrame as error:
            self.end(f"malformed: {error}")
        except (OSError, DualPathError) as error:
            self.end(str(error) or type(error).__name__)
        except Exception as error:  # noqa: BLE001 - as above
            _log.exception("receiving from %r failed", self.peer)
            self.end(f"internal error: {error}")
        self._threads[0].join()
        self._sender.release()
        with contextlib.suppress(OSError):
            self._socket.close()

    def __repr__(self) -> str:
        state = "ended" if self._stop.is_set() else "open"
        return f"<StreamConnection {self.peer!r} {state} queued={self.queued_bytes}>"
