"""Connections of several streams while they are opened: who may join one, and who has.

The dialler of a connection gets an invitation to each further stream and dials again with it.
Owns these invitations, good once and while their connection waits, and the sockets that came
until their connection takes them. Thread-safe.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Iterator, Sequence

from dualpath.transfer.errors import Unavailable
from dualpath.transfer.invitations import INVITATION_BYTES
from dualpath.transfer.stream_channel import StreamSocket


class Gathering:
    """The further streams of one connection."""

    def __init__(self, changed: threading.Condition, streams: int) -> None:
        self.invitations = tuple(secrets.token_bytes(INVITATION_BYTES) for _ in range(streams))
        self._changed = changed
        self.came: dict[bytes, StreamSocket] = {}
        self.ended = False

    def wait(self, timeout_s: float) -> Sequence[StreamSocket]:
        """The sockets, in the order of `invitations`; they are the caller's now.

        Raises Unavailable if not all came in time.
        """
        with self._changed:
            count = len(self.invitations)
            self._changed.wait_for(lambda: self.ended or len(self.came) == count, timeout_s)
            if self.ended or len(self.came) < count:
                raise Unavailable(f"{len(self.came)} of {count} further streams came in time")
            socks = [self.came[secret] for secret in self.invitations]
            self.came = {}
            return socks


class Gatherings:
    """Those under way."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards all of this
        self._by_secret: dict[bytes, Gathering] = {}
        self._open: set[Gathering] = set()
        self._closed = False

    @contextlib.contextmanager
    def open(self, streams: int) -> Iterator[Gathering]:
        """A gathering for as long as the context lasts. Raises Unavailable once closed."""
        gathering = Gathering(self._changed, streams)
        with self._changed:
            if self._closed:
                raise Unavailable("the transport is closed", reason="closed")
            self._open.add(gathering)
            self._by_secret |= dict.fromkeys(gathering.invitations, gathering)
        try:
            yield gathering
        finally:
            with self._changed:
                gathering.ended = True
                self._open.discard(gathering)
                for secret in gathering.invitations:
                    self._by_secret.pop(secret, None)
                left = list(gathering.came.values())
                gathering.came = {}
            for sock in left:
                sock.close()

    def take(self, secret: bytes) -> Gathering | None:
        """Use up an invitation: who waits for it, None if nobody does."""
        with self._changed:
            return self._by_secret.pop(secret, None)

    def hand_over(self, gathering: Gathering, secret: bytes, sock: StreamSocket) -> bool:
        """Give the connection the socket that came with `secret`; False if it is too late."""
        with self._changed:
            if gathering.ended:
                return False
            gathering.came[secret] = sock
            self._changed.notify_all()
            return True

    def close(self) -> None:
        """No more: those that wait are told."""
        with self._changed:
            self._closed = True
            for gathering in self._open:
                gathering.ended = True
            self._changed.notify_all()
