"""What operators do to a daemon that runs: invalidate, drain, probe it, follow its events."""

from __future__ import annotations

import asyncio
import contextlib
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from dualpath.kvstore.service.process import SERVICE
from dualpath.proto.status import error_of
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import InvalidRequest, Unavailable
from grpc_health.v1 import health_pb2, health_pb2_grpc

WAIT_S = 20.0
STORED = store_pb2.BLOCK_EVENT_KIND_STORED
REMOVED = store_pb2.BLOCK_EVENT_KIND_REMOVED
CLEARED = store_pb2.BLOCK_EVENT_KIND_CLEARED


async def _probe(running: Any, path: str) -> tuple[int, str]:
    def ask() -> tuple[int, str]:
        url = f"http://{running.where['metrics_listen']}{path}"
        try:
            with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(ask)


async def _health(running: Any, service: str) -> int:
    async with grpc.aio.insecure_channel(running.where["listen"]) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)
        return int(answer.status)


async def _drain(client: Any, deadline_ms: int = 10_000, **fields: bool) -> list[Any]:
    request = store_pb2.DrainRequest(deadline_ms=deadline_ms, **fields)
    return [each async for each in client.stub.Drain(request, timeout=WAIT_S)]


async def _refused(call: Any) -> Unavailable:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    error = error_of(caught.value)
    assert isinstance(error, Unavailable), error
    assert error.reason == "draining"
    return error


