"""Save and load through a daemon: control over gRPC, bytes over the data plane."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import grpc
import pytest
from dualpath.kvstore.fd_file import FdFile
from dualpath.kvstore.layout import KVLayout
from dualpath.proto.status import error_of
from dualpath.proto.v1 import common_pb2, store_pb2
from dualpath.transfer.region import RegionDescriptor
from dualpath.transfer.transport import WriteStatus

Body = Any


def _all_chunks(blocks: int, lab: Any) -> list[tuple[int, int]]:
    return [(block, chunk) for block in range(blocks) for chunk in range(lab.layout.chunk_count)]


async def _loaded(client: Any, lab: Any, namespace_id: bytes, hashes: list[bytes]) -> None:
    """Load a chain and compare every byte with its key's content."""
    hit = await client.lookup(namespace_id, hashes)
    assert hit.blocks == len(hashes)
    assert hit.miss == store_pb2.MISS_REASON_NONE
    assert len(hit.checksums) // 8 == len(hashes) * lab.layout.chunk_count
    assert len(hit.tiers) == len(hashes)
    async with client.deliver() as delivery:
        assert delivery.peer_id == client.peer_id
        window = delivery.window()
        grant = await delivery.grant(_all_chunks(len(hashes), lab), window, lease_id=hit.lease_id)
        outcome = await delivery.outcome(grant)
        assert not outcome.failed, outcome
        assert len(outcome.landed) == len(hashes) * lab.layout.chunk_count
        for index, block_hash in enumerate(hashes):
            assert delivery.block(index) == lab.content(block_hash)
    await client.call(
        "Release", store_pb2.ReleaseRequest(lease_id=[hit.lease_id], session=client.session)
    )


@pytest.mark.parametrize("plane", ["tcp", "shm"])
@pytest.mark.parametrize("durable", [True, False])
def test_what_was_saved_is_loaded_byte_for_byte(
    in_lab: Any, tmp_path: Any, plane: str, durable: bool
) -> None:
    async def body(lab: Any) -> None:
        unix = str(tmp_path / "d.sock") if plane == "shm" else ""
        running = await lab.daemon(unix=unix)
        target = f"unix:{unix}" if unix else running.where["listen"]
        client = await lab.client(target).attach("shm", "tcp")
        assert client.attached.transport == plane
        namespace_id = await client.namespace()
        hashes = lab.chain(6)
        statuses = await client.save(namespace_id, hashes, durable=durable)
        assert statuses == [store_pb2.SEAL_STATUS_SEALED] * 6
        await _loaded(client, lab, namespace_id, hashes)
        stats = await client.call("Stats", store_pb2.StatsRequest())
        assert stats.blocks == 6
        assert stats.delivered_bytes == 6 * lab.layout.block_bytes
        assert stats.attachments == 1
        assert stats.leases == 0

    in_lab(body)


