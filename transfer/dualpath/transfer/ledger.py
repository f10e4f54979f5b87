"""Counters of what was exchanged with each peer, kept beyond the life of a connection."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from dualpath.transfer.transport import PeerTraffic

PEERS_MAX = 4096
"""Peers remembered; the ones seen first are forgotten, unless they are connected."""


class PeerCounters:
    """Counters of one peer. `received` is touched by the receiver only, `sent` by the sender."""

    __slots__ = ("received_bytes", "received_writes", "refused_writes", "sent_bytes")

    def __init__(self) -> None:
        self.sent_bytes = 0
        self.received_bytes = 0
        self.received_writes = 0
        self.refused_writes = 0


class Ledger:
    """All peers of one transport."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._peers: dict[str, PeerCounters] = {}

    def of(self, peer: str, connected: Mapping[str, object]) -> PeerCounters:
        """The counters of `peer`, made on first sight."""
        with self._lock:
            counters = self._peers.get(peer)
            if counters is None:
                if len(self._peers) >= PEERS_MAX:
                    self._forget_one(connected)
                counters = self._peers[peer] = PeerCounters()
            return counters

    def traffic(self, queued_bytes: Mapping[str, int]) -> list[PeerTraffic]:
        """A snapshot; `queued_bytes` has one entry for each connected peer."""
        with self._lock:
            return [
                PeerTraffic(
                    peer=peer,
                    connected=peer in queued_bytes,
                    sent_bytes=counters.sent_bytes,
                    received_bytes=counters.received_bytes,
                    queued_bytes=queued_bytes.get(peer, 0),
                    refused_writes=counters.refused_writes,
                    received_writes=counters.received_writes,
                )
                for peer, counters in self._peers.items()
            ]

    def _forget_one(self, connected: Mapping[str, object]) -> None:
        for peer in self._peers:
            if peer not in connected:
                del self._peers[peer]
                return
