"""Data connections over TLS: who gets through; how all else ends, by name and in time."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from dualpath.bench.testbed.authority import Authority, Pair
from dualpath.transfer import stream_handshake, stream_transport
from dualpath.transfer.conformance_scene import Recorder
from dualpath.transfer.errors import (
    DeadlineExceeded,
    DualPathError,
    InvalidRequest,
    PermissionDenied,
    Unavailable,
)
from dualpath.transfer.lane import Lane
from dualpath.transfer.lane_marks import LaneMarks
from dualpath.transfer.rdma.config import RdmaConfig
from dualpath.transfer.rdma.rdma_transport import RdmaTransport
from dualpath.transfer.rdma.simulated_device import SimulatedVerbs
from dualpath.transfer.region import Region
from dualpath.transfer.slices import Slices
from dualpath.transfer.tcp_transport import (
    TcpConfig,
    TcpTransport,
    format_address,
    parse_address,
)
from dualpath.transfer.tls_files import TlsContexts, TlsFiles
from dualpath.transfer.tls_socket import TlsSocket
from dualpath.transfer.transport import Write, WriteStatus

WAIT_S = 20.0


@dataclass(frozen=True)
class Place:
    """Where certificates are made, and transports closed."""

    stack: ExitStack
    folder: Path
    authority: Authority

    def files(self, pair: Pair | None = None, authority: Authority | None = None) -> TlsFiles:
        pair = pair or self.authority.pair("both")
        ca = (authority or self.authority).ca
        return TlsFiles(pair.cert, pair.key, ca, ca)

    def transport(self, name: str, heard: Recorder, files: TlsFiles | None) -> TcpTransport:
        made = TcpTransport(name, heard.on_lost, TcpConfig(tls=files))
        self.stack.callback(made.close)
        return made


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(stack, tmp_path, Authority(tmp_path, "authority"))


def refusal(
    place: Place, dialling: TlsFiles | None, accepting: TlsFiles | None, kind: type[DualPathError]
) -> DualPathError:
    """How it ends if a transport with the one dials one with the other."""
    heard = Recorder()
    acceptor = place.transport("acceptor", heard, accepting)
    dialler = place.transport("dialler", heard, dialling)
    address = acceptor.listen("127.0.0.1:0")
    with pytest.raises(kind) as caught:
        dialler.connect("acceptor", address, acceptor.invite("dialler"), deadline_s=WAIT_S)
    assert acceptor.traffic() == []
    assert dialler.traffic() == []
    return caught.value


def test_a_dialler_with_tls_is_told_that_the_other_side_has_none(place: Place) -> None:
    error = refusal(place, place.files(), None, Unavailable)
    assert error.reason == "tls"
    assert "data_tls must be set on both sides" in str(error)


def test_a_dialler_without_tls_is_told_that_the_other_side_demands_it(place: Place) -> None:
    error = refusal(place, None, place.files(), PermissionDenied)
    assert "data_tls must be set on both sides" in str(error)


def test_a_server_that_another_authority_signed_is_refused(place: Place) -> None:
    other = Authority(place.folder, "other")
    error = refusal(
        place, place.files(), place.files(other.pair("foreign"), place.authority), Unavailable
    )
    assert error.reason == "tls"
    assert "certificate of 'acceptor' at 127.0.0.1 is not accepted" in str(error)
    assert "tls_ca" in str(error)


def test_a_client_that_another_authority_signed_is_refused(place: Place) -> None:
    other = Authority(place.folder, "other")
    error = refusal(
        place, place.files(other.pair("foreign"), place.authority), place.files(), Unavailable
    )
    assert error.reason == "tls"
    assert "does not accept our certificate" in str(error)
    assert "tls_client_ca" in str(error)


@pytest.mark.parametrize("old", ["dialler", "acceptor"])
def test_an_expired_certificate_is_refused_by_that_word(place: Place, old: str) -> None:
    good, expired = place.files(), place.files(place.authority.pair("old", days=-1))
    sides = (expired, good) if old == "dialler" else (good, expired)
    error = refusal(place, *sides, Unavailable)
    assert error.reason == "tls"
    assert "expired" in str(error)


def test_a_certificate_for_another_host_is_refused_unless_its_name_is_told(place: Place) -> None:
    elsewhere = place.files(place.authority.pair("elsewhere", hosts=("elsewhere.example",)))
    error = refusal(place, place.files(), elsewhere, Unavailable)
    assert error.reason == "tls"
    assert "tls_name" in str(error)
    heard = Recorder()
    acceptor = place.transport("a", heard, elsewhere)
    dialler = place.transport("d", heard, replace(place.files(), name="elsewhere.example"))
    address = acceptor.listen("127.0.0.1:0")
    dialler.connect("a", address, acceptor.invite("d"), deadline_s=WAIT_S)


def test_a_client_without_a_certificate_is_refused(place: Place) -> None:
    acceptor = place.transport("acceptor", Recorder(), place.files())
    host, port = parse_address(acceptor.listen("127.0.0.1:0"))
    context = ssl.create_default_context(cafile=place.authority.ca)
    with socket.create_connection((host, port), WAIT_S) as sock, suppress(ConnectionError):
        secured = context.wrap_socket(sock, server_hostname=host)
        with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
            secured.recv(1)
    assert acceptor.traffic() == []


def test_a_client_of_tls_1_2_is_refused(place: Place) -> None:
    files = place.files()
    acceptor = place.transport("acceptor", Recorder(), files)
    host, port = parse_address(acceptor.listen("127.0.0.1:0"))
    context = ssl.create_default_context(cafile=place.authority.ca)
    context.load_cert_chain(files.cert, files.key)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection((host, port), WAIT_S) as sock,
        pytest.raises(ssl.SSLError, match=r"(?i)version"),
    ):
        context.wrap_socket(sock, server_hostname=host)


def test_a_peer_that_does_not_answer_the_handshake_costs_the_deadline_only(place: Place) -> None:
    silent = place.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    dialler = place.transport("dialler", Recorder(), place.files())
    with pytest.raises(DeadlineExceeded, match="handshake of TLS"):
        dialler.connect(
            "silent", format_address(*silent.getsockname()[:2]), bytes(16), deadline_s=0.1
        )


def answering(place: Place, answer: Callable[[socket.socket], None]) -> str:
    """The address of one who answers the first bytes of a caller so, and hangs up."""
    server = place.stack.enter_context(socket.create_server(("127.0.0.1", 0)))

    def serve() -> None:
        sock, _ = server.accept()
        with sock:
            sock.recv(1)
            answer(sock)

    thread = threading.Thread(target=serve)
    thread.start()
    place.stack.callback(thread.join)
    return format_address(*server.getsockname()[:2])


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(range(256)) * 8])
def test_a_peer_that_dies_or_talks_nonsense_in_the_handshake_is_unavailable(
    place: Place, said: bytes
) -> None:
    address = answering(place, lambda sock: sock.sendall(said))
    dialler = place.transport("dialler", Recorder(), place.files())
    with pytest.raises(Unavailable) as caught:
        dialler.connect("odd", address, bytes(16), deadline_s=WAIT_S)
    assert caught.value.reason == "tls"


@pytest.mark.parametrize("said", [b"", b"\x16", b"\x16\x03\x01\x02\x00"])
def test_a_caller_that_falls_silent_in_the_handshake_is_hung_up_on_in_time(
    place: Place, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_transport, "HANDSHAKE_S", 0.2)
    acceptor = place.transport("acceptor", Recorder(), place.files())
    address = parse_address(acceptor.listen("127.0.0.1:0"))
    with socket.create_connection(address, timeout=WAIT_S) as silent:
        silent.sendall(said)
        with suppress(ConnectionResetError):
            assert silent.recv(1) == b""


def test_a_caller_that_dribbles_a_record_is_hung_up_on_in_time(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_handshake, "HANDSHAKE_S", 0.3)
    acceptor = place.transport("acceptor", Recorder(), place.files())
    sock = shaken(place, acceptor.listen("127.0.0.1:0")).raw
    sock.sendall(b"\x17\x03\x03\x40\x00")  # of 16 KiB
    sock.settimeout(0.02)
    with suppress(ConnectionError):
        while True:
            sock.sendall(b"x")
            with suppress(TimeoutError):
                assert sock.recv(1) == b""
                break


def shaken(place: Place, address: str) -> TlsSocket:
    """A caller of `address` after the handshake of TLS, before it says hello."""
    sock = socket.create_connection(parse_address(address), timeout=WAIT_S)
    place.stack.callback(sock.close)
    made = TlsSocket(sock, TlsContexts(place.files()).dialling(), "acceptor", "127.0.0.1")
    made.shake_hands(time.monotonic() + WAIT_S)
    return made


@pytest.mark.parametrize("said", [b"\x01" + bytes(63), b"\x16" + bytes(64), b"\x16\x03\x01"])
def test_garbage_in_place_of_a_hello_costs_the_caller_its_connection(
    place: Place, said: bytes
) -> None:
    heard = Recorder()
    acceptor = place.transport("acceptor", heard, place.files())
    address = acceptor.listen("127.0.0.1:0")
    with socket.create_connection(parse_address(address), timeout=WAIT_S) as odd:
        odd.sendall(said)
        odd.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while odd.recv(4096):
                pass
    dialler = place.transport("dialler", heard, place.files())
    dialler.connect("acceptor", address, acceptor.invite("dialler"), deadline_s=WAIT_S)


def test_nothing_of_what_is_written_goes_in_clear(place: Place) -> None:
    """A proxy between both ends sees only records, and never the bytes."""
    heard, seen = Recorder(), bytearray()
    writer = place.transport("writer", heard, place.files())
    reader = place.transport("reader", heard, place.files())
    address = parse_address(writer.listen("127.0.0.1:0"))
    server = place.stack.enter_context(socket.create_server(("127.0.0.1", 0)))

    def relay() -> None:
        inner, _ = server.accept()
        outer = socket.create_connection(address)
        with inner, outer:
            back = threading.Thread(target=copy, args=(outer, inner))
            back.start()
            copy(inner, outer)
            back.join()

    def copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                seen.extend(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=relay)
    thread.start()
    invitation = writer.invite("reader")
    reader.connect(
        "writer", format_address(*server.getsockname()[:2]), invitation, deadline_s=WAIT_S
    )
    assert moved(writer, reader, b"in the middle of a secret " * 4000, heard)
    writer.close()
    reader.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert b"in the middle of a secret" not in seen
    assert invitation not in seen
    assert seen[0] == stream_handshake.TLS_FIRST_BYTE


def moved(writer: TcpTransport, reader: TcpTransport, content: bytes, heard: Recorder) -> bool:
    """Whether these bytes got where they belong."""
    source, target = Region.anonymous(len(content)), Region.anonymous(len(content))
    source.view[:] = content
    whole = Slices.contiguous(0, len(content))
    window = reader.expose(target, 0, len(content), lambda _: True)
    reader.arm(window, [(1, whole)])
    before = len(heard.completions)
    write = Write(source, whole, window, whole, Lane.LOAD_PREFILL, 1, WAIT_S)
    writer.write("reader", write, heard.on_completion)
    heard.wait_completions(before + 1)
    reader.revoke(window)
    return heard.completions[before].status is WriteStatus.DONE and target.view == content


def test_a_record_that_was_changed_on_the_way_costs_the_connection_and_never_lands(
    place: Place,
) -> None:
    heard = Recorder()
    writer = place.transport("writer", heard, place.files())
    reader = place.transport("reader", heard, place.files())
    address = parse_address(writer.listen("127.0.0.1:0"))
    server = place.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    harm = threading.Event()

    def copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                if harm.is_set() and len(data) > 1000:
                    data[-1] ^= 1
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def relay() -> None:
        inner, _ = server.accept()
        outer = socket.create_connection(address)
        with inner, outer:
            back = threading.Thread(target=copy, args=(outer, inner))
            back.start()
            copy(inner, outer)
            back.join()

    thread = threading.Thread(target=relay)
    thread.start()
    reader.connect(
        "writer",
        format_address(*server.getsockname()[:2]),
        writer.invite("reader"),
        deadline_s=WAIT_S,
    )
    assert moved(writer, reader, b"good" * 10000, heard)
    harm.set()
    target = Region.anonymous(8000)
    whole = Slices.contiguous(0, 8000)
    window = reader.expose(target, 0, 8000, heard.on_arrival)
    reader.arm(window, [(1, whole)])
    source = Region.anonymous(8000)
    source.view[:] = b"evil" * 2000
    write = Write(source, whole, window, whole, Lane.LOAD_PREFILL, 1, WAIT_S)
    before = len(heard.completions)
    writer.write("reader", write, heard.on_completion)
    heard.wait_completions(before + 1)
    assert heard.completions[before].status is WriteStatus.LOST
    assert not heard.arrivals
    assert target.view == bytes(8000)
    writer.close()
    reader.close()
    thread.join(WAIT_S)
    assert any("TLS with" in reason for _, reason in heard.losses)


def test_new_files_are_used_by_new_connections_and_open_ones_go_on(place: Place) -> None:
    heard = Recorder()
    files = place.files(place.authority.pair("node"))
    writer = place.transport("writer", heard, files)
    reader = place.transport("reader", heard, place.files())
    address = writer.listen("127.0.0.1:0")
    reader.connect("writer", address, writer.invite("reader"), deadline_s=WAIT_S)
    newer = Authority(place.folder, "newer")
    newer.pair("fresh", file="node")
    assert moved(writer, reader, b"still" * 1000, heard)
    with pytest.raises(Unavailable, match="is not accepted"):
        reader.connect("writer", address, writer.invite("reader"), deadline_s=WAIT_S)
    Path(place.authority.ca).write_bytes(
        Path(place.authority.ca).read_bytes() + Path(newer.ca).read_bytes()
    )
    reader.connect("writer", address, writer.invite("reader"), deadline_s=WAIT_S)
    assert moved(writer, reader, b"again" * 1000, heard)


def test_files_that_do_not_fit_leave_the_old_ones_in_force(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")  # a command that ran before in this process may have raised it
    contexts = TlsContexts(place.files(place.authority.pair("node")))
    old = contexts.accepting()
    Path(place.folder / "node.key").write_bytes(b"nonsense")
    assert contexts.accepting() is old
    assert contexts.accepting() is old
    assert [each.levelname for each in caplog.records] == ["WARNING"]
    assert "tls_cert" in caplog.text
    place.authority.pair("node")
    assert contexts.accepting() is not old


@pytest.mark.parametrize("missing", ["cert", "key", "ca", "client_ca"])
def test_files_that_cannot_be_read_are_named_at_the_start(place: Place, missing: str) -> None:
    files = replace(place.files(), **{missing: str(place.folder / "nothing.pem")})
    with pytest.raises(Unavailable, match=f"tls_{missing} ") as caught:
        place.transport("t", Recorder(), files)
    assert caught.value.reason == "tls"


@pytest.mark.parametrize("missing", ["cert", "key", "client_ca"])
def test_settings_without_which_there_is_no_tls_are_asked_for(missing: str) -> None:
    given = {"cert": "c", "key": "k", "client_ca": "a"} | {missing: ""}
    with pytest.raises(InvalidRequest, match=f"tls_{missing}"):
        TlsFiles(**given)
    with pytest.raises(InvalidRequest, match="tls_client_ca"):
        TlsFiles("c", "k", "system")


def test_rdma_refuses_the_files_of_tls_since_it_would_not_keep_their_promise(
    place: Place,
) -> None:
    config = RdmaConfig(set_up=TcpConfig(tls=place.files()))
    with pytest.raises(InvalidRequest, match="does not encrypt"):
        RdmaTransport("r", lambda *_: None, SimulatedVerbs(), config)


def test_a_stream_a_lane_is_encrypted_too(place: Place) -> None:
    heard, files = Recorder(), place.files()
    each = LaneMarks((10, 12, 8, 1))
    writer = TcpTransport("writer", heard.on_lost, TcpConfig(tls=files, marks=each))
    reader = TcpTransport("reader", heard.on_lost, TcpConfig(tls=files))
    for transport in (writer, reader):
        place.stack.callback(transport.close)
    address = writer.listen("127.0.0.1:0")
    reader.connect("writer", address, writer.invite("reader"), deadline_s=WAIT_S)
    assert moved(writer, reader, bytes(range(256)) * 1000, heard)


def test_a_malformed_frame_within_tls_costs_the_connection(place: Place) -> None:
    acceptor = place.transport("acceptor", Recorder(), place.files())
    odd = shaken(place, acceptor.listen("127.0.0.1:0"))
    odd.settimeout(WAIT_S)
    odd.sendall(b"\x63" * 100)
    with suppress(ConnectionResetError):
        assert odd.recv(1) == b""
    assert acceptor.traffic() == []
