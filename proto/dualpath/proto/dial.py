"""Channels to daemons and agents: in clear over Unix sockets and, without TLS files, over TCP.

Owns how the files of TLS become credentials. They are read anew for each channel, so that a new
certificate is used from the next connection on. Does not connect: gRPC does that at the first
call.
"""

from __future__ import annotations

from pathlib import Path

import grpc
import grpc.aio
from dualpath.proto.channel import client_options
from dualpath.proto.tls import NO_TLS, SYSTEM_CA, Tls
from dualpath.transfer.errors import Unavailable


def open_channel(target: str, tls: Tls = NO_TLS) -> grpc.aio.Channel:
    """A channel of the running event loop. Raises Unavailable if a file cannot be read."""
    options = client_options()
    if not tls.ca or target.startswith("unix:"):
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, _credentials(tls), options=(*options, *_name(tls)))


def open_blocking_channel(target: str, tls: Tls = NO_TLS) -> grpc.Channel:
    """The same for threads."""
    options = client_options()
    if not tls.ca or target.startswith("unix:"):
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, _credentials(tls), options=(*options, *_name(tls)))


def read_pem(setting: str, path: str) -> bytes:
    """A file's bytes. Raises Unavailable naming the setting."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Unavailable(
            f"{setting}: cannot read {path}: {error.strerror}", reason="tls"
        ) from error


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    ca = None if tls.ca == SYSTEM_CA else read_pem("tls_ca", tls.ca)
    if not tls.cert:
        return grpc.ssl_channel_credentials(ca)
    return grpc.ssl_channel_credentials(
        ca, read_pem("tls_key", tls.key), read_pem("tls_cert", tls.cert)
    )


def _name(tls: Tls) -> tuple[tuple[str, str], ...]:
    return (("grpc.ssl_target_name_override", tls.name),) if tls.name else ()
