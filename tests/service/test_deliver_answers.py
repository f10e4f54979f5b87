"""Look-ups on a Deliver stream: their answers are bounded, whoever reads them or not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from dualpath.kvstore.service import deliver_calls
from dualpath.proto.v1 import common_pb2, store_pb2
from dualpath.transfer.errors import Overloaded

WAIT_S = 20.0


async def _attached(lab: Any) -> tuple[Any, Any, bytes]:
    running = await lab.daemon()
    client = await lab.client(running).attach()
    return running, client, await client.namespace()


def _look_up(namespace_id: bytes, grant_id: int) -> store_pb2.DeliverRequest:
    """One that finds nothing."""
    return store_pb2.DeliverRequest(
        grant=common_pb2.ChunkGrant(grant_id=grant_id),
        lookup=store_pb2.LookupRequest(namespace_id=namespace_id, hashes=bytes(32), hash_bytes=32),
    )


async def _requests(namespace_id: bytes, count: int) -> AsyncIterator[store_pb2.DeliverRequest]:
    for grant_id in range(1, count + 1):
        yield _look_up(namespace_id, grant_id)


@contextlib.contextmanager
def _unread(running: Any, client: Any) -> Iterator[Any]:
    """A stream that nobody reads, without the buffers of gRPC and of the kernel in between."""
    service = running.daemon._service
    attachment = service.attachments.of_peer(client.peer_id)
    stream = deliver_calls._Stream(service._delivers, attachment)
    try:
        yield stream
    finally:
        stream.end()


def test_a_stream_whose_answers_nobody_reads_ends_and_lets_them_go(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running, client, namespace_id = await _attached(lab)
        with _unread(running, client) as stream:
            most = deliver_calls.FOUND_MAX
            await stream.read(_requests(namespace_id, most))
            assert len(stream._found) == most
            stream.take(store_pb2.DeliverRequest(cancel_grant_id=[1]))  # needs no answer
            with pytest.raises(Overloaded, match=f"{most} answers to look-ups wait"):
                await stream.read(_requests(namespace_id, 1))
            assert not stream._found

    in_lab(body)


def test_long_answers_wait_to_be_read_before_more_is_looked_up(
    in_lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(lab: Any) -> None:
        running, client, namespace_id = await _attached(lab)
        one = store_pb2.Found(grant_id=1, hit=store_pb2.LookupResponse())
        monkeypatch.setattr(deliver_calls, "FOUND_BYTES_MAX", one.ByteSize())
        with _unread(running, client) as stream:
            reading = asyncio.ensure_future(stream.read(_requests(namespace_id, 3)))
            responses = stream.responses()
            for grant_id in range(1, 4):
                response = await asyncio.wait_for(anext(responses), WAIT_S)
                assert response.found.grant_id == grant_id
                assert len(stream._found) <= 1
            await asyncio.wait_for(reading, WAIT_S)
            await responses.aclose()
            monkeypatch.setattr(deliver_calls, "FOUND_S_MAX", 0.0)
            with pytest.raises(Overloaded, match="bytes of answers to look-ups wait"):
                await stream.read(_requests(namespace_id, 2))
            assert not stream._found

    in_lab(body)


def test_look_ups_in_a_row_are_all_answered_to_a_client_that_reads(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        _, client, namespace_id = await _attached(lab)
        asked = store_pb2.LookupRequest(
            namespace_id=namespace_id, hashes=bytes(32), hash_bytes=32, lease_ms=60_000
        )
        count = deliver_calls.FOUND_MAX // 2  # as many as an agent has on its way at once
        async with client.deliver() as delivery:
            window = delivery.window()
            for _ in range(3):
                for _ in range(count):
                    last = await delivery.grant([(0, 0)], window, arm=False, lookup=asked)
                while last not in delivery.found:
                    response = await asyncio.wait_for(delivery.call.read(), WAIT_S)
                    delivery.found[response.found.grant_id] = response.found
            assert len(delivery.found) == 3 * count

    in_lab(body)
