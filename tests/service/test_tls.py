"""TLS with real handshakes: who is refused, who a certificate makes, and keys that change."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from dualpath.agent.config import AgentConfig
from dualpath.agent.process import AgentServer
from dualpath.kvstore.service.config import DaemonConfig
from dualpath.proto.dial import open_channel
from dualpath.proto.status import translated
from dualpath.proto.tls import Tls
from dualpath.proto.v1 import store_pb2, store_pb2_grpc
from dualpath.transfer.errors import DualPathError, InvalidRequest, PermissionDenied, Unavailable

CALL_S = 20.0
DAY = datetime.timedelta(days=1)
NOW = datetime.datetime.now(datetime.UTC)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


@dataclass(frozen=True)
class Pair:
    """Paths of a certificate and its key."""

    cert: str
    key: str


class Authority:
    """Signs certificates, and keeps them as PEM files in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(_name(name))
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - DAY)
            .not_valid_after(NOW + DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        )
        self.ca = str(folder / f"{name}.pem")
        Path(self.ca).write_bytes(_pem(builder.sign(self._key, hashes.SHA256())))

    def pair(
        self,
        name: str,
        *,
        hosts: tuple[str, ...] = ("localhost", "127.0.0.1"),
        until: datetime.datetime = NOW + DAY,
        file: str = "",
    ) -> Pair:
        """A certificate for `name`, written over those of the same `file`."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = []
        for host in hosts:
            try:
                names.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                names.append(x509.DNSName(host))
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name) if name else x509.Name([]))
            .issuer_name(_name(self._name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - 3 * DAY)
            .not_valid_after(until)
            .add_extension(x509.SubjectAlternativeName(names), critical=not name)
        )
        pair = Pair(
            str(self._folder / f"{file or name}.crt"), str(self._folder / f"{file or name}.key")
        )
        # As one would replace them: written beside, then renamed.
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        for path, data in (
            (pair.key, private),
            (pair.cert, _pem(builder.sign(self._key, hashes.SHA256()))),
        ):
            Path(f"{path}.new").write_bytes(data)
            os.replace(f"{path}.new", path)
        return pair


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """One authority for servers and clients."""
    return Authority(tmp_path, "authority")


async def _ask(target: str, tls: Tls, token: str = "") -> store_pb2.StatsResponse:
    """One call over a channel of its own."""
    channel = open_channel(target, tls)
    stub: Any = store_pb2_grpc.StoreStub(channel)
    metadata = (("authorization", f"Bearer {token}"),) if token else None
    try:
        with translated("Stats"):
            answer = await stub.Stats(
                store_pb2.StatsRequest(), timeout=CALL_S, metadata=metadata, wait_for_ready=False
            )
            assert isinstance(answer, store_pb2.StatsResponse)
            return answer
    finally:
        await channel.close()


async def _refusal(target: str, tls: Tls, token: str = "") -> DualPathError:
    with pytest.raises(DualPathError) as caught:
        await _ask(target, tls, token)
    return caught.value


def test_a_daemon_with_a_certificate_answers_over_tls_and_only_over_tls(
    in_lab: Any, authority: Authority
) -> None:
    async def body(lab: Any) -> None:
        server = authority.pair("daemon")
        running = await lab.daemon(tls_cert=server.cert, tls_key=server.key)
        target = running.where["listen"]
        assert (await _ask(target, Tls(authority.ca))).state == "serving"
        assert isinstance(await _refusal(target, Tls()), Unavailable)

    in_lab(body)


@pytest.mark.parametrize("wrong", ["authority", "name", "expired"])
def test_a_daemon_that_cannot_be_trusted_is_refused_with_reason_tls(
    in_lab: Any, authority: Authority, tmp_path: Path, wrong: str
) -> None:
    async def body(lab: Any) -> None:
        other = Authority(tmp_path, "other")
        hosts = ("elsewhere.example",) if wrong == "name" else ("127.0.0.1",)
        until = NOW - DAY if wrong == "expired" else NOW + DAY
        server = authority.pair("daemon", hosts=hosts, until=until)
        running = await lab.daemon(tls_cert=server.cert, tls_key=server.key)
        ca = other.ca if wrong == "authority" else authority.ca
        refused = await _refusal(running.where["listen"], Tls(ca))
        assert isinstance(refused, Unavailable)
        assert refused.reason == "tls", str(refused)
        assert "tls_ca" in str(refused)
        if wrong == "name":
            named = Tls(ca, name="elsewhere.example")
            assert (await _ask(running.where["listen"], named)).state == "serving"

    in_lab(body)


@pytest.mark.parametrize("shown", ["none", "foreign", "expired"])
def test_mutual_tls_admits_only_certificates_that_its_authority_signed(
    in_lab: Any, authority: Authority, tmp_path: Path, shown: str
) -> None:
    async def body(lab: Any) -> None:
        server = authority.pair("daemon")
        running = await lab.daemon(
            tls_cert=server.cert, tls_key=server.key, tls_client_ca=authority.ca
        )
        good = authority.pair("prefill-7")
        answer = await _ask(running.where["listen"], Tls(authority.ca, good.cert, good.key))
        assert [usage.name for usage in answer.principal] == ["cert:prefill-7"]
        if shown == "none":
            tls = Tls(authority.ca)
        elif shown == "foreign":
            bad = Authority(tmp_path, "other").pair("prefill-7", file="foreign")
            tls = Tls(authority.ca, bad.cert, bad.key)
        else:
            bad = authority.pair("prefill-7", until=NOW - DAY, file="late")
            tls = Tls(authority.ca, bad.cert, bad.key)
        assert isinstance(await _refusal(running.where["listen"], tls), Unavailable)

    in_lab(body)


def test_a_certificate_without_a_common_name_is_known_by_its_first_other_name(
    in_lab: Any, authority: Authority
) -> None:
    async def body(lab: Any) -> None:
        server = authority.pair("daemon")
        running = await lab.daemon(
            tls_cert=server.cert, tls_key=server.key, tls_client_ca=authority.ca
        )
        pair = authority.pair("", hosts=("agent-3.example",), file="unnamed")
        answer = await _ask(running.where["listen"], Tls(authority.ca, pair.cert, pair.key))
        assert [usage.name for usage in answer.principal] == ["cert:agent-3.example"]

    in_lab(body)


def test_a_certificate_suffices_where_tokens_are_set_and_a_wrong_token_does_not(
    in_lab: Any, authority: Authority
) -> None:
    async def body(lab: Any) -> None:
        server = authority.pair("daemon")
        running = await lab.daemon(
            tls_cert=server.cert,
            tls_key=server.key,
            tls_client_ca=authority.ca,
            tokens=("a-token-of-enough-chars",),
        )
        pair = authority.pair("agent")
        tls = Tls(authority.ca, pair.cert, pair.key)
        await _ask(running.where["listen"], tls)
        refused = await _refusal(running.where["listen"], tls, "another-token-of-enough")
        assert isinstance(refused, PermissionDenied)
        assert refused.reason == "token"

    in_lab(body)


def test_a_new_certificate_is_used_without_dropping_what_is_connected(
    in_lab: Any, authority: Authority, tmp_path: Path
) -> None:
    async def body(lab: Any) -> None:
        server = authority.pair("daemon")
        running = await lab.daemon(tls_cert=server.cert, tls_key=server.key)
        target = running.where["listen"]
        old = open_channel(target, Tls(authority.ca))
        stub: Any = store_pb2_grpc.StoreStub(old)
        first = await stub.Stats(store_pb2.StatsRequest(), timeout=CALL_S)
        newer = Authority(tmp_path, "newer")
        newer.pair("daemon")  # over the old files

        async def changed() -> bool:
            try:
                await _ask(target, Tls(newer.ca))
            except Unavailable:
                return False
            return True

        await lab.until(changed, "the new certificate is used")
        again = await stub.Stats(store_pb2.StatsRequest(), timeout=CALL_S)
        assert again.server_id == first.server_id
        await old.close()
        assert (await _refusal(target, Tls(authority.ca))).reason == "tls"

    in_lab(body)


def test_files_that_do_not_fit_leave_the_old_certificate_in_force_and_are_shown(
    in_lab: Any, authority: Authority
) -> None:
    async def body(lab: Any) -> None:
        server = authority.pair("daemon")
        running = await lab.daemon(tls_cert=server.cert, tls_key=server.key)
        target = running.where["listen"]
        Path(server.key).write_bytes(Path(authority.pair("stranger").key).read_bytes())

        async def shown() -> bool:
            return "certificate" in (await _ask(target, Tls(authority.ca))).troubles

        await lab.until(shown, "the trouble is shown")
        authority.pair("daemon")

        async def gone() -> bool:
            return not (await _ask(target, Tls(authority.ca))).troubles

        await lab.until(gone, "the trouble is gone")

    in_lab(body)


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"tls_cert": "x"}, "tls_key"),
        ({"tls_key": "x"}, "tls_cert"),
        ({"tls_client_ca": "x"}, "tls_cert"),
    ],
)
def test_half_a_pair_is_refused_by_name(files: dict[str, str], word: str) -> None:
    with pytest.raises(InvalidRequest, match=word):
        DaemonConfig(data="d", **files)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=word):
        AgentConfig(name="a", daemons=("127.0.0.1:1",), **files)  # type: ignore[arg-type]


def test_a_missing_file_stops_the_start_with_its_name(in_lab: Any, tmp_path: Path) -> None:
    async def body(lab: Any) -> None:
        with pytest.raises(Unavailable, match="tls_cert: cannot read") as caught:
            await lab.daemon(tls_cert=str(tmp_path / "no"), tls_key=str(tmp_path / "no"))
        assert caught.value.reason == "tls"

    in_lab(body)


def test_client_certificates_guard_an_address_beyond_loopback() -> None:
    files = {"tls_cert": "c", "tls_key": "k"}
    DaemonConfig(data="d", listen="10.1.2.3:0", tls_client_ca="ca", **files)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="tls_client_ca"):
        # Encrypted, but open to everybody.
        DaemonConfig(data="d", listen="10.1.2.3:0", **files)  # type: ignore[arg-type]


def test_an_agent_reaches_its_daemon_and_its_relay_by_mutual_tls(
    in_lab: Any, authority: Authority
) -> None:
    async def body(lab: Any) -> None:
        server = authority.pair("daemon")
        running = await lab.daemon(
            tls_cert=server.cert, tls_key=server.key, tls_client_ca=authority.ca
        )

        def config(name: str, **more: Any) -> AgentConfig:
            pair = authority.pair(name)
            return AgentConfig(
                name=name,
                daemons=(running.where["listen"],),
                tls_ca=authority.ca,
                tls_cert=pair.cert,
                tls_key=pair.key,
                tls_client_ca=authority.ca,
                **more,
            )

        relay = AgentServer(config("decode-1"))
        where = await relay.start()
        loader = AgentServer(config("prefill-1", relays=(f"decode-1={where['listen']}",)))
        try:
            await loader.start()

            async def up() -> bool:
                paths = {path.path: path.up for path in loader.agent.stats().path}
                return paths == {"direct": True, "relay:decode-1": True}

            await lab.until(up, "both paths are up")
            tls = Tls(authority.ca, server.cert, server.key)
            principals = (await _ask(running.where["listen"], tls)).principal
            assert {"cert:decode-1", "cert:prefill-1"} <= {usage.name for usage in principals}
        finally:
            await loader.stop()
            await relay.stop()

    in_lab(body)


def test_sighup_reads_the_keys_again(in_lab: Any, authority: Authority) -> None:
    async def body(lab: Any) -> None:
        server = authority.pair("daemon")
        running = await lab.daemon(tls_cert=server.cert, tls_key=server.key)
        reload = running.daemon.reload
        before = reload.reloads
        reload.now()  # what the signal does

        async def read() -> bool:
            await asyncio.sleep(0)
            return bool(reload.reloads > before)

        await lab.until(read, "the files are read again")

    in_lab(body)
