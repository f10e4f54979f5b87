"""Checks of what is handed in: each raises InvalidRequest naming the value and what may be."""

from __future__ import annotations

import math

from dualpath.transfer.errors import InvalidRequest

NAME_LENGTH_MAX = 256


def check_name(what: str, name: str) -> None:
    """1 to 256 characters."""
    if not 1 <= len(name) <= NAME_LENGTH_MAX:
        raise InvalidRequest(
            f"the name of a {what} has {len(name)} characters; give 1 to {NAME_LENGTH_MAX}"
        )


def check_count(what: str, value: float) -> None:
    """A number of at least 0."""
    if not (math.isfinite(value) and value >= 0):
        raise InvalidRequest(f"{what} is {value}; give a number of at least 0")


def check_positive(what: str, value: float) -> None:
    """A number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise InvalidRequest(f"{what} is {value}; give a number above 0")
