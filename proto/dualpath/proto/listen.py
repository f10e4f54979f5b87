"""Where a gRPC server listens: one address, in clear or with credentials, or the reason why not."""

from __future__ import annotations

import logging

import grpc
import grpc.aio
from dualpath.transfer.errors import Unavailable

_log = logging.getLogger(__name__)


def listen_at(
    server: grpc.aio.Server,
    field: str,
    address: str,
    credentials: grpc.ServerCredentials | None = None,
) -> int:
    """Let `server` listen there; the port. Raises Unavailable (`address_in_use`) naming the setting
    `field`."""
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        port = 0
        _log.debug("gRPC cannot bind %s: %s", address, error)
    if port == 0:
        raise Unavailable(
            f"{field}: {address} is in use or not an address of this machine; stop what listens "
            "there or choose another",
            reason="address_in_use",
        )
    return port
