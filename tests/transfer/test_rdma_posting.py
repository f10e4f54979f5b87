"""The native poster: what it is given arrives at the provider as it was given, or the post is
refused by name. Against a library that does nothing but look (`null_verbs.c`)."""

from __future__ import annotations

import itertools
import random
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from dualpath.transfer.errors import InvalidRequest, Unavailable
from dualpath.transfer.rdma import native_device
from dualpath.transfer.rdma.library import open_verbs
from dualpath.transfer.rdma.native_device import MISSING, NativeDevice, NativeQueuePair, NativeVerbs
from dualpath.transfer.rdma.pyverbs_device import PyverbsVerbs
from dualpath.transfer.rdma.verbs import (
    POST_MAX,
    SUCCESS,
    MemoryKeys,
    Opcode,
    Piece,
    QueueLimits,
    Received,
    Window,
    WorkRequest,
)
from dualpath.transfer.rdma.work_rows import (
    OPCODES,
    ROW,
    requests_in,
    rows_of,
    signal,
    write_rows,
)

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

if not MISSING:
    from dualpath.bench.transfer import _null_verbs

Recorded = list[tuple[int, int, int, int, int, int, list[tuple[int, int, int]]]]
SENDS = 48


class Posts:
    """A queue pair of the null device, and what arrived there."""

    def __init__(self, sends: int = 128) -> None:
        self.device: NativeDevice = NativeVerbs(_null_verbs.__file__).open("null0")
        self.queue = self.device.completion_queue(256)
        pair = self.device.queue_pair(self.queue, QueueLimits(sends, 8, 16), 1)
        assert isinstance(pair, NativeQueuePair)
        self.pair = pair

    def close(self) -> None:
        self.pair.close()
        self.queue.close()
        self.device.close()


@pytest.fixture
def posts() -> Iterator[Posts]:
    _null_verbs.begin(-1, True, True)
    made = Posts()
    yield made
    made.close()


def drawn(draw: random.Random) -> WorkRequest:
    """Any WRITE or SEND."""
    opcode = draw.choice((Opcode.WRITE, Opcode.WRITE_IMM, Opcode.SEND))
    return WorkRequest(
        draw.getrandbits(64),
        opcode,
        draw.random() < 0.3,
        tuple(
            Piece(draw.getrandbits(64), draw.getrandbits(32), draw.getrandbits(32))
            for _ in range(draw.randint(1, 16))
        ),
        draw.getrandbits(64),
        draw.getrandbits(32),
        draw.getrandbits(32) if opcode is Opcode.WRITE_IMM else 0,
    )


def as_recorded(requests: list[WorkRequest]) -> Recorded:
    return [
        (
            each.ident,
            OPCODES[each.opcode],
            int(each.signaled),
            each.remote_address,
            each.rkey,
            socket.htonl(each.immediate),
            [(at, nbytes, lkey) for at, nbytes, lkey in each.pieces],
        )
        for each in requests
    ]


def test_each_request_of_random_batches_arrives_as_specified(posts: Posts) -> None:
    draw = random.Random(41)
    for _ in range(200):
        _null_verbs.begin(-1, True, True)
        batch = [drawn(draw) for _ in range(draw.randint(1, POST_MAX))]
        rows, objects = rows_of(batch)
        assert requests_in(rows) == batch
        assert not objects
        if draw.random() < 0.5:
            posts.pair.post_rows(rows)
        else:
            posts.pair.post_send(batch)
        assert _null_verbs.recorded() == as_recorded(batch)
        assert _null_verbs.counted() == (len(batch), 1), "a batch takes one ring of the doorbell"
        told = [completion for _ in range(2) for completion in posts.queue.poll(64)]
        assert [each.ident for each in told] == [each.ident for each in batch if each.signaled]
        assert {each.status for each in told} <= {SUCCESS}
        assert {each.what for each in told} <= {Received.REQUEST}
        assert {each.queue_pair for each in told} <= {posts.pair.number}


def test_only_the_request_that_is_to_be_signaled_is() -> None:
    plain = write_rows([(1 << 40, 100), (1 << 41, 28)], 5, 1 << 50, 9)
    rows = bytearray(plain * 2)
    signal(rows, len(plain), 1 << 63)
    first, second = requests_in(rows)
    pieces = (Piece(1 << 40, 100, 5), Piece(1 << 41, 28, 5))
    assert first == WorkRequest(0, Opcode.WRITE, False, pieces, 1 << 50, 9, 0)
    assert second == WorkRequest(1 << 63, Opcode.WRITE, True, pieces, 1 << 50, 9, 0)


@pytest.mark.parametrize("at", [0, 1, 17, 63])
def test_a_provider_that_refuses_leaves_what_was_in_front_and_the_error_says_so(
    posts: Posts, at: int
) -> None:
    draw = random.Random(at)
    batch = [drawn(draw) for _ in range(POST_MAX)]
    _null_verbs.begin(at, True, True)
    with pytest.raises(Unavailable, match=rf"took {at} of 64 .* refused .* ENOMEM") as caught:
        posts.pair.post_send(batch)
    assert caught.value.reason == "refused_post"
    assert _null_verbs.recorded() == as_recorded(batch[:at])


