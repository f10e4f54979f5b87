"""How much a prefill node may have coming at this decode node, and how much it has.

Owns the counts: of each peer, and of all peers together that count as one, because they show the
same credential from the same host. Whoever runs the hand-offs sets the shares. Belongs to the loop.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class SharerRoom:
    """What all peers have coming that count as one: `share_bytes` at most."""

    sharer: str
    share_bytes: int = 0
    coming_bytes: int = 0
    peers: int = 0


@dataclass(slots=True, eq=False)
class PeerRoom:
    """What one peer has in the holdings: `coming_bytes` of all its hand-offs, and when any of it
    came last. `share_bytes` is the most that may be coming."""

    moved_at: float
    sharer: SharerRoom
    share_bytes: int = 0
    coming_bytes: int = 0
    intakes: int = 0

    def takes(self, nbytes: int) -> bool:
        """Whether so much more may be coming."""
        sharer = self.sharer
        return (
            self.coming_bytes + nbytes <= self.share_bytes
            and sharer.coming_bytes + nbytes <= sharer.share_bytes
        )

    def add(self, nbytes: int) -> None:
        """So much more is coming, or less."""
        self.coming_bytes += nbytes
        self.sharer.coming_bytes += nbytes
