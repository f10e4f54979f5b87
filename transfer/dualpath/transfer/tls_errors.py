"""What a failed handshake of TLS means, and what to do about it. Pure."""

from __future__ import annotations

import ssl

from dualpath.transfer.errors import Unavailable

BOTH_SIDES = "data_tls must be set on both sides or on neither"


def tls_failure(peer: str, error: ssl.SSLError) -> Unavailable:
    """The error, reason `tls`, for what OpenSSL found or was told by `peer`."""
    reason = (error.reason or str(error)).replace("_", " ").lower()
    if isinstance(error, ssl.SSLCertVerificationError):
        found = error.verify_message.rstrip(".")
        told = (
            f"the certificate of {peer} is not accepted: {found}; check tls_ca, tls_client_ca and "
            "tls_name on this side and tls_cert on that side"
        )
    elif "did not return a certificate" in reason:
        told = f"{peer} shows no certificate; set tls_cert and tls_key there"
    elif "alert" in reason:
        told = (
            f"{peer} does not accept our certificate: {reason}; check tls_cert on this side, "
            "tls_ca and tls_client_ca on that side"
        )
    else:
        told = f"{peer} does not speak TLS 1.3 on its data connections ({reason}); {BOTH_SIDES}"
    return Unavailable(told, reason="tls")
