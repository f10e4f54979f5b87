"""Which files a caller uses for TLS. Reads none: that is `dial`'s."""

from __future__ import annotations

from dataclasses import dataclass

from dualpath.transfer.errors import InvalidRequest

SYSTEM_CA = "system"
"""As `ca`: the certificate authorities that gRPC knows by itself."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Paths of PEM files. `ca` checks the other side; without it nothing is encrypted. `cert` and
    `key` are ours, for servers that ask for one. `name` is the name to look for in the server's
    certificate instead of the host that is dialled."""

    ca: str = ""
    cert: str = ""
    key: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if bool(self.cert) != bool(self.key):
            given, missing = ("tls_cert", "tls_key") if self.cert else ("tls_key", "tls_cert")
            raise InvalidRequest(f"{given} is set and {missing} is not: give both PEM files")
        if (self.cert or self.name) and not self.ca:
            raise InvalidRequest(
                "tls_ca is not set: give the PEM file of the authority that signed the server's "
                f"certificate, or '{SYSTEM_CA}'"
            )


NO_TLS = Tls()
