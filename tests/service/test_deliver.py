"""The Deliver stream: grants fail alone and say why, streams end cleanly, stalls are local."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import grpc
import pytest
from dualpath.kvstore.layout import KVLayout
from dualpath.proto.status import error_of
from dualpath.proto.v1 import common_pb2, store_pb2
from dualpath.transfer.lane import Lane
from dualpath.transfer.region import RegionDescriptor
from dualpath.transfer.stream_handshake import introduce
from grpc_health.v1 import health_pb2, health_pb2_grpc

WAIT_S = 20.0


async def _filled(lab: Any, blocks: int = 2, **changes: Any) -> tuple[Any, Any, bytes, list[bytes]]:
    running = await lab.daemon(**changes)
    client = await lab.client(running).attach()
    namespace_id = await client.namespace()
    hashes = lab.chain(blocks)
    await client.save(namespace_id, hashes)
    return running, client, namespace_id, hashes


def _set(path: str, value: Any) -> Any:
    def change(message: Any) -> None:
        *parents, last = path.split(".")
        for name in parents:
            message = getattr(message, name)
        if isinstance(value, list):
            del getattr(message, last)[:]
            getattr(message, last).extend(value)
        else:
            setattr(message, last, value)

    return change


def test_a_wrong_grant_fails_alone_and_says_why(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        _, client, namespace_id, hashes = await _filled(lab)
        hit = await client.lookup(namespace_id, hashes)
        wrong = [
            (_set("block", [7]), "block"),
            (_set("chunk", [9]), "chunk"),
            (_set("window", b"no window"), "36 bytes"),
            (_set("lane", 9), "lane 9"),
            (_set("deadline_ms", 0), "deadline_ms 0"),
            (_set("target.base_bytes", [1 << 40]), "outside of the window"),
            (_set("target.nbytes", [5]), "5"),
            (_set("target.nbytes", [2 << 20]), str(2 << 20)),
            (_set("target.skip_bytes", []), "lengths differ"),
            (_set("tag", [1, 2]), "lengths differ"),
            (_set("target.length_bytes", 0), "0"),
        ]
        async with client.deliver() as delivery:
            window = delivery.window()
            for change, said in wrong:
                grant = await delivery.grant(
                    [(0, 0)], window, lease_id=hit.lease_id, arm=False, change=change
                )
                outcome = await delivery.outcome(grant)
                invalid = common_pb2.CHUNK_FAILURE_INVALID
                assert set(outcome.failed.values()) == {invalid}, said
                assert said in outcome.detail, (said, outcome.detail)
            unarmed = await delivery.grant([(0, 0)], window, lease_id=hit.lease_id, arm=False)
            outcome = await delivery.outcome(unarmed)
            assert set(outcome.failed.values()) == {common_pb2.CHUNK_FAILURE_REFUSED}
            unknown = await delivery.grant([(0, 0)], window, lease_id=1)
            outcome = await delivery.outcome(unknown)
            assert set(outcome.failed.values()) == {common_pb2.CHUNK_FAILURE_LEASE_EXPIRED}
            right = await delivery.grant([(0, 1), (1, 2)], window, lease_id=hit.lease_id)
            assert not (await delivery.outcome(right)).failed

    in_lab(body)


def test_a_revoked_window_refuses_what_was_granted_into_it(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        _, client, namespace_id, hashes = await _filled(lab)
        hit = await client.lookup(namespace_id, hashes)
        async with client.deliver() as delivery:
            window = delivery.window()
            client.region.view[:8] = b"untouched"[:8]
            change = _set("lane", int(Lane.LOAD_PREFILL))

            def revoke(message: Any) -> None:
                change(message)
                client.transport.revoke(window)

            grant = await delivery.grant([(0, 0)], window, lease_id=hit.lease_id, change=revoke)
            outcome = await delivery.outcome(grant)
            assert set(outcome.failed.values()) == {common_pb2.CHUNK_FAILURE_REFUSED}
            assert bytes(client.region.view[:8]) == b"untouche"

    in_lab(body)


@pytest.mark.parametrize(
    ("messages", "code", "said"),
    [
        ([store_pb2.DeliverRequest()], grpc.StatusCode.INVALID_ARGUMENT, "session: 0 bytes"),
        (
            [store_pb2.DeliverRequest(session=b"s" * 16)],
            grpc.StatusCode.PERMISSION_DENIED,
            "attach again",
        ),
    ],
)
def test_a_stream_without_a_session_ends_at_once(
    in_lab: Any, messages: list[Any], code: grpc.StatusCode, said: str
) -> None:
    async def body(lab: Any) -> None:
        client = lab.client(await lab.daemon())
        call = client.stub.Deliver(iter(messages), timeout=WAIT_S)
        with pytest.raises(grpc.RpcError, match=said) as caught:
            await call.read()
        assert caught.value.code() is code

    in_lab(body)


def test_a_look_up_that_comes_with_a_grant_brings_what_it_finds_and_nothing_else(
    in_lab: Any,
) -> None:
    async def body(lab: Any) -> None:
        _, client, namespace_id, hashes = await _filled(lab)
        asked = store_pb2.LookupRequest(
            namespace_id=namespace_id,
            hashes=b"".join(hashes) + bytes(32),
            hash_bytes=32,
            lease_ms=60_000,
        )
        async with client.deliver() as delivery:
            window = delivery.window()
            pairs = [(block, chunk) for chunk in range(2) for block in range(3)]
            grant = await delivery.grant(pairs, window, lookup=asked)
            outcome = await delivery.outcome(grant)
            assert not outcome.failed
            hit = delivery.found[grant].hit
            assert (hit.blocks, hit.miss) == (2, store_pb2.MISS_REASON_ABSENT)
            assert {(tag >> 6) & 3 for tag in delivery.landed} == {0, 1}
            assert len(delivery.landed) == 4
            # The lease is the attachment's, as any other.
            again = await delivery.grant([(1, 2)], window, lease_id=hit.lease_id)
            assert not (await delivery.outcome(again)).failed
            # Only what is wrong with the grant itself is told as its failure.
            wrong = await delivery.grant([(0, 0)], window, lookup=asked, change=_set("chunk", [9]))
            outcome = await delivery.outcome(wrong)
            assert set(outcome.failed.values()) == {common_pb2.CHUNK_FAILURE_INVALID}
            assert delivery.found[wrong].hit.blocks == 2

    in_lab(body)


def test_a_look_up_that_is_refused_or_finds_nothing_delivers_nothing(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        _, client, namespace_id, hashes = await _filled(lab)
        asked = store_pb2.LookupRequest(
            namespace_id=namespace_id, hashes=bytes(32), hash_bytes=32, lease_ms=60_000
        )
        unknown = store_pb2.LookupRequest(
            namespace_id=b"?" * 16, hashes=hashes[0], hash_bytes=32, lease_ms=60_000
        )
        wrong = store_pb2.LookupRequest(namespace_id=namespace_id, hashes=b"short", hash_bytes=32)
        hit = await client.lookup(namespace_id, hashes)
        async with client.deliver() as delivery:
            window = delivery.window()
            nothing = await delivery.grant([(0, 0)], window, lookup=asked)
            foreign = await delivery.grant([(0, 1)], window, lookup=unknown)
            refused = await delivery.grant([(0, 2)], window, lookup=wrong)
            last = await delivery.grant([(1, 0)], window, lease_id=hit.lease_id)
            assert not (await delivery.outcome(last)).failed
            assert list(delivery.found) == [nothing, foreign, refused]
            assert delivery.found[nothing].hit.blocks == 0
            assert not delivery.found[refused].HasField("hit")
            assert len(delivery.landed) == 1

    in_lab(body)


def test_a_look_up_without_a_grant_ends_its_stream(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        _, client, *_ = await _filled(lab)
        async with client.deliver() as delivery:
            await delivery.call.write(
                store_pb2.DeliverRequest(lookup=store_pb2.LookupRequest(hash_bytes=32))
            )
            with pytest.raises(grpc.RpcError, match="lookup: it needs a grant") as caught:
                await delivery.call.read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    in_lab(body)


def test_a_new_stream_of_an_attachment_replaces_the_old_one(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        _, client, namespace_id, hashes = await _filled(lab)
        hit = await client.lookup(namespace_id, hashes)
        async with client.deliver() as old, client.deliver() as new:
            with pytest.raises(grpc.RpcError) as caught:
                await asyncio.wait_for(old.call.read(), WAIT_S)
            assert error_of(caught.value).reason == "replaced"
            grant = await new.grant([(0, 0)], new.window(), lease_id=hit.lease_id)
            assert not (await new.outcome(grant)).failed

    in_lab(body)


def test_a_half_closed_stream_ends_when_its_grants_are_done(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        _, client, namespace_id, hashes = await _filled(lab)
        hit = await client.lookup(namespace_id, hashes)
        async with client.deliver() as delivery:
            grant = await delivery.grant(
                [(0, 0), (0, 1), (1, 1)], delivery.window(), lease_id=hit.lease_id
            )
            await delivery.call.done_writing()
            assert not (await delivery.outcome(grant)).failed
            ended = await asyncio.wait_for(delivery.call.read(), WAIT_S)
            assert ended is grpc.aio.EOF
            assert await delivery.call.code() is grpc.StatusCode.OK

    in_lab(body)


def test_a_stream_ends_as_unavailable_with_its_data_connection(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        _, client, _, _ = await _filled(lab)
        async with client.deliver() as delivery:
            await asyncio.to_thread(client.transport.close)
            with pytest.raises(grpc.RpcError) as caught:
                await asyncio.wait_for(delivery.call.read(), WAIT_S)
            assert error_of(caught.value).reason == "peer_lost"

    in_lab(body)


def test_an_id_used_twice_ends_the_stream(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        _, client, namespace_id, hashes = await _filled(lab)
        hit = await client.lookup(namespace_id, hashes)
        async with client.deliver() as delivery:
            window = RegionDescriptor(1, 1, 0, 1 << 30)
            # All at once, so that the first is still open when the second comes.
            for _ in range(2):
                await delivery.grant(
                    [(0, 0)] * 500,
                    window,
                    lease_id=hit.lease_id,
                    arm=False,
                    change=_set("grant_id", 77),
                )
            with pytest.raises(grpc.RpcError, match="grant_id 77") as caught:
                await delivery.outcome(-1)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    in_lab(body)


def test_a_grant_of_far_too_many_chunks_ends_the_stream(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        _, client, namespace_id, hashes = await _filled(lab)
        hit = await client.lookup(namespace_id, hashes)
        async with client.deliver() as delivery:
            window, many = RegionDescriptor(1, 1, 0, 1 << 30), _set("tag", [1] * 3_000_000)
            await delivery.grant([(0, 0)], window, lease_id=hit.lease_id, arm=False, change=many)
            with pytest.raises(grpc.RpcError, match="3000000 chunks") as caught:
                await delivery.outcome(-1)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    in_lab(body)


def test_what_was_granted_before_a_stop_still_lands(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running, client, namespace_id, hashes = await _filled(
            lab, blocks=6, send_limit_bytes_per_s=6e6, drain_s=20.0
        )
        hit = await client.lookup(namespace_id, hashes)
        async with client.deliver() as delivery:
            window = delivery.window()
            chunks = [(b, c) for b in range(6) for c in range(lab.layout.chunk_count)]
            grant = await delivery.grant(chunks, window, lease_id=hit.lease_id)
            while not delivery.landed:
                await asyncio.sleep(0.001)
            stopping = asyncio.create_task(running.daemon.stop())
            health: Any = health_pb2_grpc.HealthStub(client.channel)
            serving = health_pb2.HealthCheckResponse.SERVING
            while (await health.Check(health_pb2.HealthCheckRequest())).status == serving:
                await asyncio.sleep(0.001)
            late = await delivery.grant([(0, 0)], window, lease_id=hit.lease_id, arm=False)
            outcome = await delivery.outcome(grant, late)
            assert list(outcome.failed.values()) == [common_pb2.CHUNK_FAILURE_OVERLOADED]
            assert "stopping" in outcome.detail
            for index, block_hash in enumerate(hashes):
                assert delivery.block(index) == lab.content(block_hash)
            with pytest.raises(grpc.RpcError) as caught:
                await asyncio.wait_for(delivery.call.read(), WAIT_S)
            assert error_of(caught.value).reason == "draining"
            await stopping

    in_lab(body)


def _dialled_but_not_read(client: Any, running: Any) -> socket.socket:
    """A data connection whose receiver never reads: its buffers fill and stay full."""
    host, port = client.attached.address.rsplit(":", 1)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((host, int(port)))
    introduce(sock, "stalled", "daemon", client.attached.invitation, time.monotonic() + WAIT_S)
    return sock


def test_a_client_that_reads_neither_stream_nor_connection_delays_nobody(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        layout = KVLayout(layers=4, block_tokens=16, layer_bytes=1 << 20, dtype="bf16")
        running = await lab.daemon(
            inflight_bytes=16 << 20, attachment_inflight_bytes=4 << 20, readers=2
        )
        other = await lab.client(running).attach()
        namespace_id = await other.namespace(layout)
        hashes = lab.chain(4)
        await other.save(namespace_id, hashes, layout=layout)
        stalled = await lab.client(running).attach(connect=False)
        sock = _dialled_but_not_read(stalled, running)
        try:
            hit = await stalled.lookup(namespace_id, hashes)
            chunks = [(b, c) for b in range(4) for c in range(layout.chunk_count)]
            async with stalled.deliver() as dead:
                window = RegionDescriptor(1, 1, 0, 1 << 30)
                for _ in range(200):
                    await dead.grant(
                        chunks,
                        window,
                        lease_id=hit.lease_id,
                        arm=False,
                        deadline_ms=60_000,
                        layout=layout,
                    )
                own = await other.lookup(namespace_id, hashes)
                async with other.deliver() as delivery:
                    into = delivery.window()
                    for _ in range(5):
                        grant = await delivery.grant(
                            chunks, into, lease_id=own.lease_id, layout=layout
                        )
                        outcome = await delivery.outcome(grant)
                        assert not outcome.failed
                for index, block_hash in enumerate(hashes):
                    assert delivery.block(index, layout) == lab.content(block_hash, layout)
                stats = await other.call("Stats", store_pb2.StatsRequest())
                assert stats.queue_bytes > 1 << 30  # the stalled one's, still waiting
        finally:
            sock.close()
        async with asyncio.timeout(WAIT_S):
            while (await other.call("Stats", store_pb2.StatsRequest())).queue_bytes:
                await asyncio.sleep(0.01)

    in_lab(body)


def test_an_invitation_that_nobody_uses_leaves_nothing_behind(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon()
        await lab.client(running).attach(connect=False)
        service = running.daemon._service
        attachments = service.attachments
        assert len(attachments) == 1
        attachments.reap(time.monotonic() + 1)
        assert len(attachments) == 1
        attachments.reap(time.monotonic() + 60)
        assert len(attachments) == 0

    in_lab(body)


def test_a_cancelled_grant_stops_and_a_late_one_expires(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        # One reader and one chunk in flight to a receiver that does not read: the rest waits.
        layout = KVLayout(layers=4, block_tokens=16, layer_bytes=1 << 20, dtype="bf16")
        running = await lab.daemon(inflight_bytes=16 << 20, attachment_inflight_bytes=1 << 20)
        writer = await lab.client(running).attach()
        namespace_id = await writer.namespace(layout)
        hashes = lab.chain(2)
        await writer.save(namespace_id, hashes, layout=layout)
        stalled = await lab.client(running).attach(connect=False)
        sock = _dialled_but_not_read(stalled, running)
        try:
            hit = await stalled.lookup(namespace_id, hashes)
            chunks = [(b, c) for b in range(2) for c in range(layout.chunk_count)]
            async with stalled.deliver() as delivery:
                window = RegionDescriptor(1, 1, 0, 1 << 30)

                async def grant(deadline_ms: int) -> int:
                    return int(
                        await delivery.grant(
                            chunks * 4,
                            window,
                            lease_id=hit.lease_id,
                            arm=False,
                            deadline_ms=deadline_ms,
                            layout=layout,
                        )
                    )

                first, late = await grant(60_000), await grant(50)
                failed: list[int] = []
                async with asyncio.timeout(WAIT_S):
                    while common_pb2.CHUNK_FAILURE_DEADLINE not in failed:
                        response = await delivery.call.read()
                        for progress in response.progress:
                            assert progress.grant_id == late
                            failed.extend(progress.failure)
                    await delivery.cancel(first)
                    while common_pb2.CHUNK_FAILURE_CANCELLED not in failed:
                        response = await delivery.call.read()
                        for progress in response.progress:
                            failed.extend(progress.failure)
        finally:
            sock.close()

    in_lab(body)
