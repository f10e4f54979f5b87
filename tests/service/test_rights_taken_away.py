"""What was opened with a right or a token goes no further once it is taken away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from dualpath.client.local_loopback import chain as local_chain
from dualpath.client.local_loopback import serving
from dualpath.client.local_store import LocalStore
from dualpath.kvstore.checksum import xxh3_64
from dualpath.kvstore.service.access import Access
from dualpath.kvstore.service.access_rules import parse_access
from dualpath.kvstore.service.lease_owners import LeaseOwners
from dualpath.kvstore.service.principal import Rights
from dualpath.proto.status import error_of
from dualpath.proto.v1 import common_pb2, store_pb2
from dualpath.transfer.errors import LeaseExpired, Overloaded, PermissionDenied

RED = "red-token-0123456789"
OPS_TOKEN = """
[[token]]
name = "ops"
token = "ops-token-0123456789"
"""
RED_TOKEN = f"""
[[token]]
name = "red"
token = "{RED}"
"""
OPS_RULE = """
[[rule]]
principal = ["token:ops", "uid:*"]
rights = ["read", "write", "admin"]
"""
RED_RULE = """
[[rule]]
principal = "token:red"
rights = ["read", "write"]
"""
FRAME_BYTES = 1 << 19


async def _reason(call: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.wait_for(call, 20)
    return error_of(caught.value).reason


def _frames(space: bytes, block: bytes, parent: bytes, data: bytes) -> list[store_pb2.WriteFrame]:
    """The frames of one block; the first of a stream names the namespace."""
    frames = []
    for at in range(0, len(data), FRAME_BYTES):
        part = data[at : at + FRAME_BYTES]
        frame = store_pb2.WriteFrame(data=part, checksum=xxh3_64(memoryview(part)))
        if not at:
            frame.namespace_id, frame.hash, frame.parent = space, block, parent
        frames.append(frame)
    return frames


class _Fed:
    """A stream of requests that go out when they are put in."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[store_pb2.WriteFrame | None] = asyncio.Queue()

    def put(self, frames: Sequence[store_pb2.WriteFrame | None]) -> None:
        for frame in frames:
            self._queue.put_nowait(frame)

    async def __aiter__(self) -> AsyncIterator[store_pb2.WriteFrame]:
        while (frame := await self._queue.get()) is not None:
            yield frame


async def _refused(lab: Any, client: Any) -> None:
    """Wait until the daemon has read the file anew."""

    async def refused() -> bool:
        try:
            await client.namespace()
        except grpc.RpcError:
            return True
        return False

    await lab.until(refused, "the changed file counts")


def test_a_lease_and_a_reservation_are_no_rights(in_lab: Any, tmp_path: Path) -> None:
    file = tmp_path / "access.toml"
    file.write_text(OPS_TOKEN + RED_TOKEN + OPS_RULE + RED_RULE)

    async def body(lab: Any) -> None:
        running = await lab.daemon(access_file=str(file))
        red, relay = [await lab.client(running, RED).attach() for _ in range(2)]
        space, hashes, late = await red.namespace(), lab.chain(2), lab.chain(1, "late")
        await red.save(space, hashes)
        hit, other = await red.lookup(space, hashes), await red.lookup(space, hashes)
        delegate = store_pb2.DelegateRequest(
            lease_id=hit.lease_id, peer_id=[relay.peer_id], ttl_ms=60_000, session=red.session
        )
        ticket = (await red.call("Delegate", delegate)).ticket[0]
        reserved = await red.reserve(space, late)
        for chunk in range(lab.layout.chunk_count):
            await red.put_chunk(reserved, 0, chunk, lab.content(late[0]))
        async with red.deliver() as own, relay.deliver() as relayed:
            file.write_text(OPS_TOKEN + RED_TOKEN + OPS_RULE)
            running.daemon.reload.now()
            await _refused(lab, red)
            denied = common_pb2.CHUNK_FAILURE_DENIED
            grant = await own.grant([(0, 0)], own.window(), lease_id=hit.lease_id)
            assert set((await own.outcome(grant)).failed.values()) == {denied}
            grant = await relayed.grant([(0, 0)], relayed.window(), ticket=ticket)
            assert set((await relayed.outcome(grant)).failed.values()) == {denied}
        assert await _reason(red.call("Delegate", delegate)) == "rights"
        locate = store_pb2.LocateRequest(lease_id=hit.lease_id, block=[0], session=red.session)
        assert await _reason(red.call("Locate", locate)) == "rights"
        seal = store_pb2.SealRequest(reservation_id=reserved.reservation_id, session=red.session)
        assert await _reason(red.call("Seal", seal)) == "rights"
        leases = [hit.lease_id, other.lease_id]
        renew = store_pb2.RenewRequest(lease_id=leases, lease_ms=60_000, session=red.session)
        assert list((await red.call("Renew", renew)).expired_lease_id) == leases
        ops = lab.client(running, "ops-token-0123456789")
        assert (await ops.stats()).leases == 0
        assert (await ops.lookup(space, late)).blocks == 0

    in_lab(body)


