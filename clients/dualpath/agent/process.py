"""The agent process: the agent with its servers, until it is told to stop.

Owns the gRPC server (engines over the Unix socket, peers over TCP), the region socket and the
metrics endpoint, and their order: ready only when all of them answer; down in reverse, with all
memory fenced. Prints nothing and reads no environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial

import grpc
import grpc.aio
from dualpath.agent.agent import Agent
from dualpath.agent.agent_service import AgentService
from dualpath.agent.config import AgentConfig
from dualpath.agent.metrics import AgentCollector, AgentSnapshot, snapshot_of
from dualpath.agent.network import MakeTransport
from dualpath.agent.region_socket import RegionSocket
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
from dualpath.proto.v1 import agent_pb2, agent_pb2_grpc
from dualpath.transfer.unix_path import claim, private_files, remove
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

CALLS_MAX = 8192
STOP_S_MAX = 2.0
SNAPSHOT_S_MAX = 5.0
"""How long a scrape waits for the loop."""
SETTLE_S_MAX = 3.0
"""How long a start waits for daemons and relays; absent ones are tried again later."""
REGIONS_SUFFIX = ".regions"
SERVICE = agent_pb2.DESCRIPTOR.services_by_name["Agent"].full_name


class AgentServer:
    """An agent that serves others. `start` and `stop` once each, in one loop."""

    def __init__(
        self,
        config: AgentConfig,
        *,
        make_storage: MakeTransport | None = None,
        make_compute: MakeTransport | None = None,
    ) -> None:
        self.config = config
        self.agent = Agent(config, make_storage=make_storage, make_compute=make_compute)
        self.metrics_address = ""
        self.readiness = Readiness(time.monotonic)
        self.reload = KeyReload()
        self._stack = contextlib.AsyncExitStack()

    async def start(self) -> Mapping[str, object]:
        """Serve; return where. Raises InvalidRequest, Unavailable (an address in use)."""
        try:
            return await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def stop(self) -> None:
        """Take everything down; idempotent."""
        await self._stack.aclose()

    async def _start(self) -> Mapping[str, object]:
        config, stack = self.config, self._stack
        await self.agent.start(relaying=True)
        stack.push_async_callback(self.agent.stop)
        self.metrics_address = self._serve_metrics()
        listen = await self._serve_calls()
        if config.unix:
            sockets = RegionSocket(
                config.unix + REGIONS_SUFFIX, self.agent.regions, asyncio.get_running_loop()
            )
            sockets.start()
            stack.push_async_callback(sockets.close)
        await self.agent.settled(SETTLE_S_MAX)
        self.readiness.enter(Phase.SERVING)
        stack.callback(self.readiness.enter, Phase.STOPPING)
        return {
            "name": config.name,
            "listen": listen,
            "unix": config.unix,
            "data_listen": self.agent.compute.transport.address,
            "metrics_listen": self.metrics_address,
        }

    def _serve_metrics(self) -> str:
        if not self.config.metrics_listen:
            return ""
        agent, loop = self.agent, asyncio.get_running_loop()

        def snapshot() -> AgentSnapshot:
            # The endpoint has a thread of its own; the agent's parts belong to the loop.
            async def take() -> AgentSnapshot:
                return snapshot_of(agent)

            return asyncio.run_coroutine_threadsafe(take(), loop).result(SNAPSHOT_S_MAX)

        probes = {"/healthz": self.readiness.alive, "/readyz": self.readiness.ready}
        server = MetricsServer(self.config.metrics_listen, AgentCollector(snapshot), probes)
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
            maximum_concurrent_rpcs=CALLS_MAX,
        )
        agent_pb2_grpc.add_AgentServicer_to_server(AgentService(self.agent), server)
        state = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(state, server)
        reflection.enable_server_reflection(
            (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        listen = ""
        if config.listen:
            host = config.listen.rpartition(":")[0]
            listen = f"{host}:{listen_at(server, 'listen', config.listen, self._credentials())}"
        if config.unix:
            claim(config.unix)
            with private_files():
                listen_at(server, "unix", f"unix:{config.unix}")
            self._stack.callback(remove, config.unix)
        await server.start()
        self._stack.push_async_callback(server.stop, STOP_S_MAX)
        await state.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        return listen

    def _credentials(self) -> grpc.ServerCredentials | None:
        """Those of our TCP address, renewed when the files change; None without TLS."""
        files = self.config.server_files
        if files is None:
            return None
        tls = ServerTls(files)
        self.reload.watch("certificate", files.paths, tls.reload)
        self._stack.push_async_callback(self.reload.stop)
        self.reload.start()
        return tls.credentials


async def run_agent(config: AgentConfig, on_ready: Callable[[Mapping[str, object]], None]) -> None:
    """Serve until SIGTERM or SIGINT. `on_ready` gets name, listen, unix, data_listen and
    metrics_listen. Raises what made the start fail, with the remedy in its message."""
    raise_descriptor_limit()
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = AgentServer(config)
    loop.add_signal_handler(signal.SIGHUP, server.reload.now)
    try:
        on_ready(await server.start())
        await stopping.wait()
    finally:
        await server.stop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)
