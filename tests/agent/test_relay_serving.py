"""Held chunks go by turns, within a bound, and only for grants that say what they are."""

from __future__ import annotations

from typing import cast

import pytest
from dualpath.agent.daemon_link import DaemonLink
from dualpath.agent.known_chunks import names_of
from dualpath.agent.relay_job import RelayChunk, RelayGrant, Requester, Source, Stage
from dualpath.agent.relay_serving import SERVING_BYTES_MAX, RelayServing
from dualpath.proto.v1 import agent_pb2, common_pb2
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import RegionDescriptor
from dualpath.transfer.slices import Slices

CHUNK = 1 << 20
NAMESPACE, HASH = b"n" * 16, b"h" * 32


def requester(name: str, chunks: int) -> Requester:
    made = Requester(name, name)
    window = RegionDescriptor(1, 1, 0, CHUNK)
    source = Source(cast(DaemonLink, None))
    grant = RelayGrant(1, made, source, window, Lane.LOAD_PREFILL, 1e9, lambda _: None, chunks)
    for index in range(chunks):
        made.held_queue.append(RelayChunk(grant, 0, index, index, Slices.contiguous(0, CHUNK)))
    return made


def test_a_greedy_requester_does_not_slow_a_modest_one() -> None:
    serving = RelayServing()
    greedy, modest = requester("greedy", 100), requester("modest", 4)
    serving.add(greedy)
    serving.add(modest)
    serving.add(greedy)
    served = []
    for _ in range(8):
        chunk = serving.next()
        assert chunk is not None
        assert chunk.stage is Stage.FORWARDING
        served.append(chunk.grant.requester.name)
    assert served == ["greedy", "modest"] * 4


def test_what_is_in_flight_is_bounded_and_a_newcomer_still_gets_its_share() -> None:
    serving = RelayServing()
    greedy, late = requester("greedy", 100), requester("late", 100)
    serving.add(greedy)
    taken = []
    while (chunk := serving.next()) is not None:
        taken.append(chunk)
    assert greedy.serving_bytes <= SERVING_BYTES_MAX // 2
    serving.add(late)
    assert serving.next() is not None
    assert late.serving_bytes == CHUNK
    for chunk in taken:
        serving.ended(chunk)
    assert greedy.serving_bytes == 0
    assert serving.next() is not None


def grant(count: int) -> common_pb2.ChunkGrant:
    return common_pb2.ChunkGrant(block=[3] * count, chunk=range(count), tag=range(count))


def test_a_grant_says_what_its_chunks_are_or_nothing() -> None:
    known = agent_pb2.KnownChunks(namespace_id=NAMESPACE, block=[3], hash=[HASH], checksum=[7, 8])
    assert names_of(grant(2), known) == [(NAMESPACE, HASH, 0, 7), (NAMESPACE, HASH, 1, 8)]
    assert names_of(grant(2), None) is None


@pytest.mark.parametrize(
    ("known", "match"),
    [
        ({"namespace_id": b"?"}, "namespace id"),
        ({"hash": [b"?"]}, "16..32"),
        ({"hash": []}, "0 hashes"),
        ({"checksum": [1]}, "1 checksums"),
        ({"block": [4]}, "block 3 is granted"),
        ({"request": "x" * 129}, "128 characters"),
    ],
)
def test_a_grant_that_says_it_wrongly_is_refused(known: dict[str, object], match: str) -> None:
    fields = {
        "namespace_id": NAMESPACE,
        "block": [3],
        "hash": [HASH],
        "checksum": [7, 8],
        **known,
    }
    with pytest.raises(InvalidRequest, match=match):
        names_of(grant(2), agent_pb2.KnownChunks(**fields))  # type: ignore[arg-type]
