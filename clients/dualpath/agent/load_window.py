"""The window of one load and one path on an engine's memory.

Owns the armed tags, the check of each arrival against the daemon's checksum (on the transport's
thread) and the fence. Guarantees that a verdict is delivered at most once a tag, that bytes with
a wrong checksum never count, and that after `close` nothing more lands in the memory.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dualpath.agent.mailbox import Mailbox
from dualpath.agent.network import Network
from dualpath.kvstore.checksum import of_slices
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import Arrival


@dataclass(frozen=True, slots=True)
class Verdict:
    """A chunk arrived under `tag`; `intact` says whether its checksum holds."""

    window: LoadWindow
    tag: int
    intact: bool


@dataclass(frozen=True, slots=True)
class ArmedChunk:
    """A chunk that may land: `index` in its load, where, and what it must hash to."""

    tag: int
    index: int
    slices: Slices
    checksum: int


class LoadWindow:
    """See the module docstring. All methods belong to the loop."""

    def __init__(
        self,
        load_id: str,
        path: str,
        network: Network,
        region: Region,
        span: tuple[int, int],
        verdicts: Mailbox[Verdict],
    ) -> None:
        self.load_id = load_id
        self.path = path
        self.outstanding: dict[int, int] = {}
        """Index of the chunk by tag, of those whose end is not known."""
        self.armed_at: dict[int, float] = {}
        """When each tag was armed, for those whose end is not known."""
        self.grant_ids: set[int] = set()
        self._network = network
        self._view = region.view
        self._verdicts = verdicts
        self._checksums: dict[int, int] = {}
        start, end = span
        self.descriptor: RegionDescriptor = network.transport.expose(
            region, start, end - start, self._arrived
        )
        self.open = True

    def arm(self, chunks: Sequence[ArmedChunk], now: float) -> None:
        """Let these chunks land."""
        for chunk in chunks:
            self._checksums[chunk.tag] = chunk.checksum
        self._network.transport.arm(
            self.descriptor, [(chunk.tag, chunk.slices) for chunk in chunks]
        )
        for chunk in chunks:
            self.outstanding[chunk.tag] = chunk.index
            self.armed_at[chunk.tag] = now

    def settle(self, tag: int) -> int | None:
        """A verdict on `tag` was taken: its chunk, or None if it was given up before."""
        self._checksums.pop(tag, None)
        self.armed_at.pop(tag, None)
        return self.outstanding.pop(tag, None)

    def fence(self, tags: Collection[int]) -> dict[int, int]:
        """Let these tags land no more. Returns chunk by tag of those that had not landed; a
        verdict on the others is on its way."""
        known = [tag for tag in tags if tag in self.outstanding]
        if not known or not self.open:
            return {}
        unlanded = self._network.transport.disarm(self.descriptor, known)
        for tag in unlanded:
            self._checksums.pop(tag, None)
            self.armed_at.pop(tag, None)
        return {tag: self.outstanding.pop(tag) for tag in unlanded}

    def fence_chunks(self, indices: Collection[int]) -> None:
        """Fence what is in flight of these chunks of the load."""
        wanted = set(indices)
        tags = [tag for tag, index in self.outstanding.items() if index in wanted]
        self.fence(tags)
        for tag in tags:
            self.settle(tag)

    def close(self) -> None:
        """Fence everything, for good. Verdicts that come later are void."""
        if self.open:
            self.open = False
            self._network.transport.revoke(self.descriptor)

    def _arrived(self, arrival: Arrival) -> bool:
        expected = self._checksums.get(arrival.tag)
        if expected is None:
            return False
        intact = of_slices(self._view, arrival.slices) == expected
        self._verdicts.put(Verdict(self, arrival.tag, intact))
        return intact
