"""The scheduler's service over gRPC: streams, death, restart, who may call."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from dualpath.cli.main import main
from dualpath.proto.dial import open_channel
from dualpath.proto.tls import NO_TLS, Tls
from dualpath.proto.v1 import scheduler_pb2, scheduler_pb2_grpc
from dualpath.scheduler.config import SchedulerConfig
from dualpath.scheduler.process import SchedulerServer
from dualpath.transfer.errors import InvalidRequest, Unavailable

WAIT_S = 30.0
PATIENT_S = 600.0
"""A time-out that no test reaches."""
INTERVAL_S = 0.01
"""Between a leader's fetches."""


def config(**settings: Any) -> SchedulerConfig:
    known: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "beta_tokens": 500_000,
        "report_timeout_s": PATIENT_S,
        "rejoin_s": PATIENT_S,
    }
    return SchedulerConfig(**(known | settings))


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[str]:
    """A scheduler in this process; where it listens."""
    server = SchedulerServer(config(**settings))
    where = await server.start()
    try:
        yield str(where["listen"])
    finally:
        await server.stop()


class Peer:
    """A leader or a front end: one stream, and what came by it."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.number = 0
        self.seen = 0

    async def next(self) -> Any:
        async with asyncio.timeout(WAIT_S):
            message = await self.call.read()
        assert message is not grpc.aio.EOF
        for one in message.assignment:
            self.seen = max(self.seen, one.number)
        return message

    async def report(self, *engines: str, requests: int = 0, tokens: int = 0) -> None:
        self.number += 1
        loads = [
            scheduler_pb2.EngineLoad(engine=name, requests=requests, tokens=tokens)
            for name in engines
        ]
        report = scheduler_pb2.LoadReport(number=self.number, seen=self.seen, engine=loads)
        await self.call.write(scheduler_pb2.LeadRequest(report=report))

    async def failure(self) -> grpc.aio.AioRpcError:
        """What the call ends with."""

        async def rest() -> None:
            while await self.call.read() is not grpc.aio.EOF:
                pass

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(rest(), WAIT_S)
        return caught.value


class Dialled:
    """A client of a scheduler."""

    def __init__(self, address: str, *, token: str = "", tls: Tls = NO_TLS) -> None:
        self.channel = open_channel(address, tls)
        # The stubs know the blocking kind of calls only.
        self._stub: Any = scheduler_pb2_grpc.SchedulerStub(self.channel)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    async def __aenter__(self) -> Dialled:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def lead(self, group: str, *engines: str) -> Peer:
        call = self._stub.Lead(metadata=self._metadata)
        prefill = group.startswith("P")
        message = scheduler_pb2.LeadRequest(
            group=group,
            role=scheduler_pb2.ENGINE_ROLE_PREFILL if prefill else scheduler_pb2.ENGINE_ROLE_DECODE,
            engine=[
                scheduler_pb2.EngineInfo(name=name, node=f"node-{group}", hbm_tokens=1000)
                for name in engines
            ],
        )
        await call.write(message)
        return Peer(call)

    async def enqueue(self, *requests: str, tokens: int = 100) -> Peer:
        call = self._stub.Enqueue(metadata=self._metadata)
        new = [
            scheduler_pb2.NewRequest(id=name, tokens=tokens, hit_tokens=tokens // 2)
            for name in requests
        ]
        await call.write(scheduler_pb2.EnqueueRequest(request=new))
        return Peer(call)


async def assigned(prefill: Peer, decode: Peer, front: Peer) -> scheduler_pb2.Assignment:
    """Both sides fetch until a request has its engines: it may come after a first fetch."""

    async def fetch() -> None:
        while True:
            await prefill.report("p")
            await decode.report("d")
            await asyncio.sleep(INTERVAL_S)

    fetching = asyncio.create_task(fetch())
    try:
        messages = await asyncio.gather(prefill.next(), decode.next(), front.next())
    finally:
        fetching.cancel()
        await asyncio.gather(fetching, return_exceptions=True)
    (one,) = messages[0].assignment
    assert list(messages[1].assignment) == list(messages[2].assignment) == [one]
    return one  # type: ignore[no-any-return]


def test_a_request_gets_its_engines_and_its_end_over_the_network() -> None:
    async def run() -> None:
        async with serving() as address, Dialled(address) as client:
            prefill, decode = await client.lead("P", "p"), await client.lead("D", "d")
            front = await client.enqueue("r")
            one = await assigned(prefill, decode, front)
            assert (one.request, one.prefill, one.decode, one.tokens) == ("r", "p", "d", 100)
            assert 0 <= one.prefill_reads <= 1
            words = scheduler_pb2.LeadRequest(prefilled=["r"], finished=["r"])
            await decode.call.write(words)
            end = (await front.next()).end
            assert [(one.id, one.reason) for one in end] == [("r", "")]

    asyncio.run(run())


def test_a_dead_leader_loses_its_engines_and_the_other_side_is_told() -> None:
    async def run() -> None:
        async with serving(rejoin_s=0.05) as address, Dialled(address) as client:
            async with Dialled(address) as doomed:
                prefill, decode = await doomed.lead("P", "p"), await client.lead("D", "d")
                front = await client.enqueue("r")
                await assigned(prefill, decode, front)
            assert list((await decode.next()).withdrawn) == ["r"]
            assert list((await front.next()).requeued) == ["r"]
            again = await assigned(await client.lead("P", "p"), decode, front)
            assert again.request == "r"

    asyncio.run(run())


def test_a_leader_that_says_nothing_is_hung_up_on() -> None:
    async def run() -> None:
        async with serving(report_timeout_s=0.05) as address, Dialled(address) as client:
            error = await (await client.lead("P", "p")).failure()
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "report_timeout_s" in (error.details() or "")

    asyncio.run(run())


def test_wrong_words_end_the_call_with_the_remedy() -> None:
    async def run() -> None:
        async with serving() as address, Dialled(address) as client:
            error = await (await client.lead("P")).failure()
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            leader = await client.lead("P", "p")
            await leader.report("x")
            assert "'x' is not registered" in ((await leader.failure()).details() or "")
            front = await client.enqueue("r", tokens=0)
            (end,) = (await front.next()).end
            assert (end.id, end.reason) == ("r", "invalid")

    asyncio.run(run())


def test_callers_without_the_token_are_refused() -> None:
    async def run() -> None:
        async with serving(tokens=("secret",)) as address:
            async with Dialled(address) as stranger:
                error = await (await stranger.enqueue("r")).failure()
                assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            async with Dialled(address, token="secret") as friend:
                (end,) = (await (await friend.enqueue("r", tokens=0)).next()).end
                assert end.reason == "invalid"

    asyncio.run(run())


def test_tls_serves_who_trusts_the_certificate_and_nobody_in_clear(tmp_path: Path) -> None:
    cert, key = _self_signed(tmp_path)

    async def run() -> None:
        async with serving(tls_cert=cert, tls_key=key) as address:
            async with Dialled(address, tls=Tls(cert)) as friend:
                (end,) = (await (await friend.enqueue("r", tokens=0)).next()).end
                assert end.reason == "invalid"
            async with Dialled(address) as clear:
                with pytest.raises(grpc.aio.AioRpcError):
                    await (await clear.enqueue("r")).next()

    asyncio.run(run())


def _self_signed(folder: Path) -> tuple[str, str]:
    """Paths of a certificate for this machine and of its key."""
    pytest.importorskip("cryptography", reason="cryptography is not installed (extra dev)")
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "scheduler")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return str(folder / "cert.pem"), str(folder / "key.pem")


def test_metrics_and_probes_answer() -> None:
    async def run() -> None:
        server = SchedulerServer(config(metrics_listen="127.0.0.1:0"))
        where = await server.start()
        try:
            async with Dialled(str(where["listen"])) as client:
                prefill, decode = await client.lead("P", "p"), await client.lead("D", "d")
                await assigned(prefill, decode, await client.enqueue("r"))
                texts = [
                    await asyncio.to_thread(_get, f"http://{where['metrics_listen']}/{page}")
                    for page in ("metrics", "readyz", "healthz")
                ]
        finally:
            await server.stop()
        assert "dualpath_scheduler_engines 2.0" in texts[0]
        assert 'dualpath_scheduler_events_total{event="assigned"} 1.0' in texts[0]
        assert [text.strip() for text in texts[1:]] == ["serving", "alive"]

    asyncio.run(run())


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
        return str(answer.read().decode())


def test_an_address_in_use_and_one_without_guard_are_refused() -> None:
    async def run() -> None:
        async with serving() as address:
            with pytest.raises(Unavailable, match="in use or not an address"):
                await SchedulerServer(config(listen=address)).start()
        with pytest.raises(InvalidRequest, match="reachable from other machines"):
            await SchedulerServer(config(listen="0.0.0.0:0")).start()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--policy", "best"], "policy is one of"),
        (["--beta-tokens", "-1"], "beta_tokens is -1"),
        (["--listen", "nowhere"], "listen: 'nowhere'"),
        (["--rejoin-s", "0s"], "rejoin_s is 0"),
    ],
)
def test_wrong_settings_are_refused_by_name(
    flags: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scheduler", *flags]) == 2
    assert text in capsys.readouterr().err


class Process:
    """`dualpath scheduler` in a process of its own."""

    def __init__(self, listen: str, log: Path) -> None:
        words = ["--listen", listen, "--beta-tokens", "500", "--log-level", "warning"]
        with log.open("ab") as errors:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "dualpath.cli.main", "scheduler", *words],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        assert line.startswith("ready "), log.read_text()
        self.address = str(json.loads(line.removeprefix("ready "))["listen"])

    def end(self, number: signal.Signals) -> int:
        self.child.send_signal(number)
        try:
            return self.child.wait(WAIT_S)
        finally:
            self.child.kill()


def test_after_a_kill_a_new_process_goes_on_with_what_it_is_told(tmp_path: Path) -> None:
    """The engine's load comes back with the first report, the waiting request from its sender."""

    async def before(address: str, killed: Any) -> None:
        async with Dialled(address) as client:
            prefill, decode = await client.lead("P", "p"), await client.lead("D", "d")
            front = await client.enqueue("running")
            await assigned(prefill, decode, front)
            killed()
            for peer in (prefill, decode, front):
                assert (await peer.failure()).code() is grpc.StatusCode.UNAVAILABLE

    async def after(address: str) -> None:
        async with Dialled(address) as client:
            prefill, decode = await client.lead("P", "p"), await client.lead("D", "d")
            await prefill.report("p", requests=1, tokens=501)
            await decode.report("d", requests=1, tokens=950)
            front = await client.enqueue("waiting")
            one = await assigned(prefill, decode, front)
            assert (one.request, one.number) == ("waiting", 1)

    first = Process("127.0.0.1:0", tmp_path / "log")
    try:
        asyncio.run(before(first.address, lambda: first.end(signal.SIGKILL)))
        second = Process(first.address, tmp_path / "log")
        try:
            asyncio.run(after(second.address))
        finally:
            assert second.end(signal.SIGTERM) == 0, (tmp_path / "log").read_text()
    finally:
        first.child.kill()
