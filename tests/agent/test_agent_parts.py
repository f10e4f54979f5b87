"""Small parts of the agent: hand-over between threads, places, tables, handles, placement."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path

import pytest
from dualpath.agent.loader import daemon_for
from dualpath.agent.mailbox import Mailbox
from dualpath.agent.outcome import MissReason, SaveResult
from dualpath.agent.places import Places
from dualpath.agent.regions import Regions
from dualpath.agent.slice_table import slices_of, table_of
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.service.histogram import BOUNDS_S, Histogram
from dualpath.kvstore.service.named_counts import NAMES_MAX, OTHER, NamedCounts, bounded
from dualpath.kvstore.store_api import ReserveStatus, SealStatus
from dualpath.proto.v1 import common_pb2
from dualpath.transfer.errors import InvalidRequest, Unavailable
from dualpath.transfer.region import Region
from dualpath.transfer.slices import Slices
from dualpath.transfer.unix_path import claim
from hypothesis import given
from hypothesis import strategies as st

LAYOUT = KVLayout(layers=4, block_tokens=16, layer_bytes=100_000, dtype="bf16")
WAIT_S = 20.0


def test_a_mailbox_hands_over_everything_once_in_order_and_in_batches() -> None:
    count, threads = 2000, 4

    async def body() -> tuple[list[list[int]], int]:
        seen: list[list[int]] = [[] for _ in range(threads)]
        calls = 0
        done = asyncio.Event()

        def handle(items: list[tuple[int, int]]) -> None:
            nonlocal calls
            calls += 1
            for thread, number in items:
                seen[thread].append(number)
            if sum(map(len, seen)) == count * threads:
                done.set()

        mailbox = Mailbox(asyncio.get_running_loop(), handle)

        def produce(thread: int) -> None:
            for number in range(count):
                mailbox.put((thread, number))

        workers = [threading.Thread(target=produce, args=(n,)) for n in range(threads)]
        for worker in workers:
            worker.start()
        await asyncio.wait_for(done.wait(), WAIT_S)
        for worker in workers:
            worker.join(WAIT_S)
        return seen, calls

    seen, calls = asyncio.run(body())
    assert seen == [list(range(count))] * threads
    assert calls < count * threads


def test_putting_into_a_mailbox_of_a_closed_loop_is_harmless() -> None:
    loop = asyncio.new_event_loop()
    mailbox: Mailbox[int] = Mailbox(loop, lambda items: None)
    loop.close()
    mailbox.put(1)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=20, unique=True))
def test_paged_places_name_each_layer_of_each_page(pages: list[int]) -> None:
    places = Places.paged(LAYOUT, tuple(pages), 41)
    places.check(LAYOUT, len(pages), LAYOUT.block_bytes * 41)
    for block, page in enumerate(pages):
        pieces = list(places.block(LAYOUT, block).pieces())
        assert pieces == [
            ((layer * 41 + page) * LAYOUT.layer_bytes, LAYOUT.layer_bytes)
            for layer in range(LAYOUT.layers)
        ]
    start, end = places.span(LAYOUT, len(pages))
    assert start == min(pages) * LAYOUT.layer_bytes
    assert end == (3 * 41 + max(pages) + 1) * LAYOUT.layer_bytes


def test_slices_survive_the_protocol_and_malformed_grants_are_refused() -> None:
    whole = Places.contiguous(LAYOUT, 3).block(LAYOUT, 1)
    targets = [whole.part(0, 1000), whole.part(1000, 5), whole.part(399_999, 1)]
    grant = common_pb2.ChunkGrant(
        block=[1, 1, 1], chunk=[0, 1, 2], tag=[7, 8, 9], target=table_of(targets)
    )
    assert slices_of(grant) == targets
    del grant.tag[2:]
    with pytest.raises(InvalidRequest, match="equal length"):
        slices_of(grant)
    bad = common_pb2.ChunkGrant(block=[0], chunk=[0], tag=[1])
    bad.target.CopyFrom(table_of([Slices.contiguous(0, 10)]))
    bad.target.nbytes[0] = 11
    with pytest.raises(InvalidRequest, match="10 bytes"):
        slices_of(bad)


def test_a_region_goes_only_after_its_users_were_told_and_its_pins_are_gone() -> None:
    regions = Regions()
    entry = regions.add(Region.memfd("test", 4096), behind_compute_link=False, owned=True)
    assert regions.get(entry.handle) is entry
    told = []
    entry.on_gone[object()] = lambda: told.append(bytes(entry.region.view[:1]))
    entry.pins = 1
    regions.drop(entry.handle)
    regions.drop(entry.handle)
    assert told == [b"\0"]
    assert entry.region.view[0] == 0
    regions.unpin(entry)
    with pytest.raises(ValueError, match="released"):
        entry.region.view[0]
    with pytest.raises(InvalidRequest, match="unknown region handle"):
        regions.get(entry.handle)


def test_handles_are_not_guessable_one_from_another() -> None:
    regions = Regions()
    handles = {
        regions.add(Region.of(bytearray(1)), behind_compute_link=False, owned=False).handle
        for _ in range(100)
    }
    assert len(handles) == 100
    assert max(handles) - min(handles) > 1 << 60


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32))
def test_losing_a_daemon_moves_only_its_own_chains(namespace: bytes, first: bytes) -> None:
    daemons = tuple(f"10.0.0.{n}:7070" for n in range(5))
    chosen = daemon_for(namespace, first, daemons)
    assert chosen == daemon_for(namespace, first, tuple(reversed(daemons)))
    for gone in daemons:
        if gone != chosen:
            rest = tuple(address for address in daemons if address != gone)
            assert daemon_for(namespace, first, rest) == chosen


def test_without_daemons_a_request_says_what_to_configure() -> None:
    with pytest.raises(InvalidRequest, match="no daemon is configured"):
        daemon_for(b"", b"", ())


def test_miss_reasons_survive_the_protocol_and_unknown_ones_are_unavailable() -> None:
    for reason in MissReason:
        assert MissReason.of_proto(reason.proto) is reason
    assert MissReason.of_proto(99) is MissReason.UNAVAILABLE


def test_a_save_counts_the_leading_run_that_is_present() -> None:
    exists, reserved = ReserveStatus.EXISTS, ReserveStatus.RESERVED
    sealed, failed = SealStatus.SEALED, SealStatus.FAILED
    result = SaveResult((exists, reserved, reserved, exists), (None, sealed, failed, None))
    assert (result.present_blocks, result.sealed_blocks) == (2, 1)


def test_a_histogram_is_cumulative() -> None:
    histogram = Histogram()
    for value in (0.0005, 0.3, 1000.0):
        histogram.observe(value)
    buckets, total = histogram.snapshot()
    assert buckets[0] == (str(BOUNDS_S[0]), 1.0)
    assert buckets[-1] == ("+Inf", 3.0)
    assert total == pytest.approx(1000.3005)
    twice, total = Histogram.merged([histogram, histogram]).snapshot()
    assert [count for _, count in twice] == [2 * count for _, count in buckets]
    assert total == pytest.approx(2001 - 0.399)


def test_names_beyond_the_limit_count_together() -> None:
    counts = NamedCounts()
    for index in range(NAMES_MAX + 10):
        counts.add(f"peer-{index}", 1)
    counts.add("peer-0", 5)
    counts.add(f"peer-{NAMES_MAX}", 5)
    shown = counts.snapshot()
    assert len(shown) == NAMES_MAX + 1
    assert (shown["peer-0"], shown[OTHER]) == (6, 15)
    many = {f"peer-{index}": 1 for index in range(NAMES_MAX + 10)}
    assert bounded(many)[OTHER] == 10
    assert sum(bounded(many).values()) == len(many)


def test_a_socket_path_is_taken_over_from_the_dead_but_not_from_the_living(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(path)
        living.listen()
        with pytest.raises(Unavailable, match="in use"):
            claim(path)
    claim(path)
    assert not Path(path).exists()
    Path(path).write_text("mine")
    with pytest.raises(InvalidRequest, match="no socket"):
        claim(path)
    with pytest.raises(InvalidRequest, match="longer"):
        claim(str(tmp_path / ("x" * 200)))
