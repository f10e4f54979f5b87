"""The window of one load and one path on an engine's memory.

Owns the armed tags, the check of each arrival against the daemon's checksum (on the transport's
thread) and the fence. Guarantees that a verdict is delivered at most once a tag, that bytes with
a wrong checksum never count, and that after `close` nothing more lands in the memory. What lands
while the checksums are on their way is judged when they come.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

from dualpath.agent.mailbox import Mailbox
from dualpath.agent.network import Network
from dualpath.kvstore.checksum import of_fields
from dualpath.transfer.region import Region, RegionDescriptor
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.transport import Arrival


@dataclass(frozen=True, slots=True)
class ArmedChunks:
    """Chunks that may land, with the tags `first_tag`, ... : `indices` in their load, where, and
    what each must hash to; no `checksums` if that is not known yet."""

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
        self.grant_ids: set[int] = set()
        self.hungry = False
        """Whether more chunks wait to be granted, so that it is urgent when half has landed."""
        self._network = network
        self._view = region.view
        self._arrivals = arrivals
        self._checksums: dict[int, int] = {}
        self._unknown: list[ArmedChunks] = []
        """What was armed before its checksums were known."""
        self._early: list[tuple[Sequence[int], Sequence[int]]] | None = None
        """(tags, digests) of what has landed since then; None while all checksums are known."""
        self._early_lock = threading.Lock()  # guards `_early`
        # Of each grant its first tag and when it was armed, in that order.
        self._first_tags: list[int] = []
        self._armed_at: list[float] = []
        # Tags that landed together, and of each whether its checksum holds; None: of all.
        self._landed: deque[tuple[Sequence[int], Sequence[bool] | None]] = deque()
        self._told = False
        self._urged = False
        start, end = span
        self.descriptor: RegionDescriptor = network.transport.expose(
            region, start, end - start, self._arrived, on_hashed=self._hashed
        )
        self.open = True

    def arm(self, armed: ArmedChunks, now: float) -> None:
        """Let these chunks land."""
        tags = armed.tags
        if armed.checksums:
            self._checksums.update(zip(tags, armed.checksums, strict=True))
        else:
            self._unknown.append(armed)
            with self._early_lock:
                self._early = self._early or []
        self._network.transport.arm_table(self.descriptor, armed.first_tag, armed.targets)
        self.outstanding.update(zip(tags, armed.indices, strict=True))
        self._first_tags.append(armed.first_tag)
        self._armed_at.append(now)

    def reveal(self, checksums_of: Callable[[ArmedChunks], Sequence[int]]) -> None:
        """The checksums of what was armed without them are known now, or why else it may not
        count: fence that afterwards. Judges what has landed."""
        unknown, self._unknown = self._unknown, []
        for armed in unknown:
            self._checksums.update(zip(armed.tags, checksums_of(armed), strict=True))
        with self._early_lock:
            early, self._early = self._early or [], None
        for tags, digests in early:
            self._hashed(tags, digests)

    def take_landed(self, now: float) -> Landed:
        """Take what has landed since the last time, but for chunks that were given up before."""
        self._told = self._urged = False  # first: what lands from now on is told again
        outstanding = self.outstanding
        intact: list[int] = []
        corrupt: list[int] = []
        since: Counter[float] = Counter()
        while self._landed:
            tags, verdicts = self._landed.popleft()
            found = list(map(outstanding.pop, tags, repeat(-1)))
            # What lands together was granted together.
            at = self._armed_at[bisect_right(self._first_tags, tags[0]) - 1]
            if verdicts is None and min(found) >= 0:
                intact += found
                since[at] += len(found)
                continue
            for index, holds in zip(found, verdicts or repeat(True), strict=False):
                if index >= 0 and holds:
                    intact.append(index)
                    since[at] += 1
                elif index >= 0:
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
        return {tag: self.outstanding.pop(tag) for tag in unlanded}

    def fence_chunks(self, indices: Collection[int]) -> None:
        """Fence what is in flight of these chunks of the load."""
        wanted = set(indices)
        tags = [tag for tag, index in self.outstanding.items() if index in wanted]
        self.fence(tags)
        for tag in tags:
            self.outstanding.pop(tag, None)
            self._checksums.pop(tag, None)

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
        if self._early is not None:
            with self._early_lock:
                if self._early is not None:
                    self._early.append((tags, digests))
                    return [True] * len(tags)
        wanted = list(map(self._checksums.pop, tags, repeat(None)))
        if wanted == list(digests):
            taken = [True] * len(tags)
            self._landed.append((tags, None))
            corrupt = False
        else:
            taken = [each == digest for each, digest in zip(wanted, digests, strict=True)]
            known = [index for index, each in enumerate(wanted) if each is not None]
            if known:
                verdicts = [taken[index] for index in known]
                self._landed.append(([tags[index] for index in known], verdicts))
            corrupt = any(not taken[index] for index in known)
        self._tell(corrupt)
        return taken

    def _tell(self, corrupt: bool) -> None:
        landed, left = sum(len(tags) for tags, _ in tuple(self._landed)), len(self.outstanding)
        urgent = corrupt or landed >= left
        if self.hungry and not self._urged and 2 * landed >= left:
            urgent = self._urged = True
        if urgent or not self._told:
            self._told = True
            self._arrivals.put(self, urgent=urgent)
