"""LocalFrames: whole messages within deadlines, whether the reader spins or sleeps."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from dualpath.kvstore.local_frames import SPINS_LEFT_OUT, LocalFrames
from dualpath.kvstore.local_protocol import HEADER, MalformedMessage
from dualpath.transfer.errors import DeadlineExceeded, PeerLost

WAIT_S = 20.0
SPIN_S = 0.01


@pytest.fixture
def ends() -> Iterator[tuple[LocalFrames, socket.socket]]:
    """A reader, and the socket of its peer."""
    mine, other = socket.socketpair()
    frames = LocalFrames(mine, message_s=WAIT_S)
    with other:
        yield frames, other
    frames.close()


def message(body: bytes, request: int = 1) -> bytes:
    return HEADER.pack(len(body), 2, 0, request) + body


def taken(frames: LocalFrames, spin_s: float = SPIN_S) -> bytes | None:
    came = frames.receive(1 << 20, idle_s=WAIT_S, spin_s=spin_s)
    if came is None:
        return None
    _, _, body = came
    data = bytes(body)
    frames.consume(body)
    return data


def test_a_message_that_is_there_is_taken_while_spinning(
    ends: tuple[LocalFrames, socket.socket],
) -> None:
    frames, other = ends
    other.sendall(message(b"one") + message(b"two", 2))
    assert [taken(frames), taken(frames)] == [b"one", b"two"]


@pytest.mark.parametrize("cut", [1, HEADER.size - 1, HEADER.size, HEADER.size + 5, 100_000])
def test_a_message_in_parts_is_put_together(
    ends: tuple[LocalFrames, socket.socket], cut: int
) -> None:
    frames, other = ends
    body = bytes(range(256)) * 800
    whole = message(body)
    other.sendall(whole[:cut])
    sender = threading.Thread(target=other.sendall, args=(whole[cut:],))
    sender.start()
    assert taken(frames) == body
    sender.join(WAIT_S)


def test_a_reader_that_spun_in_vain_sleeps_until_the_message_comes(
    ends: tuple[LocalFrames, socket.socket],
) -> None:
    frames, other = ends
    for number in range(SPINS_LEFT_OUT + 2):
        later = threading.Timer(0.02 if number == 0 else 0.0, other.sendall, (message(b"x"),))
        later.start()
        assert taken(frames, 1e-6) == b"x"
        later.join(WAIT_S)


def test_the_deadline_holds_after_spinning(ends: tuple[LocalFrames, socket.socket]) -> None:
    frames, _ = ends
    with pytest.raises(DeadlineExceeded, match="no message"):
        frames.receive(1 << 20, idle_s=0.02, spin_s=0.001)


def test_a_peer_that_closes_is_seen_by_a_reader_that_spins(
    ends: tuple[LocalFrames, socket.socket],
) -> None:
    frames, other = ends
    other.close()
    assert taken(frames) is None


def test_a_peer_that_closes_within_a_message_is_lost(
    ends: tuple[LocalFrames, socket.socket],
) -> None:
    frames, other = ends
    other.sendall(message(b"whole")[:-1])
    other.close()
    with pytest.raises(PeerLost):
        taken(frames)


def test_too_long_a_message_is_refused(ends: tuple[LocalFrames, socket.socket]) -> None:
    frames, other = ends
    other.sendall(HEADER.pack(1 << 21, 2, 0, 1))
    with pytest.raises(MalformedMessage, match="at most"):
        taken(frames)