def test_a_drain_waits_for_what_runs_and_refuses_what_is_new(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon(metrics_listen="127.0.0.1:0")
        client = await lab.client(running).attach()
        space = await client.namespace()
        hashes = lab.chain(4)
        await client.save(space, hashes, durable=False)
        assert (await _probe(running, "/readyz"))[0] == 200
        hit = await client.lookup(space, hashes)
        reserved = await client.reserve(space, lab.chain(1, "late"))
        draining = asyncio.ensure_future(_drain(client))

        async def told() -> bool:
            return bool((await client.stats()).state == "draining")

        await lab.until(told, "the daemon says that it drains")
        assert await _probe(running, "/readyz") == (503, "draining\n")
        assert (await _probe(running, "/healthz"))[0] == 200
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        assert [await _health(running, name) for name in ("", SERVICE)] == [not_serving] * 2
        # New work is refused, what looks only is not.
        await _refused(client.lookup(space, hashes))
        assert (await client.lookup(space, hashes, lease_ms=0)).blocks == 4
        await _refused(client.reserve(space, lab.chain(1, "new")))
        await _refused(lab.client(running).attach())
        reading = client.stub.Read(store_pb2.ReadRequest(namespace_id=space, hash=hashes))
        await _refused(reading.read())
        # What runs goes on: the lease is renewed and read, the reservation is sealed.
        renew = store_pb2.RenewRequest(
            lease_id=[hit.lease_id], lease_ms=60_000, session=client.session
        )
        assert not (await client.call("Renew", renew)).expired_lease_id
        async with client.deliver() as delivery:
            granted = await delivery.grant([(0, 0)], delivery.window(), lease_id=hit.lease_id)
            assert not (await delivery.outcome(granted)).failed
        assert not draining.done()
        release = store_pb2.ReleaseRequest(lease_id=[hit.lease_id], session=client.session)
        await client.call("Release", release)
        data = lab.content(lab.chain(1, "late")[0])
        for chunk in range(lab.layout.chunk_count):
            await client.put_chunk(reserved, 0, chunk, data)
        seal = store_pb2.SealRequest(reservation_id=reserved.reservation_id, session=client.session)
        assert list((await client.call("Seal", seal)).status) == [store_pb2.SEAL_STATUS_SEALED]
        progress = await asyncio.wait_for(draining, WAIT_S)
        assert progress[0].leases == 1
        last = progress[-1]
        assert (last.state, last.done, last.flushed, last.detail) == ("drained", True, True, "")
        assert await _probe(running, "/readyz") == (503, "drained\n")
        (resumed,) = await _drain(client, resume=True)
        assert resumed.state == "serving"
        assert (await client.lookup(space, hashes)).blocks == 4
        assert await _health(running, "") == health_pb2.HealthCheckResponse.SERVING

    in_lab(body)


def test_a_lease_that_nobody_releases_does_not_hold_a_drain_beyond_its_deadline(
    in_lab: Any,
) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon()
        client = await lab.client(running).attach()
        space = await client.namespace()
        await client.save(space, lab.chain(1))
        await client.lookup(space, lab.chain(1), lease_ms=600_000)
        last = (await _drain(client, deadline_ms=200))[-1]
        assert (last.state, last.done, last.flushed) == ("draining", True, True)
        assert last.detail == "still 1 leases"
        await _refused(client.lookup(space, lab.chain(1)))

    in_lab(body)


def test_a_drain_can_end_the_process(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon()
        await _drain(lab.client(running), stop=True)
        await asyncio.wait_for(running.daemon.stop_asked.wait(), WAIT_S)

    in_lab(body)


@pytest.mark.parametrize(
    "fields", [{"deadline_ms": 0}, {"deadline_ms": 3_600_001}, {"resume": True, "stop": True}]
)
def test_a_drain_that_makes_no_sense_is_refused(in_lab: Any, fields: dict[str, Any]) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon()
        client = lab.client(running)
        call = client.stub.Drain(store_pb2.DrainRequest(**fields), timeout=WAIT_S)
        with pytest.raises(grpc.RpcError) as caught:
            await call.read()
        assert isinstance(error_of(caught.value), InvalidRequest)
        assert (await client.stats()).state == "serving"

    in_lab(body)


def test_probes_answer_while_the_store_is_still_opened(in_lab: Any, monkeypatch: Any) -> None:
    from dualpath.kvstore.block_store import BlockStore
    from dualpath.kvstore.service.process import Daemon

    seen: list[str] = []

    async def body(lab: Any) -> None:
        daemon = Daemon(lab.config(metrics_listen="127.0.0.1:0"))
        opened = BlockStore.open

        def slowly(*args: Any, **kwargs: Any) -> Any:
            verdict = daemon.readiness.ready()
            seen.append(f"{verdict.good} {verdict.text}")
            return opened(*args, **kwargs)

        monkeypatch.setattr(BlockStore, "open", slowly)
        await daemon.start()
        await daemon.stop()
        assert daemon.readiness.ready().text == "stopping"

    in_lab(body)
    assert seen == ["False starting"]


def test_a_degraded_store_is_ready_and_says_what_is_wrong(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon(metrics_listen="127.0.0.1:0")
        running.daemon.readiness.watch(lambda: {"disk_full": "no space"})
        status, text = await _probe(running, "/readyz")
        assert (status, text) == (200, "serving\ndegraded: disk_full: no space\n")
        assert 'dualpath_degraded{reason="disk_full"} 1' in (await _probe(running, "/metrics"))[1]
        assert (await lab.client(running).stats()).troubles == {"disk_full": "no space"}

    in_lab(body)


def test_a_hung_event_loop_is_not_alive() -> None:
    from dualpath.kvstore.service.readiness import BEAT_S_MAX, Phase, Readiness

    now = [0.0]
    readiness = Readiness(lambda: now[0])
    now[0] = 1000.0
    assert readiness.alive().good  # a long recovery is no hang
    readiness.enter(Phase.SERVING)
    readiness.beat()
    now[0] += BEAT_S_MAX
    assert readiness.alive().good
    now[0] += 1
    assert not readiness.alive().good


@contextlib.asynccontextmanager
async def _following(client: Any, **fields: Any) -> AsyncIterator[Any]:
    call = client.stub.Events(store_pb2.EventsRequest(**fields), metadata=client.metadata or None)
    try:
        yield call
    finally:
        call.cancel()


async def _answer(call: Any) -> Any:
    return await asyncio.wait_for(call.read(), WAIT_S)


def test_events_come_in_order_and_from_where_one_asks(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon()
        client = await lab.client(running).attach()
        space, other = await client.namespace(), await client.namespace(model="other")
        hashes = lab.chain(3)
        async with _following(client) as live:
            first = await _answer(live)
            assert (first.next_sequence, first.lost, len(first.event)) == (1, 0, 0)
            await client.save(space, hashes)
            seen: list[Any] = []
            while len(seen) < 3:
                seen += (await _answer(live)).event
            assert [event.hash for event in seen] == hashes
            assert [event.parent for event in seen] == lab.parents(hashes)
            assert [event.sequence for event in seen] == [1, 2, 3]
            assert {event.kind for event in seen} == {STORED}
            await client.save(other, lab.chain(1, "other"))
            request = store_pb2.InvalidateRequest(namespace_id=space)
            assert (await client.call("Invalidate", request)).blocks == 3
            seen = []
            while not any(event.kind == CLEARED for event in seen):
                seen += (await _answer(live)).event
            assert seen[-1].namespace_id == space
            assert seen[-1].reason == store_pb2.MISS_REASON_INVALIDATED
        async with _following(client, from_sequence=2, namespace_id=space) as past:
            answer = await _answer(past)
            assert [event.sequence for event in answer.event] == [2, 3, 5]
            assert answer.next_sequence == 6

    in_lab(body)


def test_whoever_is_too_slow_or_asks_another_run_is_told_what_is_lost(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon(events_max=16)
        client = await lab.client(running).attach()
        space = await client.namespace()
        for index in range(10):
            await client.save(space, lab.chain(4, str(index)), durable=False)
        async with _following(client, from_sequence=1) as call:
            answer = await _answer(call)
            assert answer.lost == 40 - 16
            assert [event.sequence for event in answer.event] == list(range(25, 41))
            assert answer.server_id
        async with _following(client, from_sequence=30, server_id="another") as call:
            answer = await _answer(call)
            assert (answer.lost, answer.next_sequence, len(answer.event)) == (40, 41, 0)
        async with _following(client, from_sequence=100) as call:
            answer = await _answer(call)
            assert (answer.lost, answer.next_sequence) == (59, 41)

    in_lab(body)


def test_a_consumer_that_does_not_read_slows_nobody(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon(events_max=64)
        client = await lab.client(running).attach()
        space = await client.namespace()
        async with _following(client, from_sequence=1) as lazy:
            for index in range(60):
                await client.save(space, lab.chain(4, str(index)), durable=False)
            seen, lost = 0, 0
            async with asyncio.timeout(WAIT_S):
                while seen + lost < 240:
                    answer = await lazy.read()
                    seen, lost = seen + len(answer.event), lost + answer.lost
            assert seen + lost == 240

    in_lab(body)


def test_a_stopping_daemon_ends_the_streams_of_events(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon()
        async with _following(lab.client(running)) as call:
            await _answer(call)
            stopping = asyncio.ensure_future(running.daemon.stop())
            with pytest.raises(grpc.RpcError) as caught:
                await _answer(call)
            assert isinstance(error_of(caught.value), Unavailable)
            await stopping

    in_lab(body)


def test_invalidate_answers_over_grpc(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon()
        client = await lab.client(running).attach()
        space = await client.namespace()
        hashes = lab.chain(5)
        await client.save(space, hashes)
        await client.lookup(space, hashes[:3])
        request = store_pb2.InvalidateRequest(namespace_id=space, hash=hashes[1], dry_run=True)
        counted = await client.call("Invalidate", request)
        assert (counted.blocks, counted.leased_blocks) == (4, 2)
        assert counted.bytes == 4 * lab.layout.block_bytes
        request.dry_run = False
        assert await client.call("Invalidate", request) == counted
        hit = await client.lookup(space, hashes)
        assert (hit.blocks, hit.miss) == (1, store_pb2.MISS_REASON_INVALIDATED)
        with pytest.raises(grpc.RpcError, match="never leaves"):
            await client.call("Invalidate", store_pb2.InvalidateRequest())

    in_lab(body)
