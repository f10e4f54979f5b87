"""The call that says where leased blocks lie, for readers with the segment files on a mount.

Owns no state. What is said holds for as long as the lease; a reader verifies what it reads.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from dualpath.kvstore.service.attachments import Attachments
from dualpath.kvstore.service.auth import Caller
from dualpath.kvstore.service.messages import checked_batch, checked_session
from dualpath.kvstore.store_api import Store
from dualpath.proto.v1 import store_pb2

LeaseOf = Callable[[str, int, bytes], int]
"""(peer, lease id, ticket) -> the lease under which the peer may read."""


class LocateCalls:
    """Handler of Locate."""

    def __init__(
        self,
        store: Store,
        attachments: Attachments,
        lease_of: LeaseOf,
        namespace_of: Callable[[int], bytes],
    ) -> None:
        self._store = store
        self._attachments = attachments
        self._lease_of = lease_of
        self._namespace_of = namespace_of

    def locate(self, request: store_pb2.LocateRequest, caller: Caller) -> store_pb2.LocateResponse:
        """See store.proto."""
        checked_batch("block", len(request.block))
        peer = self._attachments.of_session(checked_session(request.session), caller).peer_id
        lease_id = self._lease_of(peer, request.lease_id, request.ticket)
        # A number over what an index may be is one that no lease has.
        blocks = np.minimum(np.array(request.block, np.int64), np.iinfo(np.int32).max)
        places = self._store.locate(lease_id, blocks.astype(np.int32))
        return store_pb2.LocateResponse(
            store_id=self._store.store_id,
            segment=places.segment.tolist(),
            offset=places.offset.tolist(),
            chunk_bytes=places.chunk_bytes,
            namespace_id=self._namespace_of(lease_id),
        )
