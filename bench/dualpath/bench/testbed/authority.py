"""A certificate authority of its own, for measurements and tests of TLS.

Owns nothing but the PEM files that it writes into a folder. Needs the package `cryptography`.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Pair:
    """Paths of a certificate and its key."""

    cert: str
    key: str


class Authority:
    """Signs certificates, and keeps them as PEM files in `folder`; `ca` is its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(_name(name))
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        )
        self.ca = str(folder / f"{name}.pem")
        _put(self.ca, _pem(builder.sign(self._key, hashes.SHA256())))

    def pair(
        self,
        name: str,
        *,
        hosts: tuple[str, ...] = ("localhost", "127.0.0.1"),
        days: float = 1,
        file: str = "",
    ) -> Pair:
        """A certificate for `name` at `hosts` that ends in `days` (negative: has ended), written
        over those of the same `file`."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(_name(self._name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 3 * DAY)
            .not_valid_after(now + days * DAY)
            .add_extension(
                x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False
            )
        )
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        pair = Pair(
            str(self._folder / f"{file or name}.crt"), str(self._folder / f"{file or name}.key")
        )
        _put(pair.key, private)
        _put(pair.cert, _pem(builder.sign(self._key, hashes.SHA256())))
        return pair


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _put(path: str, data: bytes) -> None:
    """As one would replace a file in use: written beside, then renamed."""
    beside = Path(f"{path}.new")
    beside.touch(mode=0o600)
    beside.write_bytes(data)
    os.replace(beside, path)
