"""Certificates of data connections: which files, and the contexts that are made of them.

Owns when files are read: at the start, and again for a new connection if one of them has changed.
Files that do not fit leave the contexts in force that there were; that is logged once.
Guarantees TLS 1.3 and a verified certificate on both sides.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass

from dualpath.transfer.errors import InvalidRequest, Unavailable

SYSTEM_CA = "system"
"""As `ca`: the certificate authorities of this system."""

_log = logging.getLogger(__name__)

_Seen = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files. `cert` and `key` are ours, for whoever we dial and whoever dials us.
    `client_ca` signed those of who dials us, `ca` those of whom we dial ("": we dial nobody).
    `name` is looked for in the latter instead of the host that is dialled."""

    cert: str
    key: str
    client_ca: str
    ca: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        for setting, value in (("tls_cert", self.cert), ("tls_key", self.key)):
            if not value:
                raise InvalidRequest(
                    f"data_tls is set and {setting} is not: both ends of a data connection show "
                    "a certificate; give tls_cert and tls_key"
                )
        if not self.client_ca or self.client_ca == SYSTEM_CA:
            raise InvalidRequest(
                "data_tls is set and tls_client_ca is not: give the PEM file of the authority "
                "that signed the certificates of those who dial this process"
            )


class TlsContexts:
    """Thread-safe. Raises Unavailable, reason `tls`, if the files cannot be used at the start."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._accepting = _Newest((files.cert, files.key, files.client_ca), self._accept_context)
        dialled = () if files.ca == SYSTEM_CA else (files.ca,)
        self._dialling = (
            _Newest((files.cert, files.key, *dialled), self._dial_context) if files.ca else None
        )

    def accepting(self) -> ssl.SSLContext:
        """For a connection that came in."""
        return self._accepting.get()

    def dialling(self) -> ssl.SSLContext:
        """For one that we open. Raises InvalidRequest without a `ca`."""
        if self._dialling is None:
            raise InvalidRequest("tls_ca is not set: whom this process dials cannot be verified")
        return self._dialling.get()

    def name_of(self, host: str) -> str:
        """The name to look for in the certificate of who answers at `host`."""
        return self._files.name or host

    def _accept_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        context.num_tickets = 0  # connections are not resumed
        self._load(context, "tls_client_ca", self._files.client_ca)
        return context

    def _dial_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # which verifies certificate and name
        self._load(context, "tls_ca", self._files.ca)
        return context

    def _load(self, context: ssl.SSLContext, setting: str, ca: str) -> None:
        files = self._files
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        try:
            context.load_cert_chain(files.cert, files.key, password=_no_password)
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            raise Unavailable(
                f"tls_cert {files.cert} and tls_key {files.key} are no PEM pair that can be read "
                f"and fits: {error}",
                reason="tls",
            ) from error
        if ca == SYSTEM_CA:
            context.load_default_certs()
            return
        try:
            context.load_verify_locations(ca)
        except OSError as error:
            raise Unavailable(
                f"{setting} {ca} holds no PEM certificate that can be read: {error}", reason="tls"
            ) from error


class _Newest:
    """What `make` makes of files, made again when one of them has changed."""

    def __init__(self, paths: tuple[str, ...], make: Callable[[], ssl.SSLContext]) -> None:
        self._paths = paths
        self._make = make
        self._lock = threading.Lock()  # guards what follows
        self._seen = _look(paths)
        self._context = make()

    def get(self) -> ssl.SSLContext:
        """Made of the newest files that could be used."""
        with self._lock:
            seen = _look(self._paths)
            if seen != self._seen:
                self._seen = seen
                try:
                    self._context = self._make()
                except Unavailable as error:
                    _log.warning("new files of TLS are not used: %s", error)
            return self._context


def _look(paths: tuple[str, ...]) -> _Seen:
    return tuple(_state(path) for path in paths)


def _state(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one without a passphrase")
