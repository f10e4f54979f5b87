"""Invitations: who may open a connection here, once, within a short time.

Pure apart from drawing random bytes; `now` is passed in. Thread-safe.
"""

from __future__ import annotations

import secrets
import threading

from dualpath.transfer.errors import InvalidRequest, Overloaded
from dualpath.transfer.transport import INVITATION_TTL_S

INVITATION_BYTES = 16
INVITATIONS_MAX = 4096
PEER_NAME_BYTES_MAX = 200


def check_peer_name(name: str) -> str:
    """Return `name`; InvalidRequest unless it has 1 to PEER_NAME_BYTES_MAX bytes of UTF-8."""
    if not 1 <= len(name.encode()) <= PEER_NAME_BYTES_MAX:
        raise InvalidRequest(
            f"a peer's name has 1 to {PEER_NAME_BYTES_MAX} bytes, not {len(name.encode())}"
        )
    return name


class Invitations:
    """Outstanding invitations, oldest first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._peers: dict[bytes, tuple[str, float]] = {}

    def issue(self, peer: str, now: float) -> bytes:
        """A secret that lets `peer` connect once."""
        check_peer_name(peer)
        with self._lock:
            self._drop_expired(now)
            if len(self._peers) >= INVITATIONS_MAX:
                raise Overloaded(
                    f"{INVITATIONS_MAX} invitations are outstanding", retry_after_s=1.0
                )
            secret = secrets.token_bytes(INVITATION_BYTES)
            self._peers[secret] = (peer, now + INVITATION_TTL_S)
            return secret

    def redeem(self, secret: bytes, now: float) -> str:
        """Use up an invitation: the name of the peer it was issued to, "" unless it is live."""
        with self._lock:
            self._drop_expired(now)
            peer, _ = self._peers.pop(secret, ("", 0.0))
            return peer

    def _drop_expired(self, now: float) -> None:
        # All live equally long, so the oldest entry expires first.
        while self._peers:
            secret = next(iter(self._peers))
            if self._peers[secret][1] > now:
                return
            del self._peers[secret]