@pytest.mark.parametrize(
    ("left", "reason"),
    [(OPS_TOKEN + OPS_RULE, "token"), (OPS_TOKEN + RED_TOKEN + OPS_RULE, "rights")],
    ids=["token", "rights"],
)
def test_open_streams_end_with_the_token_or_the_right(
    in_lab: Any, tmp_path: Path, left: str, reason: str
) -> None:
    file = tmp_path / "access.toml"
    file.write_text(OPS_TOKEN + RED_TOKEN + OPS_RULE + RED_RULE)

    async def body(lab: Any) -> None:
        running = await lab.daemon(access_file=str(file))
        red = lab.client(running, RED)
        space, (first, second) = await red.namespace(), lab.chain(2)
        fed = _Fed()
        writing = red.stub.Write(aiter(fed), metadata=red.metadata)
        following = red.stub.Events(
            store_pb2.EventsRequest(namespace_id=space), metadata=red.metadata
        )
        await asyncio.wait_for(following.read(), 20)
        fed.put(_frames(space, first, b"", lab.content(first)))

        async def arrived() -> bool:
            return bool((await red.stats()).reservations)

        await lab.until(arrived, "the first block of the stream is being written")
        file.write_text(left)
        running.daemon.reload.now()
        await _refused(lab, red)
        # Nothing happens in the store: the stream ends all the same.
        assert await _reason(following.read()) == reason
        fed.put([*_frames(b"", second, first, lab.content(second)), None])
        assert await _reason(writing) == reason
        ops = lab.client(running, "ops-token-0123456789")
        assert (await ops.lookup(space, [first])).blocks == 0

    in_lab(body)


def test_without_rules_a_token_that_is_gone_still_gives_nothing() -> None:
    space = b"n" * 16
    access = Access(parse_access(OPS_TOKEN + RED_TOKEN, "file"), lambda _: pytest.fail("asked"))
    assert access.may("token:red", space, Rights.WRITE)
    assert not access.may("open", space, Rights.READ)
    access.replace(parse_access(OPS_TOKEN, "file"))
    assert access.may("token:ops", space, Rights.READ)
    assert access.may("uid:0", space, Rights.READ)
    assert not access.may("token:red", space, Rights.READ)
    assert not access.may_everywhere("token:red", Rights.READ)
    with pytest.raises(PermissionDenied) as refused:
        access.require("token:red", space, Rights.READ)
    assert refused.value.reason == "token"
    access.replace(parse_access("", "file"))
    assert access.may("open", space, Rights.READ)


def test_a_lease_is_checked_against_the_right_of_whom_it_was_given_to() -> None:
    rights = {"token:red"}

    def require(principal: str, namespace_id: bytes) -> None:
        assert namespace_id == b"space"
        if principal not in rights:
            raise PermissionDenied("gone", reason="rights")

    owners = LeaseOwners(require=require)
    owners.put(7, "peer", 10.0, "token:red", b"space")
    owners.check(7, "peer")
    owners.renewed(7, 20.0)
    owners.renewed(8, 20.0)
    owners.prune(15.0)
    owners.check_delegated(7)
    rights.clear()
    with pytest.raises(PermissionDenied, match="gone"):
        owners.check(7, "peer")
    with pytest.raises(PermissionDenied, match="gone"):
        owners.check_delegated(7)
    with pytest.raises(LeaseExpired):
        owners.check_delegated(8)


def test_a_local_clients_lease_is_not_renewed_without_the_right(tmp_path: Path) -> None:
    with serving(tmp_path, parse_access(OPS_TOKEN + OPS_RULE, "file")) as served:
        served.put(local_chain(1))
        client = served.client()
        mapped = client.map(served.space, local_chain(1))
        client.renew(mapped.hit.lease_id, 5)
        served.access.replace(parse_access(OPS_TOKEN + OPS_RULE.replace("uid:*", "uid:x"), "file"))
        with pytest.raises(PermissionDenied):
            client.renew(mapped.hit.lease_id, 5)


def test_the_bytes_that_a_principal_leases_count_over_all_its_local_connections(
    in_lab: Any, tmp_path: Path
) -> None:
    async def body(lab: Any) -> None:
        most = 3 * lab.layout.slot_bytes
        running = await lab.daemon(unix=str(tmp_path / "s"), principal_leased_bytes=most)
        red = await lab.client(running).attach()
        space, first, second = await red.namespace(), lab.chain(2, "a"), lab.chain(2, "b")
        await red.save(space, first)
        await red.save(space, second)

        def lease_by_two() -> None:
            with (
                LocalStore.connect(running.where["local"]) as one,
                LocalStore.connect(running.where["local"]) as other,
            ):
                assert one.lookup(space, first, lease_s=30).blocks == 2
                with pytest.raises(Overloaded, match="leased") as refused:
                    other.lookup(space, second, lease_s=30)
                assert refused.value.reason == "quota"

        await asyncio.to_thread(lease_by_two)

    in_lab(body)


@pytest.mark.parametrize(
    ("leased_bytes", "owner", "holder"),
    [
        (0, "local:3:token:red", "token:red"),
        (0, "local:3:uid:1000", "local:3:uid:1000"),
        (1 << 30, "local:3:uid:1000", "uid:1000"),
        (0, "stream:3:uid:1000", "uid:1000"),
        (0, "cert:red", "cert:red"),
    ],
)
def test_engines_of_one_user_have_a_share_of_leases_each_unless_he_has_a_limit(
    in_lab: Any, leased_bytes: int, owner: str, holder: str
) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon(principal_leased_bytes=leased_bytes)
        service = running.daemon._service
        assert service.holder_of(owner) == holder
        assert service.principal_of(holder) == service.principal_of(owner)

    in_lab(body)