def test_blocks_survive_a_restart_of_the_daemon(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        config = lab.config()
        running = await lab.daemon(config)
        client = await lab.client(running).attach()
        namespace_id = await client.namespace()
        hashes = lab.chain(4)
        await client.save(namespace_id, hashes)
        await running.daemon.stop()
        running = await lab.daemon(config)
        client = await lab.client(running).attach()
        assert await client.namespace() == namespace_id
        await _loaded(client, lab, namespace_id, hashes)

    in_lab(body)


def test_shared_memory_is_only_for_callers_over_the_unix_socket(in_lab: Any, tmp_path: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon(unix=str(tmp_path / "d.sock"))
        client = await lab.client(running).attach("shm", "tcp")
        assert client.attached.transport == "tcp"
        with pytest.raises(grpc.RpcError) as caught:
            await lab.client(running).attach("shm")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "Unix socket" in str(caught.value.details())

    in_lab(body)


def test_the_unix_socket_admits_only_its_user(in_lab: Any, tmp_path: Any) -> None:
    async def body(lab: Any) -> None:
        path = tmp_path / "d.sock"
        await lab.daemon(unix=str(path))
        assert path.stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "d.sock.data").stat().st_mode & 0o777 == 0o600

    in_lab(body)


def test_a_relay_reads_under_a_ticket_and_others_do_not(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon()
        owner = await lab.client(running).attach()
        relay = await lab.client(running).attach()
        thief = await lab.client(running).attach()
        namespace_id = await owner.namespace()
        hashes = lab.chain(2)
        await owner.save(namespace_id, hashes)
        hit = await owner.lookup(namespace_id, hashes)

        async def delegate(ttl_ms: int) -> bytes:
            answer = await owner.call(
                "Delegate",
                store_pb2.DelegateRequest(
                    lease_id=hit.lease_id,
                    peer_id=[relay.peer_id],
                    ttl_ms=ttl_ms,
                    session=owner.session,
                ),
            )
            return bytes(answer.ticket[0])

        ticket, brief = await delegate(60_000), await delegate(10_000)
        forged = ticket[:-1] + bytes([ticket[-1] ^ 1])
        denied = common_pb2.CHUNK_FAILURE_DENIED
        async with relay.deliver() as delivery:
            window = delivery.window()
            good = await delivery.grant([(1, 0)], window, ticket=ticket)
            assert not (await delivery.outcome(good)).failed
            running.clock.advance(20)
            for bad, said in ((forged, "forged"), (brief, "expired"), (b"x", "forged")):
                grant = await delivery.grant([(0, 1)], window, ticket=bad)
                outcome = await delivery.outcome(grant)
                assert list(outcome.failed.values()) == [denied]
                assert said in outcome.detail
            other = await delivery.grant([(0, 1)], window, lease_id=hit.lease_id)
            outcome = await delivery.outcome(other)
            assert list(outcome.failed.values()) == [denied]
        async with thief.deliver() as delivery:
            grant = await delivery.grant([(0, 0)], delivery.window(), ticket=ticket)
            outcome = await delivery.outcome(grant)
            assert list(outcome.failed.values()) == [denied]
            assert relay.peer_id in outcome.detail
        with pytest.raises(grpc.RpcError) as caught:
            await thief.call(
                "Delegate",
                store_pb2.DelegateRequest(
                    lease_id=hit.lease_id,
                    peer_id=[thief.peer_id],
                    ttl_ms=1000,
                    session=thief.session,
                ),
            )
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED

    in_lab(body)


def test_a_lease_ends_by_time_by_release_and_with_its_attachment(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon()
        client = await lab.client(running).attach()
        namespace_id = await client.namespace()
        hashes = lab.chain(2)
        await client.save(namespace_id, hashes)
        brief = await client.lookup(namespace_id, hashes, lease_ms=10_000)
        kept = await client.lookup(namespace_id, hashes)
        running.clock.advance(20)
        async with client.deliver() as delivery:
            window = delivery.window()
            grant = await delivery.grant([(0, 0)], window, lease_id=brief.lease_id)
            outcome = await delivery.outcome(grant)
            assert set(outcome.failed.values()) == {common_pb2.CHUNK_FAILURE_LEASE_EXPIRED}
            renewed = await client.call(
                "Renew",
                store_pb2.RenewRequest(
                    lease_id=[brief.lease_id, kept.lease_id],
                    lease_ms=60_000,
                    session=client.session,
                ),
            )
            assert list(renewed.expired_lease_id) == [brief.lease_id]
        await asyncio.to_thread(client.transport.close)
        other = await lab.client(running).attach()

        async def left() -> bool:
            stats = await other.stats()
            return bool(stats.leases == 0 and stats.attachments == 1)

        await lab.until(left, "the lost attachment and its lease are gone")
        with pytest.raises(grpc.RpcError) as caught:
            await client.lookup(namespace_id, hashes)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert error_of(caught.value).reason == "session"

    in_lab(body)


def test_a_seal_waits_for_every_chunk_and_refuses_wrong_bytes(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        client = await lab.client(await lab.daemon()).attach()
        namespace_id = await client.namespace()
        hashes = lab.chain(2)
        reserved = await client.reserve(namespace_id, hashes)
        data = lab.content(hashes[0])

        async def seal(checksums: list[int]) -> int:
            answer = await client.call(
                "Seal",
                store_pb2.SealRequest(
                    reservation_id=reserved.reservation_id[:1],
                    checksum=checksums,
                    session=client.session,
                ),
            )
            return int(answer.status[0])

        for chunk in range(lab.layout.chunk_count):
            assert await seal([]) == store_pb2.SEAL_STATUS_INCOMPLETE
            ended = await client.put_chunk(reserved, 0, chunk, data)
            assert ended.status is WriteStatus.DONE
            twice = await client.put_chunk(reserved, 0, chunk, data)
            assert twice.status is WriteStatus.REFUSED
        with pytest.raises(grpc.RpcError, match="3 chunks"):
            await seal([1, 2])
        assert await seal([1, 2, 3]) == store_pb2.SEAL_STATUS_CORRUPT
        assert await seal([]) == store_pb2.SEAL_STATUS_EXPIRED
        hit = await client.lookup(namespace_id, hashes, lease_ms=0)
        assert hit.blocks == 0

    in_lab(body)


def test_a_write_after_abandon_expiry_or_out_of_bounds_is_refused(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon()
        client = await lab.client(running).attach()
        namespace_id = await client.namespace()
        first, second = lab.chain(1, "a"), lab.chain(1, "b")
        data = lab.content(first[0])
        reserved = await client.reserve(namespace_id, first)
        reserved.base_bytes[0] += 4096  # into a neighbour
        assert (await client.put_chunk(reserved, 0, 0, data)).status is WriteStatus.REFUSED
        reserved.base_bytes[0] += 1 << 40  # and with a window that claims to reach so far
        honest = reserved.window
        wide = replace(RegionDescriptor.from_bytes(honest), nbytes=1 << 50)
        reserved.window = wide.to_bytes()
        assert (await client.put_chunk(reserved, 0, 0, data)).status is WriteStatus.REFUSED
        await client.call(
            "Abandon",
            store_pb2.AbandonRequest(
                reservation_id=reserved.reservation_id, session=client.session
            ),
        )
        reserved.base_bytes[0] -= 4096 + (1 << 40)
        reserved.window = honest
        assert (await client.put_chunk(reserved, 0, 0, data)).status is WriteStatus.REFUSED
        brief = await client.reserve(namespace_id, second, ttl_ms=10_000)
        assert (await client.stats()).reservations == 1
        running.clock.advance(20)

        async def expired() -> bool:
            return bool((await client.stats()).reservations == 0)

        await lab.until(expired, "the reservation has expired")
        assert (await client.put_chunk(brief, 0, 0, data)).status is WriteStatus.REFUSED
        sealed = await client.call(
            "Seal",
            store_pb2.SealRequest(reservation_id=brief.reservation_id, session=client.session),
        )
        assert list(sealed.status) == [store_pb2.SEAL_STATUS_EXPIRED]

    in_lab(body)


def test_a_lost_attachment_gives_its_reservations_back(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon()
        client = await lab.client(running).attach()
        namespace_id = await client.namespace()
        hashes = lab.chain(3)
        await client.reserve(namespace_id, hashes)
        other = await lab.client(running).attach()
        pending = await other.reserve(namespace_id, hashes[:1])
        assert list(pending.status) == [store_pb2.RESERVE_STATUS_PENDING]
        await asyncio.to_thread(client.transport.close)

        async def given_back() -> bool:
            again = await other.reserve(namespace_id, hashes[:1])
            return list(again.status) == [store_pb2.RESERVE_STATUS_RESERVED]

        await lab.until(given_back, "the block can be reserved by another")

    in_lab(body)


def test_another_salt_or_layout_is_a_miss_that_says_namespace(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        client = await lab.client(await lab.daemon()).attach()
        namespace_id = await client.namespace()
        hashes = lab.chain(2)
        await client.save(namespace_id, hashes)
        other = await client.namespace(salt="tenant-2")
        assert other != namespace_id
        hit = await client.lookup(other, hashes)
        assert hit.blocks == 0
        assert hit.lease_id == 0
        assert hit.miss == store_pb2.MISS_REASON_NAMESPACE
        hit = await client.lookup(namespace_id, [*hashes, b"n" * 32])
        assert hit.blocks == 2
        assert hit.miss == store_pb2.MISS_REASON_ABSENT

    in_lab(body)


def test_an_answer_that_would_exceed_a_message_is_refused_before_it_is_made(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        client = await lab.client(await lab.daemon()).attach()
        wide = KVLayout(layers=64, block_tokens=64, layer_bytes=1 << 20, dtype="bf16")
        namespace_id = await client.namespace(wide)
        with pytest.raises(grpc.RpcError, match="ask for 6250 blocks at most") as caught:
            await client.lookup(namespace_id, [b"h" * 32] * 8192)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await client.lookup(namespace_id, [b"h" * 32] * 6250)).blocks == 0

    in_lab(body)


def _bad_requests(client: Any, namespace_id: bytes, lab: Any) -> list[tuple[str, Any, str]]:
    reserve = {"namespace_id": namespace_id, "ttl_ms": 1000, "session": client.session}
    hashes = lab.chain(2)
    packed: dict[str, Any] = {"hashes": b"".join(hashes), "hash_bytes": 32}
    named: dict[str, Any] = {"namespace_id": namespace_id, **packed}
    return [
        ("Lookup", store_pb2.LookupRequest(namespace_id=b"short", **packed), "namespace_id"),
        ("Lookup", store_pb2.LookupRequest(namespace_id=b"u" * 16, **packed), "namespace"),
        ("Lookup", store_pb2.LookupRequest(**(named | {"hashes": b""})), "1..8192"),
        ("Lookup", store_pb2.LookupRequest(**(named | {"hash_bytes": 4})), "hash_bytes: 4"),
        (
            "Lookup",
            store_pb2.LookupRequest(**(named | {"hashes": bytes(32 * 8193)})),
            "8193",
        ),
        (
            "Lookup",
            store_pb2.LookupRequest(**(named | {"hashes": bytes(36)})),
            "36 bytes are no whole number of 32-byte hashes",
        ),
        (
            "Lookup",
            store_pb2.LookupRequest(lease_ms=600_001, **named),
            "600001",
        ),
        (
            "Lookup",
            store_pb2.LookupRequest(session=b"x", **named),
            "session: 1 bytes",
        ),
        ("Renew", store_pb2.RenewRequest(lease_id=[1], lease_ms=0), "lease_ms: 0"),
        ("Reserve", store_pb2.ReserveRequest(hash=hashes, parent=hashes[:1], **reserve), "parent"),
        (
            "Reserve",
            store_pb2.ReserveRequest(hash=hashes, parent=[b"", b"p"], **reserve),
            r"parent\[1\]",
        ),
        (
            "Reserve",
            store_pb2.ReserveRequest(
                hash=hashes, parent=lab.parents(hashes), **(reserve | {"ttl_ms": 300_001})
            ),
            "300001",
        ),
        ("Seal", store_pb2.SealRequest(session=client.session), "reservation_id"),
        (
            "Seal",
            store_pb2.SealRequest(reservation_id=[5, 5], session=client.session),
            "named twice",
        ),
        ("Delegate", store_pb2.DelegateRequest(session=client.session), "peer_id"),
        ("OpenNamespace", store_pb2.OpenNamespaceRequest(), "layers"),
        (
            "OpenNamespace",
            store_pb2.OpenNamespaceRequest(
                namespace=common_pb2.Namespace(
                    layout=common_pb2.KVLayout(layers=1, block_tokens=1, layer_bytes=1)
                )
            ),
            "model",
        ),
    ]


def test_bad_input_is_refused_by_field_and_value(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        client = await lab.client(await lab.daemon()).attach()
        namespace_id = await client.namespace()
        for method, request, said in _bad_requests(client, namespace_id, lab):
            with pytest.raises(grpc.RpcError, match=said) as caught:
                await client.call(method, request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, (method, said)
        # Nothing was lost by it.
        await client.save(namespace_id, lab.chain(1))

    in_lab(body)


def test_an_empty_durable_seal_waits_until_what_existed_is_durable(
    in_lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    sync = FdFile.sync

    def slow_sync(file: FdFile) -> None:
        assert gate.wait(20)
        sync(file)

    async def body(lab: Any) -> None:
        client = await lab.client(await lab.daemon()).attach()
        namespace_id = await client.namespace()
        hashes = lab.chain(2)
        await client.save(namespace_id, lab.chain(1, "other"))  # so that there is a segment
        monkeypatch.setattr(FdFile, "sync", slow_sync)
        await client.save(namespace_id, hashes, durable=False)
        again = await client.reserve(namespace_id, hashes)
        assert set(again.status) == {store_pb2.RESERVE_STATUS_EXISTS}
        nothing = store_pb2.SealRequest(session=client.session)
        with pytest.raises(grpc.RpcError, match="reservation_id: 0"):
            await client.call("Seal", nothing)
        nothing.durable = True
        waiting = asyncio.ensure_future(client.call("Seal", nothing))
        _, still = await asyncio.wait([waiting], timeout=0.2)
        assert still, "acknowledged as durable while it was not"
        gate.set()
        assert not (await waiting).status

    in_lab(body)


def test_a_block_sealed_before_its_parent_stays_reserved_and_can_be_sealed_later(
    in_lab: Any,
) -> None:
    async def body(lab: Any) -> None:
        client = await lab.client(await lab.daemon()).attach()
        namespace_id = await client.namespace()
        hashes = lab.chain(2)
        reserved = await client.reserve(namespace_id, hashes)
        request = store_pb2.SealRequest(
            reservation_id=reserved.reservation_id, session=client.session
        )
        statuses = []
        for block in (1, 0):
            for chunk in range(lab.layout.chunk_count):
                ended = await client.put_chunk(reserved, block, chunk, lab.content(hashes[block]))
                assert ended.status is WriteStatus.DONE
            statuses.append(list((await client.call("Seal", request)).status))
        incomplete, expired = store_pb2.SEAL_STATUS_INCOMPLETE, store_pb2.SEAL_STATUS_EXPIRED
        assert statuses == [[incomplete, expired], [store_pb2.SEAL_STATUS_SEALED] * 2]
        stats = await client.call("Stats", store_pb2.StatsRequest())
        assert (stats.blocks, stats.reservations) == (2, 0)

    in_lab(body)
