"""The daemon process: builds the parts, serves, and takes them down in order.

Owns the order. Up: store, delivery engine, data plane, service, metrics, gRPC; `ready` only once
gRPC answers. Down: health says so first, deliveries drain within `drain_s`, then streams and calls
end, attachments are fenced, and the store closes last, when nothing reads its memory any more.
A start that fails takes down what was built. Reads no environment and prints nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from dualpath.kvstore import local_protocol
from dualpath.kvstore.block_store import BlockStore
from dualpath.kvstore.descriptor_limit import raise_descriptor_limit
from dualpath.kvstore.heap import map_large_blocks
from dualpath.kvstore.lease_shares import ShareRule
from dualpath.kvstore.service.access import Access
from dualpath.kvstore.service.access_rules import AccessRules, parse_access
from dualpath.kvstore.service.attachments import ATTACHMENTS_MAX, Plane, rail_name
from dualpath.kvstore.service.auth import Auth, AuthInterceptor, Caller, principal_of_call
from dualpath.kvstore.service.config import DaemonConfig, is_wildcard, split_address
from dualpath.kvstore.service.deliver import DeliveryConfig, DeliveryEngine
from dualpath.kvstore.service.fair_executor import FairExecutor
from dualpath.kvstore.service.fair_turns import FairTurns
from dualpath.kvstore.service.key_reload import KeyReload
from dualpath.kvstore.service.local_socket import LocalSocket
from dualpath.kvstore.service.metrics import ServiceSnapshot, StoreCollector
from dualpath.kvstore.service.metrics_server import MetricsServer
from dualpath.kvstore.service.quotas import Quotas
from dualpath.kvstore.service.readiness import Phase, Readiness
from dualpath.kvstore.service.server_tls import ServerTls
from dualpath.kvstore.service.shares import Shares
from dualpath.kvstore.service.store_service import StoreService
from dualpath.kvstore.store_config import StoreConfig
from dualpath.proto.channel import server_options
from dualpath.proto.handlers import ErrorInterceptor
from dualpath.proto.listen import listen_at
from dualpath.proto.v1 import store_pb2, store_pb2_grpc
from dualpath.transfer.affinity import near, node_towards
from dualpath.transfer.errors import InvalidRequest, Unavailable
from dualpath.transfer.shm_transport import ShmConfig, ShmTransport
from dualpath.transfer.tcp_transport import TcpConfig, TcpTransport
from dualpath.transfer.transport import Transport
from dualpath.transfer.unix_path import check_folder, claim, private_files, remove
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

CALLS_MAX = 4096
"""Most calls at once, streams included; more are refused with RESOURCE_EXHAUSTED."""
UNADMITTED_CALLS_MAX = 512
CONTROL_THREADS = 16
"""Threads for calls that may touch a medium."""
CONTROL_SHARE = 12
"""Most of them that work for one principal."""
LEASED_TIMES_ALONE = 7
"""Where all are one principal, it may lease seven eighths of the SSD tier."""
STOP_S_MAX = 5.0
SERVICE = store_pb2.DESCRIPTOR.services_by_name["Store"].full_name

_log = logging.getLogger(__name__)


class Daemon:
    """One daemon in this process. `start` and `stop` once each, in one event loop.

    `clock` (seconds, monotonic) times leases, reservations, tickets and grants.
    """

    def __init__(
        self, config: DaemonConfig, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self._clock = clock
        self._stack = contextlib.AsyncExitStack()
        self._service: StoreService | None = None
        self._local: LocalSocket | None = None
        self._health: Any = None
        self._telling: set[asyncio.Future[None]] = set()
        self._tls: ServerTls | None = None
        self.readiness = Readiness(time.monotonic)
        self.reload = KeyReload()
        self.stop_asked = asyncio.Event()
        """Set when an operator asks for the end of the process."""

    async def start(self) -> Mapping[str, object]:
        """Serve; return where. Raises the store's errors, Unavailable for an address in use."""
        try:
            return await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def stop(self) -> None:
        """Drain and take everything down. Safe to call after a failed start."""
        await self._stack.aclose()

    async def _start(self) -> Mapping[str, object]:
        config, stack = self.config, self._stack
        loop = asyncio.get_running_loop()
        rules = self._read_rules()
        self._tls = self._open_tls()
        # First of all, so that probes see it start: recovery may take a while.
        metrics = self._open_metrics()
        executor = FairExecutor(CONTROL_THREADS, CONTROL_SHARE, principal_of_call, "control")
        stack.callback(executor.shutdown)
        store = await loop.run_in_executor(executor, _open_store, config, self._clock)
        stack.push_async_callback(_in_thread, store.close)
        engine = DeliveryEngine(
            store,
            DeliveryConfig(config.readers, config.attachment_inflight_bytes, config.inflight_bytes),
            clock=self._clock,
        )
        stack.push_async_callback(_in_thread, _close_engine, engine)
        planes = self._open_planes()
        access = Access(rules, store.namespace, config.limits)
        quotas = Quotas(access.limits_of, self._clock)
        service = StoreService(
            store=store,
            planes=planes,
            engine=engine,
            events=store.events,
            access=access,
            quotas=quotas,
            readiness=self.readiness,
            executor=executor,
            on_stop=self.stop_asked.set,
            clock=self._clock,
        )
        self._watch(service, access)
        self._service = service
        several = bool(rules.tokens or config.tls_client_ca)
        store.share_leases(
            ShareRule(
                service.holder_of,
                lambda holder: quotas.limits(service.principal_of(holder)).leased_bytes,
                1 if several else LEASED_TIMES_ALONE,
            )
        )
        store.set_on_expired(service.attachments.fence_expired)
        stack.push_async_callback(service.attachments.close, STOP_S_MAX)
        duties = asyncio.create_task(service.do_duties(), name="duties")
        stack.push_async_callback(_cancelled, duties)
        listen = await self._serve(store, service, engine, access, quotas)
        _log.info("serving %s at %s", config.data, listen or config.unix)
        return {
            "data": config.data,
            "listen": listen,
            "unix": config.unix,
            "local": self._local.path if self._local is not None else "",
            "data_listen": planes["tcp"].address,
            "metrics_listen": metrics,
        }

    def _open_planes(self) -> dict[str, Plane]:
        config, stack = self.config, self._stack
        if config.unix:
            check_folder(config.unix)
        limits = TcpConfig(
            send_bytes_per_s=config.send_limit_bytes_per_s,
            congestion=config.tcp_congestion,
            connections_max=ATTACHMENTS_MAX,
            marks=config.lane_marks,
            tls=config.data_tls_files,
        )
        planes = {}
        for rail, address in enumerate((config.data_address, *config.data_rails)):
            # Each link has a transport of its own, and with it a pace of its own.
            tcp = TcpTransport("daemon", self._peer_lost, limits)
            stack.push_async_callback(_in_thread, tcp.close)
            with near(node_towards(address)):
                bound = _listening(tcp, "data_rails" if rail else "data_listen", address)
            planes[rail_name("tcp", rail)] = Plane(tcp, config.dialled(bound), local_only=False)
        if config.unix:
            shm = ShmTransport(
                "daemon", self._peer_lost, ShmConfig(connections_max=ATTACHMENTS_MAX)
            )
            stack.push_async_callback(_in_thread, shm.close)
            planes["shm"] = Plane(
                shm, _listening(shm, "unix", f"{config.unix}.data"), local_only=True
            )
        return planes

    def _read_rules(self) -> AccessRules:
        """The access file as it is now. Raises InvalidRequest, Unavailable."""
        config = self.config
        rules = AccessRules()
        if config.access_file:
            rules = parse_access(_read_access(config.access_file), config.access_file)
        rules = rules.with_tokens(config.tokens)
        config.check_guarded(tokens=bool(rules.tokens))
        return rules

    def _open_tls(self) -> ServerTls | None:
        files = self.config.server_files
        return None if files is None else ServerTls(files)

    def _watch(self, service: StoreService, access: Access) -> None:
        """Read keys again when their files change."""
        config, loop = self.config, asyncio.get_running_loop()

        def apply() -> None:
            rules = self._read_rules()
            access.replace(rules)

            def gone(name: str) -> bool:
                return not access.admits(name)

            loop.call_soon_threadsafe(
                service.attachments.drop_principals, gone, "its token is not valid any more"
            )
            if self._local is not None:
                self._local.drop_principals(gone)

        if config.access_file:
            self.reload.watch("access file", [config.access_file], apply)
        if self._tls is not None and config.server_files is not None:
            self.reload.watch("certificate", config.server_files.paths, self._tls.reload)
        self._stack.push_async_callback(self.reload.stop)
        self.reload.start()

    def _open_metrics(self) -> str:
        if not self.config.metrics_listen:
            return ""

        def snapshot() -> ServiceSnapshot | None:
            return None if self._service is None else self._service.snapshot()

        probes = {"/healthz": self.readiness.alive, "/readyz": self.readiness.ready}
        collector = StoreCollector(self.readiness, self.reload, snapshot)
        server = MetricsServer(self.config.metrics_listen, collector, probes)
        self._stack.push_async_callback(_in_thread, server.close)
        return server.address

    async def _serve(
        self,
        store: BlockStore,
        service: StoreService,
        engine: DeliveryEngine,
        access: Access,
        quotas: Quotas,
    ) -> str:
        """Start gRPC; return the bound host:port, "" if there is none."""
        auth = Auth(lambda: access.rules, certificates=bool(self.config.tls_client_ca))
        turns = FairTurns()
        shares = Shares(CALLS_MAX, "outstanding calls", retry_after_s=0.1)

        @contextlib.asynccontextmanager
        async def within(caller: Caller) -> AsyncIterator[None]:
            with quotas.call(caller.principal), shares.taken(caller.sharer):
                await turns.turn(caller.principal)
                yield

        server = grpc.aio.server(
            interceptors=(ErrorInterceptor(), AuthInterceptor(auth, within)),
            options=server_options(),
            # Those that are refused, and health checks, come on top.
            maximum_concurrent_rpcs=CALLS_MAX + UNADMITTED_CALLS_MAX,
        )
        store_pb2_grpc.add_StoreServicer_to_server(service, server)
        state = self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(state, server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        listen = ""
        if self.config.listen:
            host, port = split_address(self.config.listen, "listen")
            bracketed = f"[{host}]" if ":" in host else host
            bound = self._bind_tcp(server, f"{bracketed}:{port}")
            listen = f"{bracketed}:{bound}"
            service.attachments.control_port = bound if is_wildcard(host) else 0
        if self.config.unix:
            self._bind_unix(server, self.config.unix)
        await server.start()
        self._open_local(store, service, auth)
        self._stack.push_async_callback(self._end_calls, server, state, service, engine)
        self.readiness.on_change = self._tell_health
        self.readiness.watch(self._troubles)
        self.readiness.enter(Phase.SERVING)
        await self._set_health(Phase.SERVING)
        return listen

    def _open_local(self, store: BlockStore, service: StoreService, auth: Auth) -> None:
        """Engines of this machine, without gRPC."""
        if not self.config.unix:
            return
        path = self.config.unix + local_protocol.SUFFIX
        self._local = LocalSocket(path, store, auth, service.gate, clock=self._clock)
        self._local.start()
        self._stack.push_async_callback(_in_thread, self._local.close)

    def _troubles(self) -> Mapping[str, str]:
        """What is degraded: of the store, and of the keys."""
        assert self._service is not None
        found = self._service.store_troubles()
        for name, text in self.reload.troubles().items():
            found[name.replace(" ", "_")] = text
        return found

    def _tell_health(self, phase: Phase) -> None:
        task = asyncio.ensure_future(self._set_health(phase))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _set_health(self, phase: Phase) -> None:
        """Health checks of the whole server ("") and of our service say the same."""
        serving = phase is Phase.SERVING
        state = health_pb2.HealthCheckResponse
        for name in ("", SERVICE):
            await self._health.set(name, state.SERVING if serving else state.NOT_SERVING)

    def _bind_tcp(self, server: grpc.aio.Server, address: str) -> int:
        return listen_at(server, "listen", address, self._tls.credentials if self._tls else None)

    async def _end_calls(
        self,
        server: grpc.aio.Server,
        state: Any,
        service: StoreService,
        engine: DeliveryEngine,
    ) -> None:
        self.readiness.enter(Phase.STOPPING)
        await state.enter_graceful_shutdown()
        if not await _in_thread(engine.drain, self.config.drain_s):
            _log.warning("deliveries did not drain within %g s", self.config.drain_s)
        await service.stop_streams()
        await server.stop(STOP_S_MAX)

    def _bind_unix(self, server: grpc.aio.Server, path: str) -> None:
        claim(path)
        with private_files():
            listen_at(server, "unix", f"unix:{path}")
        self._stack.callback(remove, path)

    def _peer_lost(self, peer: str, reason: str) -> None:
        if self._service is not None:
            self._service.attachments.peer_lost(peer, reason)


async def run_daemon(
    config: DaemonConfig, on_ready: Callable[[Mapping[str, object]], None]
) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal does not wait.

    `on_ready` gets `listen`, `unix`, `local`, `data_listen`, `metrics_listen` and `data` once calls
    are answered. Raises what made the start fail, with the remedy in its message.
    """
    map_large_blocks()
    raise_descriptor_limit()
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    hurry = asyncio.Event()

    def signalled() -> None:
        (hurry if stopping.is_set() else stopping).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    try:
        daemon = Daemon(config)
        daemon.stop_asked = stopping
        loop.add_signal_handler(signal.SIGHUP, daemon.reload.now)
        where = await daemon.start()
        # What a start leaves behind stays: collections need not walk it again and again, which
        # showed in the slowest calls.
        gc.collect()
        gc.freeze()
        try:
            on_ready(where)
            await stopping.wait()
        finally:
            stop = asyncio.ensure_future(daemon.stop())
            waiting = asyncio.ensure_future(hurry.wait())
            await asyncio.wait((stop, waiting), return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if not stop.done():
                # Writes that were acknowledged as durable are; the rest is lost, as by kill -9.
                _log.warning("stopped at once: deliveries were cut")
                os._exit(130)
            await stop
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)


def _open_store(config: DaemonConfig, clock: Callable[[], float]) -> BlockStore:
    try:
        return BlockStore.open(config.data, _store_config(config), clock=clock)
    except OSError as error:
        raise Unavailable(
            f"data directory {config.data} cannot be opened: {error}; check the medium, and that "
            f"this user may write to all of it, or look with `dualpath fsck {config.data}`",
            reason="data_directory",
        ) from error


def _store_config(config: DaemonConfig) -> StoreConfig:
    return StoreConfig(
        disk_bytes=config.disk_bytes,
        dram_bytes=config.dram_bytes,
        segment_bytes=config.segment_bytes,
        # What is in flight holds its read buffer, and Read streams need some, too.
        read_buffers_bytes=config.inflight_bytes + (16 << 20),
        direct=config.direct,
        io=config.io,
        io_depth=config.io_depth,
        raw_device=config.raw_device,
        shared_arena=bool(config.unix),
        events_remembered_max=config.events_max,
        namespaces_max=config.namespaces_max,
        numa_node=config.numa_node,
        mapped_owner_bytes_max=config.mapped_client_bytes_max,
        mapped_bytes_max=config.mapped_bytes_max,
        scrub_bytes_per_s=config.scrub_bytes_per_s,
        read_ahead_bytes=config.read_ahead_bytes,
        eviction=config.eviction,
        ttl_s=config.ttl_s,
        retain_bytes=config.retain_bytes,
        tenants=config.tenants,
    )


def _read_access(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InvalidRequest(
            f"access_file: cannot read {path}: {error.strerror}; correct the path or its rights"
        ) from error


def _listening(transport: Transport, field: str, address: str) -> str:
    try:
        return transport.listen(address)
    except Unavailable as error:
        raise Unavailable(
            f"{field}: {error}; choose another address", reason="address_in_use"
        ) from error


def _close_engine(engine: DeliveryEngine) -> None:
    engine.close()
    if not engine.wait_idle(STOP_S_MAX):
        _log.error("deliveries are still in flight after the transports were closed")


async def _in_thread(call: Callable[..., Any], *args: object) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, call, *args)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
