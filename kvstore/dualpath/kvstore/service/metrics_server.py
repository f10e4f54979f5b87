"""The HTTP endpoint of a process: metrics for Prometheus and probes for whoever runs it.

Owns a listening socket and its thread. It asks for no token and shows counters and states only, so
it belongs on loopback or a private network.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterable, Mapping
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, TypeAlias
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from dualpath.kvstore.service.config import split_address
from dualpath.kvstore.service.readiness import Verdict
from dualpath.transfer.errors import Unavailable
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

JOIN_S_MAX = 5.0
REQUEST_S_MAX = 10.0
REQUESTS_MAX = 64
"""Most requests at once, each on a thread. Of more, the one that has had the most time is hung up
on: whoever asks at once gets his answer, however many drip."""
_log = logging.getLogger(__name__)

Probes: TypeAlias = Mapping[str, Callable[[], Verdict]]
"""By path, such as `/readyz`: what a probe of it is told."""


class MetricsServer:
    """The HTTP endpoint of a registry and of probes, on its own thread."""

    def __init__(self, address: str, collector: Collector, probes: Probes) -> None:
        """Listen at host:port. Raises Unavailable if the port is in use."""
        host, port = split_address(address, "metrics_listen")
        registry = CollectorRegistry()
        registry.register(collector)
        metrics = make_wsgi_app(registry)

        def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
            probe = probes.get(environ.get("PATH_INFO", ""))
            if probe is None:
                body: Iterable[bytes] = metrics(environ, start)
                return body
            verdict = probe()
            status = "200 OK" if verdict.good else "503 Service Unavailable"
            start(status, [("Content-Type", "text/plain; charset=utf-8")])
            return [f"{verdict.text}\n".encode()]

        try:
            self._server = make_server(
                host, port, answer, _server_class(host), handler_class=_SilentHandler
            )
        except OSError as error:
            raise Unavailable(
                f"metrics_listen: {address}: {error.strerror or error}; choose another port",
                reason="address_in_use",
            ) from error
        self._thread = Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()
        bracketed = f"[{host}]" if ":" in host else host
        self.address = f"{bracketed}:{self._server.server_port}"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(JOIN_S_MAX)


class _SilentHandler(WSGIRequestHandler):
    """Probes come every second: they are not logged. A client that says nothing is hung up on."""

    timeout = REQUEST_S_MAX

    def handle(self) -> None:
        """Answer one request; one that is cut off is nobody's."""
        try:
            super().handle()
        except OSError as error:
            _log.debug("a request for metrics was cut off: %s", error)

    def finish(self) -> None:
        """Send what is left of the answer, if somebody is there."""
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def _server_class(host: str) -> type[WSGIServer]:
    class Server(ThreadingWSGIServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def __init__(self, *arguments: Any, **named: Any) -> None:
            self._lock = Lock()
            self._under_way: dict[Any, None] = {}
            super().__init__(*arguments, **named)

        def process_request(self, request: Any, client_address: Any) -> None:
            oldest = None
            with self._lock:
                if len(self._under_way) >= REQUESTS_MAX:
                    oldest = next(iter(self._under_way))
                    del self._under_way[oldest]
                self._under_way[request] = None
            if oldest is not None:
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
            super().process_request(request, client_address)

        def shutdown_request(self, request: Any) -> None:
            with self._lock:
                self._under_way.pop(request, None)
            super().shutdown_request(request)

    return Server
