"""The window of one load and one path on an engine's memory.

Owns the armed tags, the check of each arrival against the daemon's checksum (on the transport's
thread) and the fence. Guarantees that a verdict is delivered at most once a tag, that bytes with
a wrong checksum never count, and that after `close` nothing more lands in the memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dualpath.agent.mailbox import Mailbox
from dualpath.agent.network import Network
from dualpath.kvstore.checksum import of_fields
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.transport import Arrival


@dataclass(frozen=True, slots=True)
class ArmedChunks:
    """Chunks that may land, with the tags `first_tag`, ... : `indices` in their load, where, and
    what each must hash to."""

    first_tag: int
    indices: Sequence[int]
    blocks: Sequence[int]
    chunks: Sequence[int]
    targets: SliceTable
    checksums: Sequence[int]

    @property
    def tags(self) -> range:
        """The tag of each."""
        return range(self.first_tag, self.first_tag + len(self.indices))


@dataclass(frozen=True, slots=True)
class Landed:
    """Chunks of a load that have landed, by whether their checksums hold; and of those for which
    they do, how many waited so many seconds from their grant on."""

    intact: Sequence[int]
    corrupt: Sequence[int]
    waits_s: Mapping[float, int]


class LoadWindow:
    """See the module docstring. All methods belong to the loop."""

    def __init__(
        self,
        load_id: str,
        path: str,
        network: Network,
        region: Region,
        span: tuple[int, int],
        arrivals: Mailbox[LoadWindow],
    ) -> None:
        """`arrivals` gets the window when something has landed: see `take_landed`."""
        self.load_id = load_id
        self.path = path
        self.outstanding: dict[int, int] = {}
        """Index of the chunk by tag, of those whose end is not known."""
        self.armed_at: dict[int, float] = {}
        """When each tag was armed, for those whose end is not known."""
        self.grant_ids: set[int] = set()
        self._network = network
        self._view = region.view
        self._arrivals = arrivals
        self._checksums: dict[int, int] = {}
        self._landed: deque[tuple[int, bool]] = deque()
        self._told = False
        start, end = span
        self.descriptor: RegionDescriptor = network.transport.expose(
            region, start, end - start, self._arrived, on_hashed=self._hashed
        )
        self.open = True

    def arm(self, armed: ArmedChunks, now: float) -> None:
        """Let these chunks land."""
        tags = armed.tags
        self._checksums.update(zip(tags, armed.checksums, strict=True))
        self._network.transport.arm_table(self.descriptor, armed.first_tag, armed.targets)
        self.outstanding.update(zip(tags, armed.indices, strict=True))
        self.armed_at.update(dict.fromkeys(tags, now))

    def take_landed(self, now: float) -> Landed:
        """Take what has landed since the last time, but for chunks that were given up before."""
        self._told = False  # first: what lands from now on is told again
        outstanding, armed_at, checksums = self.outstanding, self.armed_at, self._checksums
        intact: list[int] = []
        corrupt: list[int] = []
        since: dict[float, int] = {}
        while self._landed:
            tag, holds = self._landed.popleft()
            index = outstanding.pop(tag, None)
            checksums.pop(tag, None)
            at = armed_at.pop(tag, now)
            if index is None:
                continue
            if holds:
                intact.append(index)
                since[at] = since.get(at, 0) + 1
            else:
                corrupt.append(index)
        return Landed(intact, corrupt, {now - at: count for at, count in since.items()})

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
            for known in (self.outstanding, self.armed_at, self._checksums):
                known.pop(tag, None)

    def close(self) -> None:
        """Fence everything, for good. Verdicts that come later are void."""
        if self.open:
            self.open = False
            self._network.transport.revoke(self.descriptor)

    def _arrived(self, arrival: Arrival) -> bool:
        digest = of_fields(self._view, arrival.fields)
        return self._hashed((arrival.tag,), (digest,))[0]

    def _hashed(self, tags: Sequence[int], digests: Sequence[int]) -> Sequence[bool]:
        """Bytes have landed that hash to `digests`. On a thread of the transport."""
        expected = self._checksums.get
        landed = self._landed.append
        taken: list[bool] = []
        corrupt = False
        for tag, digest in zip(tags, digests, strict=True):
            wanted = expected(tag)
            intact = wanted == digest
            taken.append(intact)
            if wanted is not None:
                landed((tag, intact))
                corrupt = corrupt or not intact
        last = len(self._landed) >= len(self.outstanding)
        if last or corrupt or not self._told:
            self._told = True
            self._arrivals.put(self, urgent=last or corrupt)
        return taken
