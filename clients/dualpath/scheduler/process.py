"""The scheduler process: the hub with its gRPC server and metrics, until it is told to stop.

Owns the order: ready only when all of it answers. Prints nothing and reads no environment. It
keeps nothing on disk: after a restart leaders and front ends tell it what it has to know.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial

import grpc
import grpc.aio
from dualpath.kvstore.descriptor_limit import raise_descriptor_limit
from dualpath.kvstore.service.access_rules import AccessRules
from dualpath.kvstore.service.auth import Auth, AuthInterceptor
from dualpath.kvstore.service.key_reload import KeyReload
from dualpath.kvstore.service.metrics_server import MetricsServer
from dualpath.kvstore.service.readiness import Phase, Readiness
from dualpath.kvstore.service.server_tls import ServerTls
from dualpath.proto.channel import server_options
from dualpath.proto.handlers import ErrorInterceptor
from dualpath.proto.listen import listen_at
from dualpath.proto.v1 import scheduler_pb2, scheduler_pb2_grpc
from dualpath.scheduler.config import SchedulerConfig
from dualpath.scheduler.hub import Hub
from dualpath.scheduler.metrics import SchedulerCollector, SchedulerSnapshot, snapshot_of
from dualpath.scheduler.scheduler_service import SchedulerService
from dualpath.scheduler.settings import COLLECT_AFTER
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

STOP_S_MAX = 2.0
SNAPSHOT_S_MAX = 5.0
"""How long a scrape waits for the loop."""
TICKS = 8
"""Looks at silent leaders within the shorter of report_timeout_s and rejoin_s."""
TICK_S_MAX = 1.0
SERVICE = scheduler_pb2.DESCRIPTOR.services_by_name["Scheduler"].full_name


class SchedulerServer:
    """A scheduler that serves others. `start` and `stop` once each, in one loop."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.hub = Hub(config)
        self.readiness = Readiness(time.monotonic)
        self.reload = KeyReload()
        self._stack = contextlib.AsyncExitStack()

    async def start(self) -> Mapping[str, object]:
        """Serve; return where. Raises InvalidRequest, Unavailable (an address in use)."""
        self.config.check_trust()
        try:
            metrics = self._serve_metrics()
            listen = await self._serve_calls()
        except BaseException:
            await self._stack.aclose()
            raise
        ticking = asyncio.create_task(self._tick())
        self._stack.push_async_callback(_ended, ticking)
        self.readiness.enter(Phase.SERVING)
        self._stack.callback(self.readiness.enter, Phase.STOPPING)
        return {"listen": listen, "metrics_listen": metrics}

    async def stop(self) -> None:
        """Take everything down; idempotent."""
        await self._stack.aclose()

    async def _tick(self) -> None:
        config = self.config
        pause_s = min(config.report_timeout_s, config.rejoin_s) / TICKS
        while True:
            self.readiness.beat()
            self.hub.tick(time.monotonic())
            await asyncio.sleep(min(pause_s, TICK_S_MAX))

    def _serve_metrics(self) -> str:
        if not self.config.metrics_listen:
            return ""
        hub, loop = self.hub, asyncio.get_running_loop()

        def snapshot() -> SchedulerSnapshot:
            # The endpoint has a thread of its own; the hub belongs to the loop.
            async def take() -> SchedulerSnapshot:
                return snapshot_of(hub)

            return asyncio.run_coroutine_threadsafe(take(), loop).result(SNAPSHOT_S_MAX)

        probes = {"/healthz": self.readiness.alive, "/readyz": self.readiness.ready}
        server = MetricsServer(self.config.metrics_listen, SchedulerCollector(snapshot), probes)
        self._stack.push_async_callback(partial(loop.run_in_executor, None, server.close))
        return server.address

    async def _serve_calls(self) -> str:
        config = self.config
        rules = AccessRules().with_tokens(config.tokens)
        server = grpc.aio.server(
            interceptors=(
                ErrorInterceptor(),
                AuthInterceptor(Auth(lambda: rules, certificates=bool(config.tls_client_ca))),
            ),
            options=server_options(),
            # A few calls of health and reflection beside the streams.
            maximum_concurrent_rpcs=config.groups_max + config.front_ends_max + 64,
        )
        service = SchedulerService(self.hub, time.monotonic)
        scheduler_pb2_grpc.add_SchedulerServicer_to_server(service, server)
        state = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(state, server)
        reflection.enable_server_reflection(
            (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        listen = self._listen(server)
        await server.start()
        self._stack.push_async_callback(server.stop, STOP_S_MAX)
        await state.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        return listen

    def _listen(self, server: grpc.aio.Server) -> str:
        address, files, credentials = self.config.listen, self.config.server_files, None
        if files is not None:
            tls = ServerTls(files)
            self.reload.watch("certificate", files.paths, tls.reload)
            self._stack.push_async_callback(self.reload.stop)
            self.reload.start()
            credentials = tls.credentials
        port = listen_at(server, "listen", address, credentials)
        return f"{address.rpartition(':')[0]}:{port}"


async def run_scheduler(
    config: SchedulerConfig, on_ready: Callable[[Mapping[str, object]], None]
) -> None:
    """Serve until SIGTERM or SIGINT. `on_ready` gets listen and metrics_listen. Raises what made
    the start fail, with the remedy in its message."""
    raise_descriptor_limit()
    gc.set_threshold(COLLECT_AFTER)
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = SchedulerServer(config)
    loop.add_signal_handler(signal.SIGHUP, server.reload.now)
    try:
        on_ready(await server.start())
        await stopping.wait()
    finally:
        await server.stop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
