"""Tickets: a lease's owner lets another attachment read under the lease.

A ticket names the lease, the attachment and its expiry, under an HMAC-SHA256 with a key made at
each start of the daemon; so it dies with the daemon, and nothing is stored for it. It gives no
more than the lease does: once the lease is gone, reads under the ticket fail.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct

from dualpath.transfer.errors import InvalidRequest, PermissionDenied

PEER_ID_BYTES_MAX = 128
TTL_S_MAX = 600.0

_VERSION = 1
_HEAD = struct.Struct("<BQQB")
"""version, lease id, expiry in ms of the daemon's monotonic clock, bytes of the peer id."""
_MAC_BYTES = hashlib.sha256().digest_size


class TicketMint:
    """Makes and checks the tickets of one daemon process. Thread-safe: it has no state."""

    def __init__(self, key: bytes | None = None) -> None:
        self._key = key if key is not None else secrets.token_bytes(32)

    def issue(self, lease_id: int, peer_id: str, *, ttl_s: float, now: float) -> bytes:
        """A ticket for `peer_id` to read under `lease_id` until `now + ttl_s` seconds."""
        peer = peer_id.encode()
        if not 1 <= len(peer) <= PEER_ID_BYTES_MAX:
            raise InvalidRequest(
                f"peer_id {peer_id[:40]!r} has {len(peer)} bytes; 1..{PEER_ID_BYTES_MAX} are valid"
            )
        if not 0 < ttl_s <= TTL_S_MAX:
            raise InvalidRequest(f"ttl_ms must lie in 1..{TTL_S_MAX * 1000:.0f}, not {ttl_s * 1e3}")
        body = _HEAD.pack(_VERSION, lease_id, int((now + ttl_s) * 1000), len(peer)) + peer
        return body + self._mac(body)

    def lease_of(self, ticket: bytes, peer_id: str, *, now: float) -> int:
        """The lease that `peer_id` may read under.

        Raises PermissionDenied, reason `ticket_forged`, `ticket_foreign` or `ticket_expired`.
        """
        if not _HEAD.size + _MAC_BYTES < len(ticket) <= _HEAD.size + PEER_ID_BYTES_MAX + _MAC_BYTES:
            raise PermissionDenied(
                f"a ticket of {len(ticket)} bytes is forged or cut", reason="ticket_forged"
            )
        body, mac = ticket[:-_MAC_BYTES], ticket[-_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(body)):
            raise PermissionDenied(
                "the ticket is forged, or from before this daemon's start: have it delegated again",
                reason="ticket_forged",
            )
        _, lease_id, expiry_ms, _ = _HEAD.unpack_from(body)
        holder = body[_HEAD.size :].decode()
        if holder != peer_id:
            raise PermissionDenied(
                f"the ticket was issued to {holder!r}, not to {peer_id!r}", reason="ticket_foreign"
            )
        if now * 1000 >= expiry_ms:
            raise PermissionDenied(
                f"the ticket expired {now - expiry_ms / 1000:.3f} s ago", reason="ticket_expired"
            )
        return int(lease_id)

    def _mac(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, "sha256")
