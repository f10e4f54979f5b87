"""The agent: composition of its parts, in one event loop.

Owns the order in which parts come up and go down, and the view of the whole that is reported.
The same object serves engines of other processes (`agent_service.py`) and an engine in this one
(`dualpath.client`). Guarantees that `stop` fences all memory before it returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata

from dualpath.agent.attachments import Attachments
from dualpath.agent.compute_transport import compute_transport, tcp_config
from dualpath.agent.config import AgentConfig, RelayAddress
from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.daemon_loads import DaemonLoads
from dualpath.agent.daemon_rails import asked_rail
from dualpath.agent.further_links import FurtherLinks
from dualpath.agent.hand_offs import HandOffs
from dualpath.agent.handed_request import HandedRequests
from dualpath.agent.holdings import Holdings
from dualpath.agent.intakes import Intakes
from dualpath.agent.loader import Loader
from dualpath.agent.namespaces import Namespaces
from dualpath.agent.network import MakeTransport, Network
from dualpath.agent.receiver import Receiver
from dualpath.agent.regions import Regions
from dualpath.agent.relay import Relay
from dualpath.agent.relay_link import RelayLink
from dualpath.agent.saver import Saver
from dualpath.agent.self_relay import SelfRelay
from dualpath.agent.staging import SLAB_BYTES, Staging
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.numa import bind
from dualpath.proto.v1 import agent_pb2
from dualpath.transfer.affinity import ANY_NODE, near, node_towards
from dualpath.transfer.dispatch_config import DispatchConfig
from dualpath.transfer.errors import DualPathError, InvalidRequest, Unavailable
from dualpath.transfer.placement import PathKind, policy_named, relay_path
from dualpath.transfer.rails import Rail
from dualpath.transfer.region import Region
from dualpath.transfer.shm_transport import ShmTransport
from dualpath.transfer.tcp_transport import TcpTransport
from dualpath.transfer.transport import OnPeerLost, Transport

HANG_UP_STALLS = 10
"""A peer that takes nothing of what is relayed to it for so many `stall_s` is hung up on."""

log = logging.getLogger(__name__)


class Agent:
    """See the module docstring. Make it, `start` it and `stop` it in the same loop.

    `make_storage` and `make_compute` replace the transports (tests put faults there).
    """

    def __init__(
        self,
        config: AgentConfig,
        *,
        make_storage: MakeTransport | None = None,
        make_compute: MakeTransport | None = None,
    ) -> None:
        policy_named(config.policy)
        config.check_trust()
        self.config = config
        self.server_id = secrets.token_hex(8)
        self.namespaces = Namespaces()
        self.regions = Regions()
        self._make_storage = make_storage
        self._make_compute = make_compute or compute_transport(config)
        self._started_at = time.monotonic()
        self._stack = contextlib.AsyncExitStack()

    async def start(self, *, relaying: bool) -> None:
        """Come up; with `relaying` listen for agents of other nodes. Raises Unavailable."""
        try:
            await self._start(relaying)
        except BaseException:
            await self._stack.aclose()
            raise

    async def stop(self) -> None:
        """End all loads, fence all memory, leave all peers. Safe after a failed start."""
        await self._stack.aclose()

    async def _start(self, relaying: bool) -> None:
        config, stack = self.config, self._stack
        loop = asyncio.get_running_loop()
        self._open_networks(loop)
        stack.callback(self.regions.close)
        if relaying and config.data_listen:
            _listen(self.compute.transport, config.data_listen)
        staging = Region.anonymous(config.staging_bytes // SLAB_BYTES * SLAB_BYTES)
        stack.callback(_close_region, staging)
        _place(staging, config.daemons)
        self.holdings = Holdings(
            self._hold_region() if relaying else None, config.hold_s, cache=config.hold_cache
        )
        self.relay = Relay(
            Staging(staging),
            self.holdings,
            self.compute,
            loop,
            self._own_queue_changed,
            deadline_s_max=config.deadline_s_max,
            stall_s=HANG_UP_STALLS * config.stall_s,
        )
        stack.callback(self.relay.shutdown)
        self._make_links()
        for daemon in self.daemons.values():
            stack.push_async_callback(daemon.close_mount)
            self.further.add_daemon(daemon)
        self.rails = self.further.rails
        self.attachments = Attachments(self.server_id, self.compute, self.relay, self.rails, loop)
        self.self_relay = SelfRelay(
            self.relay,
            self.compute,
            config.data_listen or "127.0.0.1:0",
            self._self_relay_lost,
            config.lookup_timeout_s,
        )
        self.loads = {
            daemon.address: DaemonLoads(
                daemon,
                self.relays,
                self.compute,
                self.self_relay,
                DispatchConfig(
                    loads_max=config.loads_max,
                    stall_s=config.stall_s,
                    stall_s_max=max(config.stall_s, DispatchConfig().stall_s_max),
                ),
                loop,
                storage_limit_bytes_per_s=config.storage_limit_bytes_per_s,
                lease_s=config.lease_s,
                grace_s=config.lookup_timeout_s,
            )
            for daemon in self.daemons.values()
        }
        self.further.loads = self.loads
        self.loader = Loader(
            config,
            self.daemons,
            self.loads,
            self.regions,
            self.namespaces,
            self.self_relay,
            loop,
        )
        self.saver = Saver(config, self.daemons, self.regions, self.namespaces, loop)
        self._make_hand_offs(loop)
        self._connect(stack)

    def _open_networks(self, loop: asyncio.AbstractEventLoop) -> None:
        config, stack = self.config, self._stack
        first = self._storage_maker(asked_rail(config.storage_addresses))
        self.storage = {"tcp": Network(config.name, first, loop)}
        stack.push_async_callback(self.storage["tcp"].close)
        self.further = FurtherLinks(
            config,
            self.storage["tcp"],
            self._storage_maker,
            self._rail_changed,
            self._relay_link,
            loop,
        )
        stack.push_async_callback(self.further.close_networks)
        self.compute = Network(config.name, self._make_compute, loop)
        stack.push_async_callback(self.compute.close)
        if any(address.startswith("unix:") for address in config.daemons):
            self.storage = {"shm": Network(config.name, ShmTransport, loop), **self.storage}
            stack.push_async_callback(self.storage["shm"].close)

    def _make_hand_offs(self, loop: asyncio.AbstractEventLoop) -> None:
        config, holdings = self.config, self.holdings
        self.hand_offs = HandOffs(config, self.relays, self.regions, self.loader, loop)
        events = self.hand_offs.events
        self.handed = HandedRequests(holdings, config.hold_s, events, loop)
        self.intakes = Intakes(
            self.attachments,
            self.handed,
            holdings,
            self.compute,
            events,
            config.deadline_s_max,
            config.stall_s,
            loop,
        )
        self.receiver = Receiver(
            config,
            self.handed,
            holdings,
            self.regions,
            self.loader,
            self.loader,
            self.compute,
            self.self_relay,
            loop,
        )

    def _hold_region(self) -> Region | None:
        nbytes = self.config.hold_bytes // SLAB_BYTES * SLAB_BYTES
        if not nbytes:
            return None
        region = Region.anonymous(nbytes)
        self._stack.callback(_close_region, region)
        return region

    def _make_links(self) -> None:
        config = self.config
        self.daemons = {
            address: DaemonLink(
                address,
                self._networks_of(address),
                self.namespaces,
                self._daemon_changed,
                name=config.name,
                token=config.token,
                tls=config.tls,
                timeout_s=config.lookup_timeout_s,
                pause_s_max=config.reconnect_s_max,
                mount=config.mount_paths.get(address, ""),
            )
            for address in config.daemons
        }
        self.relays = {relay.name: self._relay_link(relay) for relay in config.relay_addresses}

    def _relay_link(self, relay: RelayAddress, rail: int = 0) -> RelayLink:
        config = self.config
        return RelayLink(
            relay,
            config.daemons,
            {self.compute.transport.name: self.compute},
            self._relay_changed,
            self._relay_queue,
            name=config.name,
            token=config.token,
            tls=config.tls,
            timeout_s=config.lookup_timeout_s,
            pause_s_max=config.reconnect_s_max,
            rail=rail,
        )

    def _storage_maker(self, rail: Rail) -> MakeTransport:
        return self._make_storage or _storage_tcp(self.config, rail)

    def _connect(self, stack: contextlib.AsyncExitStack) -> None:
        for daemon in self.daemons.values():
            stack.push_async_callback(daemon.link.close)
            daemon.link.start()
        for relay in self.relays.values():
            stack.push_async_callback(relay.link.close)
            relay.link.start()
        stack.push_async_callback(self.further.close)
        stack.callback(self.attachments.close)
        stack.push_async_callback(self.loader.close)
        for part in (self.handed, self.intakes, self.receiver):
            stack.callback(part.close)
        stack.push_async_callback(self.hand_offs.close)

    def _networks_of(self, daemon: str) -> Mapping[str, Network]:
        if daemon.startswith("unix:"):
            return self.storage
        return {"tcp": self.storage["tcp"]}

    # News of links.

    def _daemon_changed(self, daemon: DaemonLink) -> None:
        if not daemon.up:
            self.relay.daemon_lost(daemon, daemon.link.reason)
        else:
            self.rails[daemon.address].first_up()
        self.attachments.daemon_changed(daemon)
        self.loads[daemon.address].link_changed()

    def _rail_changed(self, rail: DaemonLink) -> None:
        if not rail.up:
            self.relay.daemon_lost(rail, rail.link.reason)
        self.attachments.daemon_changed(rail)
        self.loads[rail.address].link_changed()

    def _relay_changed(self, relay: RelayLink) -> None:
        self.further.join(relay)
        for loads in self.loads.values():
            loads.link_changed()

    def _relay_queue(self, relay: RelayLink, queue_bytes: int) -> None:
        for loads in self.loads.values():
            loads.report_queue(relay_path(relay.name, relay.rail), queue_bytes)

    def _own_queue_changed(self) -> None:
        """What others wait for at a storage link of ours delays our own direct loads by it."""
        for address, loads in self.loads.items():
            for path, rail in zip(loads.routes.direct, self.rails[address].links, strict=True):
                own = self.self_relay.own_read_bytes(rail.rail)
                loads.report_queue(path, self.relay.read_bytes_by(rail.rail) - own)

    def _self_relay_lost(self, reason: str) -> None:
        del reason
        for loads in self.loads.values():
            loads.self_relay_lost()

    # Calls that are not loads or saves.

    def abort(self, load_ids: Sequence[str]) -> int:
        """End loads and receives; fenced when this returns. Says how many there were."""
        return self.loader.abort(load_ids) + self.receiver.abort(load_ids)

    async def open_namespace(self, namespace: Namespace) -> bytes:
        """Make a namespace known, also to daemons that are away now, once they come."""
        self.namespaces.add(namespace)
        await asyncio.gather(
            *(self._open_at(daemon, namespace) for daemon in self.daemons.values())
        )
        return namespace.id

    async def _open_at(self, daemon: DaemonLink, namespace: Namespace) -> None:
        if not await daemon.link.settled(self.config.lookup_timeout_s):
            return  # it is told when it comes back
        try:
            await daemon.open_namespace(namespace)
        except InvalidRequest:
            self.namespaces.forget(namespace.id)
            raise
        except DualPathError:
            daemon.link.lose("it does not answer")

    async def settled(self, timeout_s: float) -> None:
        """Wait until the first attempts to reach daemons and relays came to an end."""
        links = [daemon.link for daemon in self.daemons.values()]
        waits = [link.settled(timeout_s) for link in links]
        waits += [relay.link.settled(timeout_s) for relay in self.relays.values()]
        await asyncio.gather(*waits)

    def read_queue_bytes(self) -> int:
        """Bytes that wait at this node's storage link, for itself and for others."""
        own = sum(
            view.queue_bytes
            for loads in self.loads.values()
            for view in loads.views()
            if view.kind is PathKind.DIRECT
        )
        return own + self.relay.read_bytes - self.self_relay.own_read_bytes()

    def events(self) -> Counter[str]:
        """Failures and fallbacks by reason since the start."""
        events = Counter(self.loader.events)
        events.update(self.saver.events)
        events.update(self.relay.events)
        for part in (self.holdings, self.hand_offs, self.receiver):
            events.update(part.events)
        for daemon in self.daemons.values():
            if daemon.mounted is not None:
                events.update(daemon.mounted.counts())
        return events

    def stats(self) -> agent_pb2.AgentStatsResponse:
        """Counters and gauges."""
        storage = self.storage_networks
        response = agent_pb2.AgentStatsResponse(
            server_id=self.server_id,
            name=self.config.name,
            version=metadata.version("dualpath"),
            uptime_s=time.monotonic() - self._started_at,
            read_queue_bytes=self.read_queue_bytes(),
            staging_capacity_bytes=self.relay.staging.capacity_bytes,
            staging_used_bytes=self.relay.staging.used_bytes,
            loads_active=self.loader.active,
            loads_done=self.loader.done,
            relayed_bytes=self.relay.relayed_bytes,
            events=dict(self.events()),
            holdings=self._holding_stats(),
        )
        response.link.extend(
            (
                agent_pb2.LinkStats(
                    link="storage",
                    limit_bytes_per_s=self.config.storage_limit_bytes_per_s,
                    rate_bytes_per_s=self._storage_rate(),
                    bytes=sum(network.received_bytes for network in storage),
                ),
                agent_pb2.LinkStats(
                    link="compute_in",
                    limit_bytes_per_s=self.config.compute_limit_bytes_per_s,
                    bytes=self.compute.received_bytes,
                ),
                agent_pb2.LinkStats(
                    link="compute_out",
                    limit_bytes_per_s=self.config.compute_limit_bytes_per_s,
                    bytes=self.compute.sent_bytes,
                ),
            )
        )
        response.link.extend(self.further.stats())
        response.path.extend(self._path_stats())
        return response

    @property
    def storage_networks(self) -> Sequence[Network]:
        """Of all links to daemons: those to the first address, then the further ones."""
        return (*self.storage.values(), *self.further.networks)

    def _holding_stats(self) -> agent_pb2.HoldingStats:
        return agent_pb2.HoldingStats(
            capacity_bytes=self.holdings.capacity_bytes,
            used_bytes=self.holdings.used_bytes,
            pinned_bytes=self.holdings.pinned_bytes,
            requests=self.holdings.requests,
            retained_bytes=self.relay.retained_bytes,
            served_bytes=self.relay.served_bytes,
            handed_off_bytes=self.hand_offs.sent_bytes,
            taken_bytes=self.intakes.taken_bytes,
            received_bytes=self.receiver.received_bytes,
            hand_offs_active=len(self.hand_offs) + len(self.intakes),
            receives_active=len(self.receiver),
        )

    def _storage_rate(self) -> float:
        own = sum(
            view.rate_bytes_per_s
            for loads in self.loads.values()
            for view in loads.views()
            if view.kind is PathKind.DIRECT
        )
        return own + self.relay.read_rate_bytes_per_s()

    def _path_stats(self) -> list[agent_pb2.PathStats]:
        merged: dict[str, agent_pb2.PathStats] = {}
        for loads in self.loads.values():
            for view in loads.views():
                stats = merged.setdefault(view.name, agent_pb2.PathStats(path=view.name))
                stats.up = stats.up or view.up
                stats.bytes += loads.counts.bytes[view.name]
                stats.chunks += loads.counts.chunks[view.name]
                stats.queue_bytes += view.queue_bytes
                stats.rate_bytes_per_s += view.rate_bytes_per_s
        return list(merged.values())


def _storage_tcp(settings: AgentConfig, rail: Rail) -> MakeTransport:
    def make(name: str, on_peer_lost: OnPeerLost) -> Transport:
        config = tcp_config(settings, settings.storage_limit_bytes_per_s, rail)
        return TcpTransport(name, on_peer_lost, config)

    return make


def _listen(transport: Transport, address: str) -> None:
    try:
        with near(node_towards(address)):
            transport.listen(address)
    except Unavailable as error:
        raise Unavailable(
            f"data_listen: {error}; stop what listens there or choose another address of this "
            "machine",
            reason="address_in_use",
        ) from error


def _place(staging: Region, daemons: Sequence[str]) -> None:
    """Take the staging's memory from the NUMA node of the devices that lead to the daemons, if it
    is one; else from wherever the kernel does."""
    found = {node_towards(address) for address in daemons}
    if len(found) == 1 and (node := found.pop()) != ANY_NODE:
        try:
            log.info("staging: %s", bind(staging.view, node))
        except InvalidRequest as error:
            log.warning("staging is not placed: %s", error)


def _close_region(region: Region) -> None:
    with contextlib.suppress(BufferError):  # the mapping goes with its last view
        region.close()
