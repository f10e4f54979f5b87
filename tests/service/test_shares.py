"""Shares of what is scarce: whoever takes all he can get leaves room for the next one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from dualpath.kvstore.checksum import xxh3_64
from dualpath.kvstore.service.attachments import ATTACHMENTS_MAX
from dualpath.kvstore.service.byte_streams import STREAMS_MAX
from dualpath.kvstore.service.shares import Shares
from dualpath.proto.status import error_of
from dualpath.proto.v1 import common_pb2, store_pb2
from dualpath.transfer.errors import Overloaded

WAIT_S = 20.0
GOOD, BAD = "good-token-0123456789", "bad-token-0123456789"
ACCESS = f"""
[[token]]
name = "good"
token = "{GOOD}"
[[token]]
name = "bad"
token = "{BAD}"
"""


def _taken(shares: Shares, sharer: str) -> int:
    """How many it gets until it is refused."""
    taken = 0
    while True:
        try:
            shares.take(sharer)
        except Overloaded:
            return taken
        taken += 1


def test_each_sharer_gets_half_of_what_the_others_left_and_one_more_finds_room() -> None:
    shares = Shares(64, "seats", retry_after_s=1.0)
    assert [_taken(shares, name) for name in "abcdefgh"] == [32, 16, 8, 4, 2, 1, 1, 0]
    assert len(shares) == 64
    for _ in range(32):
        shares.give_back("a")
    assert _taken(shares, "h") == 16
    with pytest.raises(Overloaded, match="b has 16 seats, and 16 are left") as caught:
        shares.take("b")
    assert caught.value.reason == "quota"


def test_a_place_that_is_taken_for_a_while_is_free_when_its_block_fails() -> None:
    shares = Shares(1, "seats", retry_after_s=1.0)
    with pytest.raises(ZeroDivisionError), shares.taken("a"):
        raise ZeroDivisionError
    with shares.taken("b"), pytest.raises(Overloaded, match="1 at most"):
        shares.take("a")
    assert len(shares) == 0


def _first_frame(lab: Any, namespace_id: bytes, seed: str) -> store_pb2.WriteFrame:
    piece = lab.content(lab.chain(1, seed)[0])[:1000]
    return store_pb2.WriteFrame(
        namespace_id=namespace_id,
        hash=lab.chain(1, seed)[0],
        data=piece,
        checksum=xxh3_64(piece),
    )


@pytest.mark.parametrize("tokens", [True, False])
def test_streams_that_do_not_move_keep_nobody_else_from_his(
    in_lab: Any, tmp_path: Path, *, tokens: bool
) -> None:
    file = tmp_path / "access.toml"
    file.write_text(ACCESS)

    async def body(lab: Any) -> None:
        settings = {"access_file": str(file)} if tokens else {}
        running = await lab.daemon(**settings)
        bad = lab.client(running, BAD if tokens else "")
        good = lab.client(running, GOOD if tokens else "")
        space = await good.namespace()
        held = []
        for index in range(STREAMS_MAX // 2):
            call = bad.stub.Write(metadata=bad.metadata or None)
            await call.write(_first_frame(lab, space, f"b{index}"))
            held.append(call)

        async def stuck() -> bool:
            return bool(running.daemon._service._streams.running == STREAMS_MAX // 2)

        await lab.until(stuck, "all streams of one client stall")
        with pytest.raises(grpc.RpcError) as caught:
            await bad.stub.Write(
                iter([_first_frame(lab, space, "more")]),
                metadata=bad.metadata or None,
                timeout=WAIT_S,
            )
        assert error_of(caught.value).reason == "quota"
        block_hash = lab.chain(1, "good")[0]
        data = lab.content(block_hash)
        whole = store_pb2.WriteFrame(
            namespace_id=space, hash=block_hash, data=data, checksum=xxh3_64(data)
        )
        written = await good.stub.Write(
            iter([whole]), metadata=good.metadata or None, timeout=WAIT_S
        )
        assert list(written.status) == [store_pb2.SEAL_STATUS_SEALED]
        for call in held:
            call.cancel()

    in_lab(body)


def test_attachments_that_nobody_dials_keep_nobody_else_from_one(
    in_lab: Any, tmp_path: Path
) -> None:
    file = tmp_path / "access.toml"
    file.write_text(ACCESS)

    async def body(lab: Any) -> None:
        running = await lab.daemon(access_file=str(file))
        bad = lab.client(running, BAD)
        request = common_pb2.AttachRequest(name="bad", transports=["tcp"])
        for _ in range(ATTACHMENTS_MAX // 2):
            await bad.call("Attach", request)
        with pytest.raises(grpc.RpcError) as caught:
            await bad.call("Attach", request)
        assert error_of(caught.value).reason == "quota"
        good = await lab.client(running, GOOD).attach()
        space = await good.namespace()
        assert await good.save(space, lab.chain(1)) == [store_pb2.SEAL_STATUS_SEALED]
        # What is not dialled ends, and with it its share.
        running.clock.advance(60.0)

        async def gone() -> bool:
            return len(running.daemon._service.attachments) == 1

        await lab.until(gone, "attachments that were not dialled end")
        await bad.call("Attach", request)

    in_lab(body)


def test_what_a_stream_has_reserved_counts_against_its_principal(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        slot = lab.layout.slot_bytes
        running = await lab.daemon(principal_reserved_bytes=2 * slot)
        client = lab.client(running)
        space = await client.namespace()
        held = []
        for index in range(2):
            call = client.stub.Write()
            await call.write(_first_frame(lab, space, f"w{index}"))
            held.append(call)

        async def reserved() -> bool:
            return bool((await client.stats()).reservations == 2)

        await lab.until(reserved, "two blocks are reserved")
        with pytest.raises(grpc.RpcError) as caught:
            await client.stub.Write(iter([_first_frame(lab, space, "w2")]), timeout=WAIT_S)
        assert error_of(caught.value).reason == "quota"
        held[0].cancel()

        async def fewer() -> bool:
            return bool((await client.stats()).reservations == 1)

        await lab.until(fewer, "a stream that ended has nothing reserved")
        third = client.stub.Write()
        await third.write(_first_frame(lab, space, "w2"))
        await lab.until(reserved, "there is room for another one")
        third.cancel()
        held[1].cancel()

    in_lab(body)


def test_one_principal_cannot_keep_everything_from_eviction_by_leases(
    in_lab: Any, tmp_path: Path
) -> None:
    file = tmp_path / "access.toml"
    file.write_text(ACCESS)

    async def body(lab: Any) -> None:
        running = await lab.daemon(
            access_file=str(file), disk_bytes=24 << 20, segment_bytes=4 << 20, dram_bytes=8 << 20
        )
        good, bad = await lab.client(running, GOOD).attach(), lab.client(running, BAD)
        space = await good.namespace()
        chains = [lab.chain(1, f"c{index}") for index in range(40)]
        for hashes in chains:
            assert await good.save(space, hashes) == [store_pb2.SEAL_STATUS_SEALED]
        leased, refused = 0, set()
        for hashes in chains:
            try:
                leased += (await bad.lookup(space, hashes, lease_ms=600_000)).blocks
            except grpc.RpcError as error:
                refused.add(error_of(error).reason)
        assert leased
        assert refused == {"quota"}
        # Others write, and lease what they wrote.
        for index in range(12):
            hashes = lab.chain(1, f"later{index}")
            assert await good.save(space, hashes) == [store_pb2.SEAL_STATUS_SEALED]
        assert (await good.lookup(space, hashes)).lease_id

    in_lab(body)


def test_a_lease_without_a_session_is_given_for_a_minute_at_most(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon()
        joined, alone = await lab.client(running).attach(), lab.client(running)
        space = await joined.namespace()
        await joined.save(space, lab.chain(1))
        assert (await joined.lookup(space, lab.chain(1), lease_ms=600_000)).lease_ms == 600_000
        hit = await alone.lookup(space, lab.chain(1), lease_ms=600_000)
        assert hit.lease_ms == 60_000
        renew = store_pb2.RenewRequest(lease_id=[hit.lease_id], lease_ms=600_000)
        assert not (await alone.call("Renew", renew)).expired_lease_id
        running.clock.advance(61.0)
        assert list((await alone.call("Renew", renew)).expired_lease_id) == [hit.lease_id]

    in_lab(body)


def test_a_stream_that_is_longer_than_its_principal_may_reserve_seals_as_it_goes(
    in_lab: Any,
) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon(principal_reserved_bytes=2 * lab.layout.slot_bytes)
        client = lab.client(running)
        space = await client.namespace()
        hashes = lab.chain(7)
        frames = []
        for block_hash, parent in zip(hashes, lab.parents(hashes), strict=True):
            data = lab.content(block_hash)
            frames.append(
                store_pb2.WriteFrame(
                    namespace_id=space,
                    hash=block_hash,
                    parent=parent,
                    data=data,
                    checksum=xxh3_64(data),
                )
            )
        written = await client.stub.Write(iter(frames), timeout=WAIT_S)
        assert list(written.status) == [store_pb2.SEAL_STATUS_SEALED] * 7

    in_lab(body)
