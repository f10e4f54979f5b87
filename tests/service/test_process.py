"""The process: ready means serving, addresses in use are named, health, tokens, metrics, stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from dualpath.kvstore.psync_device import PsyncDevice
from dualpath.kvstore.service.process import SERVICE, run_daemon
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import InvalidRequest, Unavailable
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

WAIT_S = 20.0
TOKEN = "a-token-of-more-than-16-chars"

# What `dualpath serve` does, without the command line.
CHILD = """
import asyncio, json, sys
from dualpath.kvstore.service.config import DaemonConfig
from dualpath.kvstore.service.process import run_daemon
config = DaemonConfig(**json.loads(sys.argv[1]))
asyncio.run(run_daemon(config, lambda where: print(json.dumps(dict(where)), flush=True)))
"""


async def _check(target: str, service: str = "") -> int:
    async with grpc.aio.insecure_channel(target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)
        return int(answer.status)


def test_health_and_reflection_answer(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        target = (await lab.daemon()).where["listen"]
        serving = health_pb2.HealthCheckResponse.SERVING
        assert await _check(target) == serving
        assert await _check(target, SERVICE) == serving
        async with grpc.aio.insecure_channel(target) as channel:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            call = stub.ServerReflectionInfo(iter([request]), timeout=WAIT_S)
            answer = await call.read()
            names = {each.name for each in answer.list_services_response.service}
            assert {"dualpath.v1.Store", "grpc.health.v1.Health"} <= names

    in_lab(body)


def test_with_tokens_only_health_is_open(in_lab: Any, tmp_path: Path) -> None:
    async def body(lab: Any) -> None:
        unix = str(tmp_path / "d.sock")
        running = await lab.daemon(tokens=(TOKEN,), unix=unix)
        stats = store_pb2.StatsRequest()
        for token in ("", "another-token-of-16-chars"):
            for call in (
                lab.client(running, token).call("Stats", stats),
                lab.client(running, token).attach(),
            ):
                with pytest.raises(grpc.RpcError, match="token") as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            frames = lab.client(running, token)
            reading = frames.stub.Read(store_pb2.ReadRequest(), metadata=frames.metadata or None)
            with pytest.raises(grpc.RpcError, match="token"):
                await reading.read()
        assert await lab.client(running, TOKEN).call("Stats", stats)
        assert await lab.client(f"unix:{unix}").call("Stats", stats)
        with pytest.raises(grpc.RpcError, match="token"):
            await lab.client(f"unix:{unix}", "wrong-token-of-16-chars").call("Stats", stats)
        assert await _check(running.where["listen"])

    in_lab(body)


def test_a_session_is_of_no_use_to_another_principal(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        other = TOKEN[::-1]
        running = await lab.daemon(tokens=(TOKEN, other))
        mine = await lab.client(running, TOKEN).attach()
        namespace_id = await mine.namespace()
        thief = lab.client(running, other)
        thief.session = mine.session
        with pytest.raises(grpc.RpcError, match="attach again") as caught:
            await thief.reserve(namespace_id, lab.chain(1))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED

    in_lab(body)


@pytest.mark.parametrize("field", ["listen", "data_listen", "metrics_listen", "unix"])
def test_an_address_in_use_is_named_and_nothing_stays_behind(
    in_lab: Any, tmp_path: Path, field: str
) -> None:
    async def body(lab: Any) -> None:
        with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as local:
            tcp.bind(("127.0.0.1", 0))
            tcp.listen()
            path = tmp_path / "d.sock"
            local.bind(str(path))
            local.listen()
            taken = str(path) if field == "unix" else f"127.0.0.1:{tcp.getsockname()[1]}"
            config = lab.config(**{field: taken})
            with pytest.raises(Unavailable, match=f"{field}.*{taken}") as caught:
                await lab.daemon(config)
            assert caught.value.reason == "address_in_use"
        await lab.daemon(lab.config(data=config.data))  # its store is not locked

    in_lab(body)


def test_a_stale_unix_socket_is_replaced_and_a_file_is_not(in_lab: Any, tmp_path: Path) -> None:
    async def body(lab: Any) -> None:
        path = tmp_path / "d.sock"
        with socket.socket(socket.AF_UNIX) as gone:
            gone.bind(str(path))
        running = await lab.daemon(unix=str(path), listen="")
        assert running.where["listen"] == ""
        assert await lab.client(f"unix:{path}").call("Stats", store_pb2.StatsRequest())
        await running.daemon.stop()
        assert not path.exists()
        path.write_text("mine")
        with pytest.raises(InvalidRequest, match="no socket"):
            await lab.daemon(unix=str(path))
        assert path.read_text() == "mine"

    in_lab(body)


def test_a_missing_folder_of_the_unix_socket_is_named(in_lab: Any, tmp_path: Path) -> None:
    async def body(lab: Any) -> None:
        gone = tmp_path / "gone"
        with pytest.raises(InvalidRequest, match=f"no folder '{gone}'; create it"):
            await lab.daemon(unix=str(gone / "d.sock"))

    in_lab(body)


def test_two_daemons_cannot_share_a_directory(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        config = lab.config()
        await lab.daemon(config)
        with pytest.raises(Unavailable, match="data1"):
            await lab.daemon(config)

    in_lab(body)


def test_a_data_directory_of_a_newer_format_is_refused_by_name(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        config = lab.config()
        running = await lab.daemon(config)
        await running.daemon.stop()
        meta = Path(config.data) / "META"
        content = json.loads(meta.read_text())
        content["format"] += 1
        del content["check"]  # a newer format may have another one
        meta.write_text(json.dumps(content))
        with pytest.raises(InvalidRequest, match=f"format {content['format']}") as caught:
            await run_daemon(config, lambda where: pytest.fail("it was ready"))
        assert caught.value.reason == "newer_format"

    in_lab(body)


def test_a_file_that_the_medium_refuses_is_one_line_with_the_remedy(
    in_lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: object, name: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)

    async def body(lab: Any) -> None:
        config = lab.config(io="psync")
        first = await lab.daemon(config)
        client = await lab.client(first).attach()
        await client.save(await client.namespace(), lab.chain(1))
        await first.daemon.stop()
        monkeypatch.setattr(PsyncDevice, "open", refuse)
        with pytest.raises(Unavailable, match=r"'segment-00000000'; check .*dualpath fsck"):
            await run_daemon(config, lambda where: pytest.fail("it was ready"))

    in_lab(body)


def test_metrics_show_what_happened(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon(metrics_listen="127.0.0.1:0")
        client = await lab.client(running).attach()
        namespace_id = await client.namespace()
        hashes = lab.chain(2)
        await client.save(namespace_id, hashes)
        hit = await client.lookup(namespace_id, [*hashes, b"n" * 32])
        async with client.deliver() as delivery:
            window = delivery.window()
            good = await delivery.grant([(0, 0)], window, lease_id=hit.lease_id)
            await delivery.outcome(good)
            bad = await delivery.grant([(0, 1)], window, lease_id=12345)
            await delivery.outcome(bad)
        url = f"http://{running.where['metrics_listen']}/metrics"

        def scrape() -> str:
            with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
                return str(answer.read().decode())

        text = await asyncio.to_thread(scrape)
        for line in (
            "dualpath_blocks 2.0",
            "dualpath_attachments 1.0",
            "dualpath_hit_blocks_total 2.0",
            'dualpath_misses_total{reason="absent"} 1.0',
            f"dualpath_delivered_bytes_total {float(256 << 10)}",
            'dualpath_delivery_failures_total{reason="lease_expired"} 1.0',
            'dualpath_tier_hit_blocks_total{tier="dram"} 2.0',
            f'dualpath_tier_read_bytes_total{{tier="dram"}} {float(256 << 10)}',
            'dualpath_lane_delivered_chunks_total{lane="load_prefill"} 1.0',
            f'dualpath_lane_delivered_bytes_total{{lane="load_prefill"}} {float(256 << 10)}',
            f'dualpath_peer_delivered_bytes_total{{peer="test"}} {float(256 << 10)}',
            'dualpath_read_seconds_bucket{le="+Inf"} 1.0',
            "dualpath_delivery_seconds_count 1.0",
        ):
            assert line in text, line

    in_lab(body)


def test_stopping_ends_streams_calls_and_threads(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon()
        client = await lab.client(running).attach()
        async with client.deliver() as delivery:
            await running.daemon.stop()
            with pytest.raises(grpc.RpcError) as caught:
                await asyncio.wait_for(delivery.call.read(), WAIT_S)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await asyncio.to_thread(client.lost.wait, WAIT_S)

    in_lab(body)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_process_cleanly(in_lab: Any, number: signal.Signals) -> None:
    async def body(lab: Any) -> None:
        fields = {"data": str(lab.folder / "child"), "listen": "127.0.0.1:0"}
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CHILD, json.dumps(fields), stdout=asyncio.subprocess.PIPE
        )
        assert child.stdout is not None
        try:
            line = await asyncio.wait_for(child.stdout.readline(), WAIT_S)
            where = json.loads(line)
            assert set(where) == {
                "data",
                "listen",
                "unix",
                "local",
                "data_listen",
                "metrics_listen",
            }
            client = await lab.client(where["listen"]).attach()
            namespace_id = await client.namespace()
            await client.save(namespace_id, lab.chain(2), durable=False)
            child.send_signal(number)
            assert await asyncio.wait_for(child.wait(), WAIT_S) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
        # What was sealed without `durable` is kept by a clean stop.
        running = await lab.daemon(lab.config(data=fields["data"]))
        again = await lab.client(running).attach()
        hit = await again.lookup(await again.namespace(), lab.chain(2), lease_ms=0)
        assert hit.blocks == 2

    in_lab(body)
