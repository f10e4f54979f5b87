"""Our session at one storage daemon.

Owns the attachment, the Deliver stream with its grants, and the unary calls. Guarantees that
every grant handed to `deliver` ends: by a progress message with `done`, or by `on_lost` of the
link, after which none of its chunks will land; and that every look-up handed to `look_up_first` is
answered once, at the loss of the link at the latest. Does not retry calls; a lost session is made
again by itself, and leases of the old one are gone with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import grpc.aio
from dualpath.agent.hedged_call import hedged
from dualpath.agent.mounted_reads import MountedReads
from dualpath.agent.network import Network
from dualpath.agent.open_grants import OnProgress, OpenGrants
from dualpath.agent.segment_mount import SegmentMount
from dualpath.agent.steady_link import Metadata, SteadyLink
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.packed_hashes import PackedHashes
from dualpath.kvstore.service.namespace_message import namespace_message
from dualpath.proto.status import translated
from dualpath.proto.tls import NO_TLS, Tls
from dualpath.proto.v1 import common_pb2, store_pb2, store_pb2_grpc
from dualpath.transfer.errors import (
    DeadlineExceeded,
    DualPathError,
    PeerLost,
    PermissionDenied,
    Unavailable,
)

SWALLOWED_S = 0.5
LOOKUPS_MAX = 32
"""Most look-ups on the stream at once; the daemon lets fewer answers wait than twice that."""
LOOKUP_PATIENCE_S = 1.0
"""How long the first call of a look-up may take; each further one twice as long."""
LEFT_S_MIN = 0.001
HEDGED = frozenset({"Lookup", "Renew", "Release", "Delegate"})
"""Calls that may be made twice; of two leases one ends by itself."""
OnFound: TypeAlias = Callable[[store_pb2.LookupResponse | None], None]
"""Told what a look-up has found; None if it was refused or the link was lost."""

log = logging.getLogger(__name__)


class DaemonLink:
    """See the module docstring. `on_change(link)` is called after each rise and each loss."""

    def __init__(
        self,
        address: str,
        networks: Mapping[str, Network],
        namespaces: Mapping[bytes, Namespace],
        on_change: Callable[[DaemonLink], None],
        *,
        name: str,
        token: str,
        tls: Tls = NO_TLS,
        timeout_s: float,
        pause_s_max: float,
        mount: str = "",
        rail: int = 0,
    ) -> None:
        self.address = address
        self.rail = rail
        """Which of this node's links to the daemon it is; 0 has the leases, others need tickets."""
        self.key = f"{address}#{rail}" if rail else address
        """Tells the links to a daemon apart."""
        self.devices: frozenset[str] = frozenset()
        """Of a further link: the network devices that it is bound to."""
        self.fellows: Sequence[DaemonLink] = ()
        """Of the first link: the further ones, by which calls are made again that go unanswered."""
        self.spare = False
        """Of a further link: whether the first one goes by its devices now."""
        self.mounted: MountedReads | None = None
        """Reads of our own, where the daemon's data directory shows under `mount`."""
        self._mount = mount
        self.peer_id = ""
        """Our attachment's name at the daemon, for Delegate; "" while down."""
        self._namespaces = namespaces
        self._on_change = on_change
        self._timeout_s = timeout_s
        self._grants = OpenGrants()
        self._lookups: dict[int, OnFound] = {}  # by the grant that each came with
        self._stub: Any = None
        self.link: SteadyLink[store_pb2.DeliverRequest, store_pb2.DeliverResponse] = SteadyLink(
            f"daemon {self.key}",
            address,
            self,
            networks,
            name=name,
            token=token,
            tls=tls,
            timeout_s=timeout_s,
            pause_s_max=pause_s_max,
        )

    @property
    def up(self) -> bool:
        """Whether it can be asked."""
        return self.link.up

    def peer_id_at(self, daemon: str) -> str:
        """As of RelayLink: our attachment's name, "" while down."""
        assert daemon == self.address
        return self.peer_id if self.up else ""

    @property
    def session(self) -> bytes:
        """Secret of the attachment. Raises PeerLost while down."""
        if self.link.attached is None or not self.up:
            raise PeerLost(f"daemon {self.address} is not connected: {self.link.reason}")
        return self.link.attached.session

    # The dialect of SteadyLink.

    def bind(self, channel: grpc.aio.Channel) -> None:
        """Make the stub."""
        self._stub = store_pb2_grpc.StoreStub(channel)

    async def attach(
        self, request: common_pb2.AttachRequest, *, timeout: float, metadata: Metadata
    ) -> common_pb2.AttachResponse:
        """Call Attach."""
        answer = await self._stub.Attach(request, timeout=timeout, metadata=metadata)
        assert isinstance(answer, common_pb2.AttachResponse)
        return answer

    def open_stream(self, *, metadata: Metadata) -> Any:
        """Open Deliver."""
        return self._stub.Deliver(metadata=metadata)

    def hello(self, attached: common_pb2.AttachResponse) -> store_pb2.DeliverRequest:
        """The first message carries only the session."""
        return store_pb2.DeliverRequest(session=attached.session)

    async def prepare(
        self, attached: common_pb2.AttachResponse, first: store_pb2.DeliverResponse
    ) -> None:
        """Make known namespaces known to a daemon that may have been restarted."""
        for namespace in tuple(self._namespaces.values()):
            await self._call(
                "OpenNamespace",
                store_pb2.OpenNamespaceRequest(namespace=namespace_message(namespace)),
            )
        self.peer_id = first.peer_id or attached.peer_id

    def on_up(self) -> None:
        """Look for the mount and tell the owner."""
        self._open_mount()
        self._on_change(self)

    def on_response(self, response: store_pb2.DeliverResponse) -> None:
        """Hand progress to the grants."""
        if response.HasField("found"):
            found = response.found
            on_found = self._lookups.pop(found.grant_id, None)
            if on_found is not None:
                on_found(found.hit if found.HasField("hit") else None)
        for progress in response.progress:
            self._grants.tell(progress)

    def on_down(self, reason: str) -> None:
        """All grants are over."""
        self.peer_id = ""
        self._grants.clear()
        lookups, self._lookups = self._lookups, {}
        for on_found in lookups.values():
            on_found(None)
        if self.mounted is not None:
            self.mounted.forget_leases()
        self._on_change(self)

    def _open_mount(self) -> None:
        """Without it, or while it shows nothing, everything comes from the daemon."""
        if not self._mount or self.mounted is not None:
            return
        try:
            self.mounted = MountedReads(SegmentMount(self._mount), asyncio.get_running_loop())
        except (OSError, DualPathError) as error:
            log.warning("mount %s for daemon %s: %s", self._mount, self.address, error)

    async def close_mount(self) -> None:
        """Give the mount back."""
        mounted, self.mounted = self.mounted, None
        if mounted is not None:
            await mounted.close()

    # Grants.

    def deliver(
        self,
        grant: common_pb2.ChunkGrant,
        on_progress: OnProgress,
        *,
        lease_id: int = 0,
        ticket: bytes = b"",
    ) -> int:
        """Ask for chunks under an own lease or a delegated one; returns the grant's id.

        Raises PathDown while the session is not there.
        """
        network = self.link.network
        if self.mounted is None or self.mounted.off or network is None:
            return self._ask(lease_id, ticket, grant, on_progress)
        grant.grant_id = self._grants.add(on_progress)
        self.mounted.deliver(
            grant,
            ticket or lease_id.to_bytes(8, "little"),
            network.transport,
            self._grants.tell,
            locate=partial(self._locate, lease_id, ticket),
            ask=partial(self._ask, lease_id, ticket),
        )
        return grant.grant_id

    @property
    def looks_up(self) -> bool:
        """Whether `look_up_first` may be called now."""
        attached = self.link.attached
        return (
            self.up
            and attached is not None
            and attached.looks_up
            and len(self._lookups) < LOOKUPS_MAX
            and (self.mounted is None or bool(self.mounted.off))
        )

    def look_up_first(
        self,
        lookup: store_pb2.LookupRequest,
        grant: common_pb2.ChunkGrant,
        on_progress: OnProgress,
        on_found: OnFound,
    ) -> int:
        """Ask for chunks under the lease that a look-up gives, in one message with it; the daemon
        leaves out what it does not find. Returns the grant's id. Raises PathDown."""
        grant.grant_id = self._grants.next_id
        self.link.send(store_pb2.DeliverRequest(lookup=lookup, grant=grant))
        self._lookups[grant.grant_id] = on_found
        return self._grants.add(on_progress)

    def _ask(
        self, lease_id: int, ticket: bytes, grant: common_pb2.ChunkGrant, on_progress: OnProgress
    ) -> int:
        grant.grant_id = self._grants.next_id
        self.link.send(store_pb2.DeliverRequest(lease_id=lease_id, ticket=ticket, grant=grant))
        return self._grants.add(on_progress)

    def cancel(self, grant_ids: Iterable[int], *, landed: bool = False) -> None:
        """Spare the daemon work that nobody wants any more, unless all of it is done (`landed`);
        no answer is awaited."""
        known = self._grants.forget(grant_ids)
        if self.mounted is not None:
            known += self._grants.forget(self.mounted.cancel(known))
        if known and self.up and not landed:
            self.link.send(store_pb2.DeliverRequest(cancel_grant_id=known))

    # Unary calls. All raise the errors of dualpath.transfer.errors.

    async def _call(self, method: str, request: Any, timeout_s: float = 0) -> Any:
        if self._stub is None:
            raise Unavailable(f"daemon {self.address} is not connected: {self.link.reason}")
        timeout_s = timeout_s or self._timeout_s
        others = [each._stub for each in self.fellows if each.up and not each.spare]
        if not others or method not in HEDGED:
            return await self._call_by(self._stub, method, request, timeout_s)
        stubs = (self._stub, *others[:1])
        return await hedged(
            [partial(self._call_by, *(s, method, request, timeout_s)) for s in stubs]
        )

    async def _call_by(self, stub: Any, method: str, request: Any, timeout_s: float) -> Any:
        try:
            # gRPC keeps deadlines itself; ours is for calls that a dying channel swallowed.
            async with asyncio.timeout(timeout_s + SWALLOWED_S):
                with translated(f"{method} at daemon {self.address}"):
                    return await getattr(stub, method)(
                        request, timeout=timeout_s, metadata=self.link.metadata
                    )
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{method} at daemon {self.address}: no answer within {timeout_s:g} s"
            ) from error
        except PermissionDenied as error:
            if error.reason != "session":
                raise
            self.link.lose("the daemon knows the session no more")
            raise PeerLost(str(error)) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Not we were cancelled: the channel was closed under the call.
            raise PeerLost(f"{method}: the session at daemon {self.address} ended") from None
        except grpc.aio.UsageError as error:
            raise PeerLost(f"{method}: the session at daemon {self.address} ended") from error

    async def open_namespace(self, namespace: Namespace) -> None:
        """Make a namespace known."""
        request = store_pb2.OpenNamespaceRequest(namespace=namespace_message(namespace))
        await self._call("OpenNamespace", request)

    async def lookup(
        self, namespace_id: bytes, hashes: Sequence[bytes], *, lease_s: float, timeout_s: float
    ) -> store_pb2.LookupResponse:
        """Longest prefix; with a lease of our attachment if `lease_s` > 0. What stays unanswered is
        asked again while there is time: a link that was cut can swallow a call for good."""
        request = lookup_message(namespace_id, hashes, lease_s)
        loop = asyncio.get_running_loop()
        end_at, patience_s = loop.time() + timeout_s, LOOKUP_PATIENCE_S
        while True:
            left_s = max(LEFT_S_MIN, end_at - loop.time())
            request.session = self.session
            try:
                answer = await self._call("Lookup", request, min(patience_s, left_s))
            except DeadlineExceeded:
                if left_s <= patience_s:
                    raise
                patience_s *= 2
            else:
                assert isinstance(answer, store_pb2.LookupResponse)
                return answer

    async def renew(self, lease_ids: Sequence[int], lease_s: float) -> frozenset[int]:
        """Extend leases; returns those that are gone."""
        request = store_pb2.RenewRequest(
            lease_id=lease_ids, lease_ms=round(lease_s * 1000), session=self.session
        )
        return frozenset((await self._call("Renew", request)).expired_lease_id)

    async def release(self, lease_ids: Sequence[int]) -> None:
        """End leases; a failure is logged, since leases end by themselves."""
        try:
            request = store_pb2.ReleaseRequest(lease_id=lease_ids, session=self.session)
            await self._call("Release", request)
        except DualPathError as error:
            log.info("leases %s were not released: %s", lease_ids, error)

    async def _locate(
        self, lease_id: int, ticket: bytes, blocks: Sequence[int]
    ) -> store_pb2.LocateResponse:
        """Where blocks of a lease lie in the segment files."""
        request = store_pb2.LocateRequest(
            session=self.session, lease_id=lease_id, ticket=ticket, block=blocks
        )
        answer = await self._call("Locate", request)
        assert isinstance(answer, store_pb2.LocateResponse)
        return answer

    async def namespace_of(self, ticket: bytes, block: int) -> bytes:
        """In which a ticket lets us read this block of its lease now; b"" if the daemon is too old
        to say."""
        return (await self._locate(0, ticket, (block,))).namespace_id

    async def delegate(
        self, lease_id: int, peer_ids: Sequence[str], ttl_s: float
    ) -> tuple[bytes, ...]:
        """Tickets with which other attachments may read under our lease."""
        request = store_pb2.DelegateRequest(
            lease_id=lease_id,
            peer_id=peer_ids,
            ttl_ms=max(1, round(ttl_s * 1000)),
            session=self.session,
        )
        return tuple((await self._call("Delegate", request)).ticket)

    async def report_corrupt(self, lease_id: int, block: int, chunk: int) -> bool:
        """Tell of a wrong checksum; returns whether the daemon dropped the block."""
        request = store_pb2.ReportCorruptRequest(
            lease_id=lease_id, block=block, chunk=chunk, session=self.session
        )
        return bool((await self._call("ReportCorrupt", request)).dropped)

    async def reserve(
        self,
        namespace_id: bytes,
        hashes: Sequence[bytes],
        parents: Sequence[bytes],
        *,
        ttl_s: float,
        timeout_s: float,
    ) -> store_pb2.ReserveResponse:
        """Reserve room for blocks that we will write."""
        request = store_pb2.ReserveRequest(
            namespace_id=namespace_id,
            hash=hashes,
            parent=parents,
            ttl_ms=round(ttl_s * 1000),
            session=self.session,
        )
        answer = await self._call("Reserve", request, timeout_s)
        assert isinstance(answer, store_pb2.ReserveResponse)
        return answer

    async def seal(
        self,
        reservation_ids: Sequence[int],
        checksums: Sequence[int],
        *,
        durable: bool,
        timeout_s: float,
    ) -> tuple[int, ...]:
        """Publish blocks that were written; returns a SealStatus of the protocol for each."""
        request = store_pb2.SealRequest(
            reservation_id=reservation_ids,
            checksum=checksums,
            durable=durable,
            session=self.session,
        )
        return tuple(map(int, (await self._call("Seal", request, timeout_s)).status))

    async def abandon(self, reservation_ids: Sequence[int]) -> None:
        """Give reservations up; a failure is logged, since they expire by themselves."""
        try:
            request = store_pb2.AbandonRequest(reservation_id=reservation_ids, session=self.session)
            await self._call("Abandon", request)
        except DualPathError as error:
            log.info("reservations were not abandoned: %s", error)


def lookup_message(
    namespace_id: bytes, hashes: Sequence[bytes], lease_s: float
) -> store_pb2.LookupRequest:
    """A look-up of a chain, without a session."""
    packed = PackedHashes.of(hashes)
    return store_pb2.LookupRequest(
        namespace_id=namespace_id,
        hashes=bytes(packed.data),
        hash_bytes=packed.hash_bytes,
        lease_ms=round(lease_s * 1000),
    )