def test_what_the_queue_has_no_room_for_is_refused_before_any_of_it_is_posted() -> None:
    _null_verbs.begin(-1, True, True)
    posts = Posts(SENDS)
    request = write_rows([(0, 1)], 1, 0, 1)
    with pytest.raises(Unavailable, match="room"):
        posts.pair.post_rows(request * (SENDS + 1))
    with pytest.raises(Unavailable, match="64"):
        posts.pair.post_rows(request * (POST_MAX + 1))
    with pytest.raises(Unavailable, match="pieces"):
        posts.pair.post_rows(write_rows([(0, 1)] * 17, 1, 0, 1))
    assert _null_verbs.counted() == (0, 0)
    posts.pair.post_rows(request * SENDS)
    assert _null_verbs.counted() == (SENDS, 1)
    posts.close()


def test_rows_that_are_none_are_refused(posts: Posts) -> None:
    good = write_rows([(0, 1)], 1, 0, 1)
    endless = write_rows([(0, 1)] * 2, 1, 0, 1)[: ROW.size]
    unknown = bytearray(good)
    unknown[40] = 99
    for rows in (b"", good[:-1], endless, bytes(unknown)):
        with pytest.raises(Unavailable, match="ibv_post_send"):
            posts.pair.post_rows(rows)
    assert _null_verbs.counted() == (0, 0)


def test_a_memory_window_is_bound_under_a_new_key_each_time(posts: Posts) -> None:
    memory: MemoryKeys = posts.device.register(4096, 4096, writable=True)
    window: Window = posts.device.window()
    keys = []
    for turn in range(300):  # past the end of its eight bits
        _null_verbs.begin(-1, True, True)
        keys.append(window.next_key())
        bind = WorkRequest(
            turn,
            Opcode.BIND,
            False,
            remote_address=4096,
            rkey=keys[-1],
            window=window,
            memory=memory,
            nbytes=512,
        )
        posts.pair.post_send([bind, WorkRequest(turn, Opcode.INVALIDATE, True, rkey=keys[-1])])
        bound, withdrawn = _null_verbs.recorded()
        assert bound[:5] == (turn, OPCODES[Opcode.BIND], 0, 4096, keys[-1])
        assert withdrawn[:3] == (turn, OPCODES[Opcode.INVALIDATE], 1)
        assert withdrawn[5] == keys[-1]
        assert len(posts.queue.poll(64)) == 1
    assert len({key >> 8 for key in keys}) == 1
    assert all(a != b for a, b in itertools.pairwise(keys))
    window.close()
    memory.close()


def test_a_halted_queue_pair_posts_nothing(posts: Posts) -> None:
    posts.pair.halt()
    with pytest.raises(Unavailable, match="halted"):
        posts.pair.post_rows(write_rows([(0, 1)], 1, 0, 1))
    assert _null_verbs.counted() == (0, 0)


def test_an_armed_queue_wakes_its_descriptor_once(posts: Posts) -> None:
    posts.queue.arm()
    for ident in range(2):
        rows = bytearray(write_rows([(0, 1)], 1, 0, 1))
        signal(rows, 0, ident)
        posts.pair.post_rows(rows)
    posts.queue.acknowledge()
    with pytest.raises(Unavailable, match="ibv_get_cq_event"):
        posts.queue.acknowledge()
    assert [each.ident for each in posts.queue.poll(64)] == [0, 1]


def test_a_closed_object_is_not_used(posts: Posts) -> None:
    posts.pair.close()
    with pytest.raises(Unavailable, match=r"a closed dualpath\.verbs\.pair is used"):
        posts.pair.post_rows(write_rows([(0, 1)], 1, 0, 1))
    with pytest.raises(Unavailable, match="ibv_modify_qp: a closed"):
        posts.pair.halt()
    posts.pair.close()  # which does nothing
    assert _null_verbs.counted() == (0, 0)


def test_a_library_that_is_none_is_named() -> None:
    with pytest.raises(Unavailable, match="no_such_library"):
        NativeVerbs("no_such_library.so")
    with pytest.raises(Unavailable, match="has no ibv_get_device_list"):
        NativeVerbs("libc.so.6")


def test_without_the_native_part_pyverbs_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(native_device, "MISSING", "not built for this test")
    monkeypatch.setattr(PyverbsVerbs, "__init__", lambda _: made.append("pyverbs"))
    assert isinstance(open_verbs(), PyverbsVerbs)
    with pytest.raises(Unavailable, match="not built for this test"):
        open_verbs("native")
    assert made == ["pyverbs"]
    with pytest.raises(InvalidRequest, match="auto, native, pyverbs"):
        open_verbs("ofi")


def test_without_either_both_reasons_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: PyverbsVerbs) -> None:
        raise Unavailable("no pyverbs; install it", reason="no_rdma")

    monkeypatch.setattr(native_device, "MISSING", "not built for this test")
    monkeypatch.setattr(PyverbsVerbs, "__init__", refuse)
    with pytest.raises(Unavailable, match="not built for this test; no pyverbs") as caught:
        open_verbs()
    assert caught.value.reason == "no_rdma"


def test_the_declared_structures_are_those_of_the_headers_where_there_are_any() -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    if not Path("/usr/include/infiniband/verbs.h").exists():
        pytest.skip("rdma-core's headers are not installed (apt install libibverbs-dev)")
    source = Path(__file__).parents[2] / "transfer/native/verbs_abi_check.c"
    said = subprocess.run(
        [compiler, "-fsyntax-only", str(source)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert said.returncode == 0, said.stderr
