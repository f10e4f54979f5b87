"""Sizes, rates and durations as people write them: `4GiB`, `50MB/s`, `800Mbit/s`, `500ms`.

Owns the units and their spelling, both ways. A plain number is bytes, bytes a second or seconds.
Decimal and binary units are told apart, and a unit that could mean either (`4G`) is refused.
"""

from __future__ import annotations

import math
import re

from dualpath.transfer.errors import InvalidRequest

_BYTES = {
    "": 1.0,
    "B": 1.0,
    "kB": 1e3,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
    "TiB": 2.0**40,
}
_BITS = {
    **{"kbit": 1e3 / 8, "Mbit": 1e6 / 8, "Gbit": 1e9 / 8, "Tbit": 1e12 / 8},
    **{"kb": 1e3 / 8, "Mb": 1e6 / 8, "Gb": 1e9 / 8, "Tb": 1e12 / 8},
}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """Bytes of `4GiB`, `4GB`, `4096`. Raises InvalidRequest."""
    value = _scaled(text, _BYTES, "a size such as 4GiB, 500MB or 4096")
    if value != int(value):
        raise InvalidRequest(f"'{text}' is not a whole number of bytes")
    return int(value)


def parse_rate(text: str) -> float:
    """Bytes a second of `50MB/s`, `800Mbit/s`, `400Gb` (bits); `5e7` is not one. Raises
    InvalidRequest."""
    return _scaled(
        text.strip().removesuffix("/s"), _BYTES | _BITS, "a rate such as 50MB/s or 800Mbit/s"
    )


def parse_seconds(text: str) -> float:
    """Seconds of `30`, `30s`, `500ms`. Raises InvalidRequest."""
    return _scaled(text, _SECONDS, "a duration such as 30s or 500ms")


def format_bytes(nbytes: float) -> str:
    """The largest binary unit that leaves at least 1: `4.00 GiB`, `512 B`."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if abs(nbytes) >= _BYTES[unit]:
            return f"{nbytes / _BYTES[unit]:.2f} {unit}"
    return f"{nbytes:.0f} B"


def format_rate(bytes_per_s: float) -> str:
    """Decimal units, as links are named: `50.0 MB/s`."""
    for unit in ("GB", "MB", "kB"):
        if abs(bytes_per_s) >= _BYTES[unit]:
            return f"{bytes_per_s / _BYTES[unit]:.1f} {unit}/s"
    return f"{bytes_per_s:.0f} B/s"


def _scaled(text: str, units: dict[str, float], wanted: str) -> float:
    match = _NUMBER.fullmatch(text)
    if match is None or match.group(2) not in units:
        raise InvalidRequest(f"'{text}' is not {wanted}")
    value = float(match.group(1)) * units[match.group(2)]
    if not math.isfinite(value):
        raise InvalidRequest(f"'{text}' is too large")
    return value
