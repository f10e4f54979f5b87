"""Blocks of the daemon of this machine are read in place, or copied and right."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from dualpath.client.local_loopback import (
    CONFIG,
    LAYOUT,
    NBYTES,
    Served,
    chain,
    content,
    serving,
)
from dualpath.client.local_store import LocalStore
from dualpath.kvstore.block_store import BlockStore
from dualpath.kvstore.chain import parents_of
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.packed_hashes import PackedHashes
from dualpath.kvstore.store_api import TIERS, MissReason, Tier
from dualpath.transfer.errors import (
    DualPathError,
    InvalidRequest,
    LeaseExpired,
    Overloaded,
    Unavailable,
)


def test_lookups_over_the_socket_say_what_the_store_says(served: Served) -> None:
    hashes = chain(5)
    served.put(hashes[:3])
    client = served.client()
    client.ping()
    mine = client.lookup(served.space, hashes)
    theirs = served.store.lookup(served.space, hashes, owner="x", lease_s=0)
    assert (mine.blocks, mine.miss, mine.detail) == (theirs.blocks, theirs.miss, theirs.detail)
    assert np.array_equal(mine.checksums, theirs.checksums)
    assert np.array_equal(mine.tiers, theirs.tiers)
    assert client.lookup(served.space, PackedHashes.of(hashes), checksums=False).blocks == 3
    with pytest.raises(InvalidRequest, match="never opened") as refused:
        client.lookup(b"?" * 16, hashes)
    assert refused.value.reason == "namespace"
    with pytest.raises(InvalidRequest, match="16"):
        client.lookup(b"short", hashes)


def test_blocks_are_read_where_they_lie(served: Served) -> None:
    hashes = chain(4)
    served.put(hashes)
    client = served.client()
    with client.map(served.space, [*hashes, b"x" * 32]) as mapped:
        assert (len(mapped), mapped.hit.miss) == (4, MissReason.ABSENT)
        for index, block in enumerate(hashes):
            view = mapped.view(index)
            assert view.readonly
            assert view == content(block)
            assert mapped.array(index).tobytes() == content(block)
        assert mapped.stable()
        served.push_out()
        assert mapped.view(2) == content(hashes[2])
        assert mapped.stable()
        mapped.renew(5.0)
    assert not mapped.stable()
    assert served.store.stats().mapped_leases == 0


def on_disk(path: Path, hashes: list[bytes]) -> Namespace:
    """Blocks that a daemon which starts now finds on its SSD only."""
    namespace = Namespace(model="on disk", layout=LAYOUT)
    with BlockStore.open(path / "data", CONFIG) as store:
        space = store.open_namespace(namespace)
        store.put(space, hashes, parents_of(hashes), [content(h) for h in hashes])
    return namespace


@pytest.mark.parametrize("verify", [True, False])
def test_read_into_copies_what_is_in_memory_and_on_disk(tmp_path: Path, verify: bool) -> None:
    hashes = chain(6)
    namespace = on_disk(tmp_path, hashes[:4])
    with serving(tmp_path) as served:
        served.space = served.store.open_namespace(namespace)
        data = [content(h) for h in hashes[4:]]
        served.store.put(served.space, hashes[4:], hashes[3:5], data)
        client = served.client()
        for fetched in (4, 0):
            target = bytearray(7 * NBYTES)
            read = client.read_into(served.space, hashes, target, verify=verify)
            assert (read.blocks, read.fetched, read.miss) == (6, fetched, MissReason.NONE)
            assert target[: 6 * NBYTES] == b"".join(map(content, hashes))
        assert served.store.stats().leases == 0


def test_tiers_are_told_and_what_is_on_disk_has_no_view(tmp_path: Path) -> None:
    hashes = chain(2)
    namespace = on_disk(tmp_path, hashes)
    with serving(tmp_path) as served:
        space = served.store.open_namespace(namespace)
        client = served.client()
        assert [TIERS[t] for t in client.lookup(space, hashes).tiers] == [Tier.SSD] * 2
        with client.map(space, hashes) as mapped:
            assert mapped.offsets.tolist() == [-1, -1]
            with pytest.raises(InvalidRequest, match="read_into"):
                mapped.view(1)
        client.read_into(space, hashes, bytearray(2 * NBYTES))
        assert [TIERS[t] for t in client.lookup(space, hashes).tiers] == [Tier.DRAM] * 2


def test_read_into_goes_where_it_is_told_and_ends_where_the_prefix_ends(served: Served) -> None:
    hashes = chain(5)
    served.put(hashes[:3])
    client = served.client()
    target = bytearray(3 * NBYTES)
    at = np.array([2 * NBYTES, NBYTES, 0, 0, 0])
    read = client.read_into(served.space, hashes, target, at=at)
    assert (read.blocks, read.miss) == (3, MissReason.ABSENT)
    assert target == b"".join(map(content, reversed(hashes[:3])))
    assert client.read_into(served.space, [], target).blocks == 0
    with pytest.raises(InvalidRequest, match="leave"):
        client.read_into(served.space, hashes[:3], target, at=at + 1)
    client.ping()


def test_a_flipped_byte_in_memory_is_found_and_read_again(served: Served) -> None:
    hashes = chain(3)
    served.put(hashes)
    client = served.client()
    with client.map(served.space, hashes) as mapped:
        served.store.arena.view[int(mapped.offsets[1]) + NBYTES - 1] ^= 4
        target = bytearray(3 * NBYTES)
        read = mapped.read_into(target)
    assert (read.blocks, read.fetched) == (3, 1)
    assert target == b"".join(map(content, hashes))


def test_the_guard_tells_a_reader_that_its_time_was_over(served: Served) -> None:
    hashes = chain(3)
    served.put(hashes)
    client = served.client()
    mapped = client.map(served.space, hashes, lease_s=5)
    served.clock.ahead += 6
    served.push_out()
    assert not mapped.stable()
    with pytest.raises(LeaseExpired):
        mapped.read_into(bytearray(3 * NBYTES), verify=False)
    with pytest.raises(LeaseExpired):
        mapped.renew(5)
    mapped.release()


def test_the_end_of_the_daemon_is_unavailable_and_views_stay_mapped(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.put(chain(1))
        client = served.client()
        mapped = client.map(served.space, chain(1))
        view = mapped.view(0)
        served.socket.close()
        with pytest.raises(Unavailable):
            client.ping()
        assert not mapped.stable()  # its leases ended with the connection
        assert len(bytes(view)) == NBYTES
        assert not Path(served.socket.path).exists()


def test_nobody_there_is_said_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="--unix"):
        LocalStore.connect(str(tmp_path / "none.local"))


def test_a_peer_that_is_no_daemon_is_refused(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "other"))
    listener.listen(1)

    def answer() -> None:
        sock, _ = listener.accept()
        sock.recv(100)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        sock.close()

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(DualPathError):
        LocalStore.connect(str(tmp_path / "other"), answer_s=1.0)
    thread.join()
    listener.close()


def test_many_threads_share_a_client(served: Served) -> None:
    hashes = chain(6)
    served.put(hashes)
    client = served.client()
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                target = bytearray(6 * NBYTES)
                assert client.read_into(served.space, hashes, target).blocks == 6
                assert target[5 * NBYTES :] == content(hashes[5])
        except BaseException as error:  # noqa: BLE001 - told by the test's own thread
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_readers_under_pressure_never_see_other_bytes(served: Served) -> None:
    """Blocks come, are demoted and expire while others read them in place."""
    stop = threading.Event()

    def churn() -> None:
        number = 1
        while not stop.is_set():
            if number <= 30:
                served.put(chain(3, 1_000_000 + 1000 * number))
            served.clock.ahead += 0.5
            number += 1

    hashes = chain(5)
    served.put(hashes)
    writer = threading.Thread(target=churn)
    writer.start()
    try:
        client = served.client()
        stable = 0
        for _ in range(150):
            try:
                mapped = client.map(served.space, hashes, lease_s=1.0)
            except (Overloaded, LeaseExpired):  # the clock runs as fast as the machine lets it
                continue
            copies = [
                (index, bytes(mapped.view(index)))
                for index in range(len(mapped))
                if mapped.offsets[index] >= 0
            ]
            if mapped.stable():
                stable += 1
                for index, copy in copies:
                    assert copy == content(hashes[index])
            with contextlib.suppress(LeaseExpired):
                mapped.release()
        assert stable
    finally:
        stop.set()
        writer.join()


def test_a_connection_is_not_shared_with_forked_children(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = served.client()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(InvalidRequest, match="after forking"):
        client.ping()
    monkeypatch.undo()
    client.ping()
