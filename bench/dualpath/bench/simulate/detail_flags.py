"""A flag for each engine detail (`EngineDetails`): `fetch_s` is `--fetch 100ms`, `lockstep` is
`--lockstep` or `--no-lockstep`. What a field of theirs means is told by its class."""

from __future__ import annotations

import argparse
from dataclasses import Field, fields
from typing import Any

from dualpath.bench.flag_values import seconds_of
from dualpath.bench.simulate.engine_details import EngineDetails
from dualpath.transfer.errors import InvalidRequest

DETAILS = tuple(field.name for field in fields(EngineDetails))
_SECONDS = "_s"


def add_detail_flags(parser: argparse.ArgumentParser) -> None:
    """Their defaults are the committed ones."""
    group = parser.add_argument_group(
        "engine details", "what the paper does not say of its engines; declared, not fitted"
    )
    for field in fields(EngineDetails):
        words: dict[str, Any] = {
            "help": f"{_meaning(field.name)} ({_shown(field)})",
            "dest": field.name,
        }
        if isinstance(field.default, bool):
            group.add_argument(
                f"--{_flag(field)}", action=argparse.BooleanOptionalAction, default=None, **words
            )
        else:
            metavar = "T" if field.name.endswith(_SECONDS) else "N"
            group.add_argument(f"--{_flag(field)}", default=None, metavar=metavar, **words)


def details_of(args: argparse.Namespace) -> EngineDetails:
    """As given. Raises InvalidRequest that names the flag."""
    found: dict[str, Any] = {}
    for field in fields(EngineDetails):
        text = getattr(args, field.name)
        if text is None:
            continue
        found[field.name] = text if isinstance(text, bool) else _number(field, text)
    return EngineDetails(**found)


def _number(field: Field[Any], text: str) -> float:
    flag = _flag(field)
    if field.name.endswith(_SECONDS):
        return seconds_of(flag, text)
    whole = isinstance(field.default, int)
    try:
        return int(text) if whole else float(text)
    except ValueError as error:
        kind = "a whole number" if whole else "a number"
        raise InvalidRequest(f"--{flag} {text}: {kind}, such as {field.default}") from error


def _flag(field: Field[Any]) -> str:
    return field.name.removesuffix(_SECONDS).replace("_", "-")


def _shown(field: Field[Any]) -> str:
    if isinstance(field.default, bool):
        return "default: yes" if field.default else "default: no"
    return f"default {field.default}{'s' if field.name.endswith(_SECONDS) else ''}"


def _meaning(name: str) -> str:
    """Its line of the class's docstring, where Python has kept that."""
    for line in (EngineDetails.__doc__ or "").split("\n    - "):
        names, _, text = line.partition(":")
        if f"`{name}`" in names:
            return " ".join(text.split()).rstrip(".").replace("%", "%%")
    return name.replace("_", " ")
