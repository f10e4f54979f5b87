"""Reads of a relay under way at its daemons: windows, tags, and what was asked for under them.

Owns a window on the staging and one on the holdings for each daemon, and each chunk from the moment
it is asked for until it has landed or was withdrawn. Guarantees that a chunk which was withdrawn
does not land any more. What lands in the holdings is compared with its checksum on the way; what
lands in the staging is not, since whoever asked for it does that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.holdings import Holdings
from dualpath.agent.network import Network
from dualpath.agent.relay_job import RelayChunk
from dualpath.agent.slice_table import table_of
from dualpath.agent.staging import SLAB_BYTES, Staging
from dualpath.kvstore.checksum import of_fields
from dualpath.proto.v1 import common_pb2
from dualpath.transfer.errors import DualPathError
from dualpath.transfer.region import RegionDescriptor
from dualpath.transfer.slices import Slices
from dualpath.transfer.transport import Arrival


@dataclass(slots=True, eq=False)
class _Upstream:
    """One daemon: our windows there and what is in flight."""

    daemon: DaemonLink
    network: Network | None = None
    staged: RegionDescriptor | None = None
    held: RegionDescriptor | None = None
    reading: dict[int, RelayChunk] = field(default_factory=dict)
    grant_ids: set[int] = field(default_factory=set)


class RelayUpstream:
    """See the module docstring. `on_arrival(chunk)` is called on a transport's thread when a chunk
    lies in its slot; all methods belong to the loop."""

    def __init__(
        self, staging: Staging, holdings: Holdings, on_arrival: Callable[[RelayChunk], None]
    ) -> None:
        self._staging = staging
        self._holdings = holdings
        self._on_arrival = on_arrival
        self._by_daemon: dict[str, _Upstream] = {}
        self._next_tag = 1

    def read(
        self,
        chunks: Sequence[RelayChunk],
        now: float,
        on_progress: Callable[[common_pb2.GrantProgress], None],
    ) -> None:
        """Ask for chunks that have slots of one kind, one source and one lane. Raises
        DualPathError; what was armed by then is to be withdrawn."""
        grant = chunks[0].grant
        source = grant.source
        targets: list[tuple[int, Slices]] = []
        for chunk in chunks:
            assert chunk.slot is not None
            chunk.upstream_tag = self._next_tag
            self._next_tag += 1
            # One shape for all sizes of chunks, as a table needs it.
            where = Slices(chunk.slot.offset, SLAB_BYTES, 1, SLAB_BYTES, 0, chunk.slot.nbytes)
            targets.append((chunk.upstream_tag, where))
        upstream = self._of(source.daemon)
        assert upstream.network is not None
        window = self._window(upstream, held=chunks[0].held is not None)
        for chunk in chunks:
            upstream.reading[chunk.upstream_tag] = chunk
        upstream.network.transport.arm(window, targets)
        for chunk in chunks:
            chunk.armed = True
        deadline_s = max(chunk.grant.deadline_at for chunk in chunks) - now
        grant_id = source.daemon.deliver(
            common_pb2.ChunkGrant(
                window=window.to_bytes(),
                lane=grant.lane,
                deadline_ms=max(1, round(deadline_s * 1000)),
                block=[chunk.block for chunk in chunks],
                chunk=[chunk.chunk for chunk in chunks],
                tag=[tag for tag, _ in targets],
                target=table_of([where for _, where in targets]),
            ),
            partial(self._progress, upstream, on_progress),
            lease_id=source.lease_id,
            ticket=source.ticket,
        )
        upstream.grant_ids.add(grant_id)

    def asked(self, daemon: DaemonLink, tag: int) -> RelayChunk | None:
        """What is being read under a tag of ours."""
        upstream = self._by_daemon.get(daemon.key)
        return None if upstream is None else upstream.reading.get(tag)

    def reading(self) -> Iterator[RelayChunk]:
        """All that is being read; safe against changes."""
        for upstream in tuple(self._by_daemon.values()):
            yield from tuple(upstream.reading.values())

    def landed(self, chunk: RelayChunk) -> None:
        """Forget a chunk that `on_arrival` told of."""
        upstream = self._by_daemon.get(chunk.grant.source.daemon.key)
        if upstream is not None:
            upstream.reading.pop(chunk.upstream_tag, None)

    def withdraw(self, chunk: RelayChunk) -> bool:
        """Let a chunk land no more; False if it has landed."""
        upstream = self._by_daemon.get(chunk.grant.source.daemon.key)
        if chunk.armed:
            assert upstream is not None
            assert upstream.network is not None
            window = upstream.staged if chunk.held is None else upstream.held
            assert window is not None
            tag = chunk.upstream_tag
            if tag not in upstream.network.transport.disarm(window, (tag,)):
                return False
        if upstream is not None:
            upstream.reading.pop(chunk.upstream_tag, None)
        return True

    def daemon_lost(self, daemon: DaemonLink) -> None:
        """Nothing is heard of its grants any more."""
        upstream = self._by_daemon.get(daemon.key)
        if upstream is not None:
            upstream.grant_ids.clear()

    def close(self) -> None:
        """Fence all windows for good."""
        for upstream in self._by_daemon.values():
            _revoke(upstream)
        self._by_daemon.clear()

    def _of(self, daemon: DaemonLink) -> _Upstream:
        upstream = self._by_daemon.setdefault(daemon.key, _Upstream(daemon))
        network = daemon.link.network
        if network is None:
            raise DualPathError(f"daemon {daemon.address} is away", reason="peer_lost")
        if upstream.network is not network:
            _revoke(upstream)
            upstream.network = network
        return upstream

    def _window(self, upstream: _Upstream, *, held: bool) -> RegionDescriptor:
        assert upstream.network is not None
        transport = upstream.network.transport
        if not held:
            if upstream.staged is None:
                region = self._staging.region
                upstream.staged = transport.expose(
                    region, 0, region.nbytes, partial(self._staged, upstream)
                )
            return upstream.staged
        if upstream.held is None:
            region = self._holdings.region
            upstream.held = transport.expose(
                region,
                0,
                region.nbytes,
                partial(self._retained, upstream),
                on_hashed=partial(self._hashed, upstream),
            )
        return upstream.held

    def _progress(
        self,
        upstream: _Upstream,
        on_progress: Callable[[common_pb2.GrantProgress], None],
        progress: common_pb2.GrantProgress,
    ) -> None:
        if progress.done:
            upstream.grant_ids.discard(progress.grant_id)
        on_progress(progress)

    # On threads of the transport.

    def _staged(self, upstream: _Upstream, arrival: Arrival) -> bool:
        chunk = upstream.reading.get(arrival.tag)
        if chunk is None:
            return False
        self._on_arrival(chunk)
        return True

    def _retained(self, upstream: _Upstream, arrival: Arrival) -> bool:
        digest = of_fields(self._holdings.region.view, arrival.fields)
        return self._hashed(upstream, (arrival.tag,), (digest,))[0]

    def _hashed(
        self, upstream: _Upstream, tags: Sequence[int], digests: Sequence[int]
    ) -> Sequence[bool]:
        taken = []
        for tag, digest in zip(tags, digests, strict=True):
            chunk = upstream.reading.get(tag)
            taken.append(chunk is not None)
            if chunk is not None:
                assert chunk.held is not None
                chunk.intact = digest == chunk.held.name[3]
                self._on_arrival(chunk)
        return taken


def _revoke(upstream: _Upstream) -> None:
    for window in (upstream.staged, upstream.held):
        if window is not None and upstream.network is not None:
            upstream.network.transport.revoke(window)
    upstream.staged = upstream.held = None
