"""The HTTP endpoint of metrics and probes: clients that do not behave are nobody's trouble."""

from __future__ import annotations

import contextlib
import socket
import struct
import urllib.request
from collections.abc import Iterator

import pytest
from dualpath.kvstore.service import metrics_server
from dualpath.kvstore.service.config import split_address
from dualpath.kvstore.service.metrics_server import MetricsServer
from dualpath.kvstore.service.readiness import Verdict
from prometheus_client import CollectorRegistry

WAIT_S = 20.0


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    made = MetricsServer(
        "127.0.0.1:0", CollectorRegistry(), {"/healthz": lambda: Verdict(True, "up")}
    )
    with contextlib.closing(made):
        yield made


@pytest.mark.parametrize(
    "request_line", [b"", b"GET / HTTP/1.1\r\nHo", b"GET /metrics HTTP/1.0\r\n\r\n"]
)
def test_a_request_that_is_cut_off_leaves_no_trace(
    server: MetricsServer, request_line: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(20):
        with socket.create_connection(split_address(server.address, ""), WAIT_S) as link:
            link.sendall(request_line)
            # A reset instead of an orderly end.
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with urllib.request.urlopen(f"http://{server.address}/healthz", timeout=WAIT_S) as answer:
        assert answer.read() == b"up\n"
    assert capfd.readouterr().err == ""


def test_of_too_many_that_say_nothing_the_oldest_is_hung_up_on(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_server, "REQUESTS_MAX", 4)
    monkeypatch.setattr(metrics_server._SilentHandler, "timeout", None)
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(split_address(server.address, ""), WAIT_S))
            for _ in range(8)
        ]
        with urllib.request.urlopen(f"http://{server.address}/healthz", timeout=WAIT_S) as answer:
            assert answer.read() == b"up\n"
        for link in silent[:5]:
            assert link.recv(1) == b""
