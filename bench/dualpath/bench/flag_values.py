"""Rates, sizes and times of flags: parsed as everywhere, with the flag in the error. Pure."""

from __future__ import annotations

from collections.abc import Callable

from dualpath.cli.sizes import parse_bytes, parse_rate, parse_seconds
from dualpath.transfer.errors import InvalidRequest


def rate_of(flag: str, text: str) -> float:
    """Bytes a second, above 0, of `400Gb`, `50GB/s`. Raises InvalidRequest."""
    wanted = "a rate is above 0; give 400Gb or 50GB/s"
    if text.strip().startswith("-"):
        raise InvalidRequest(f"--{flag} {text}: {wanted}")
    value = _parsed(flag, text, parse_rate)
    if value <= 0:
        raise InvalidRequest(f"--{flag} {text}: {wanted}")
    return value


def size_of(flag: str, text: str) -> float:
    """Bytes, above 0, of `80GB`. Raises InvalidRequest."""
    value = _parsed(flag, text, parse_bytes)
    if value <= 0:
        raise InvalidRequest(f"--{flag} {text}: a size is above 0; give 80GB")
    return value


def seconds_of(flag: str, text: str, *, above_zero: bool = True) -> float:
    """Seconds of `500ms`. Raises InvalidRequest."""
    value = _parsed(flag, text, parse_seconds)
    if above_zero and value <= 0:
        raise InvalidRequest(f"--{flag} {text}: a time above 0, such as 500ms")
    return value


def _parsed(flag: str, text: str, parse: Callable[[str], float]) -> float:
    try:
        return parse(text)
    except InvalidRequest as error:
        raise InvalidRequest(f"--{flag}: {error}") from error
