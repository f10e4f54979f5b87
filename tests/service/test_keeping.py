"""What a daemon keeps, and for how long: retention over gRPC, tenants of the settings."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from dualpath.kvstore.tenant_limits import TenantLimits
from dualpath.proto.status import error_of
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import InvalidRequest


def test_a_prefix_is_retained_over_grpc(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        running = await lab.daemon()
        client = await lab.client(running.where["listen"]).attach("tcp")
        space = await client.namespace()
        hashes = lab.chain(3)
        await client.save(space, hashes, durable=True)
        packed = b"".join([*hashes, b"x" * len(hashes[0])])
        request = store_pb2.RetainRequest(
            namespace_id=space, hashes=packed, hash_bytes=len(hashes[0]), retain_ms=60_000
        )
        assert (await client.call("Retain", request)).blocks == 3
        request.retain_ms = 100 * 86_400_000
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.call("Retain", request)
        error = error_of(caught.value)
        assert isinstance(error, InvalidRequest)
        assert "retain_s must lie in" in str(error)

    in_lab(body)


def test_a_tenant_at_its_quota_is_told_so(in_lab: Any) -> None:
    async def body(lab: Any) -> None:
        slot = lab.layout.slot_bytes
        running = await lab.daemon(tenants=(TenantLimits(tenant="acme", disk_bytes=2 * slot),))
        client = await lab.client(running.where["listen"]).attach("tcp")
        space = await client.namespace(tenant="acme")
        first, second = lab.chain(2), lab.chain(2, "other")
        await client.save(space, first, durable=True)
        await client.save(space, second, durable=True)
        hit = await client.lookup(space, first)
        assert hit.miss == store_pb2.MISS_REASON_QUOTA
        held = await client.lookup(space, second)
        assert held.blocks == 2
        answer = await client.call(
            "Reserve",
            store_pb2.ReserveRequest(
                namespace_id=space,
                hash=first[:1],
                parent=[b""],
                ttl_ms=1000,
                session=client.session,
            ),
        )
        assert list(answer.status) == [store_pb2.RESERVE_STATUS_QUOTA]

    in_lab(body)
