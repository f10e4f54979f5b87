"""The server's side of TLS: credentials whose certificate can be replaced while calls run.

Owns the files' content. A new pair is checked before it is used: one that does not fit leaves the
old one in force. Connections that are open keep what they were made with; each new handshake gets
the newest. With `client_ca` every client must show a certificate that it signed.
"""

from __future__ import annotations

import ssl

import grpc
from dualpath.kvstore.service.config import ServerFiles
from dualpath.proto.dial import read_pem
from dualpath.transfer.errors import Unavailable


class ServerTls:
    """See the module docstring."""

    def __init__(self, files: ServerFiles) -> None:
        """Read and check the files. Raises Unavailable, reason `tls`."""
        self._files = files
        self._newest = _configuration(files)
        self._handed = self._newest
        self.credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            self._newest,
            self._changed,  # type: ignore[arg-type]  # None is allowed, the stubs do not say so
            require_client_authentication=bool(files.client_ca),
        )

    def reload(self) -> None:
        """Use what the files hold now. Raises Unavailable; the old certificate stays then."""
        self._newest = _configuration(self._files)

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC, on a thread of its own, before each handshake; None: no change."""
        newest = self._newest
        if newest is self._handed:
            return None
        self._handed = newest
        return newest


def _configuration(files: ServerFiles) -> grpc.ServerCertificateConfiguration:
    cert = read_pem("tls_cert", files.cert)
    key = read_pem("tls_key", files.key)
    client_ca = read_pem("tls_client_ca", files.client_ca) if files.client_ca else None
    # gRPC itself would take a pair that does not fit, and then fail every handshake.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.cert, files.key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise Unavailable(
            f"tls_cert {files.cert} and tls_key {files.key} are no PEM pair that fits: {error}",
            reason="tls",
        ) from error
    if client_ca is not None:
        try:
            context.load_verify_locations(files.client_ca)
        except (ssl.SSLError, OSError) as error:
            raise Unavailable(
                f"tls_client_ca {files.client_ca} holds no PEM certificate: {error}", reason="tls"
            ) from error
    return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one without a passphrase")
