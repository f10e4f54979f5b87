"""One frozen dataclass of settings from four places, the later ones winning:
its defaults, a table of a TOML file, the environment (DUALPATH_<TABLE>_<FIELD>), the flags.

Owns the reading, the parsing of texts by field and the refusal of what is not known: an unknown
key, in whichever place, is an error that names the nearest known one, never ignored; so is a
variable of a table that no command has. Ranges that go beyond a sign are the dataclass's own to
check. Nothing else in the product reads the
environment.

How a text becomes a value: a field named `*_bytes` takes sizes (`4GiB`), `*_bytes_per_s` rates
(`50MB/s`), `*_s` durations (`500ms`); a tuple takes a list separated by commas; a tuple of records
takes an array of tables in the file, and in a text `field=value` separated by commas, records by
semicolons.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import re
import textwrap
import tomllib
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dualpath.cli.sizes import format_bytes, parse_bytes, parse_rate, parse_seconds
from dualpath.transfer.errors import InvalidRequest

T = TypeVar("T")
ENVIRONMENT_PREFIX = "DUALPATH_"
TABLES = ("agent", "client", "layout", "scheduler", "serve")
"""Tables of all commands: one command's settings may stand in the environment of another."""
TRUE_TEXTS = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")
_SENTENCE_END = re.compile(r"[.;]\s+(?=[A-Z`])")


def read_config(
    kind: type[T],
    table: str,
    *,
    file: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
    fallbacks: Mapping[str, object] | None = None,
) -> T:
    """Build `kind` for `table`. A flag that is None was not given. `fallbacks` are defaults that
    only the entry point can know, such as the host's name.

    Raises InvalidRequest: unreadable file, unknown key, wrong type, missing field.
    """
    hints = typing.get_type_hints(kind)
    known = field_names(kind)
    values: dict[str, Any] = dict(fallbacks or {})
    if file is not None:
        for key, value in _table_of(Path(file), table).items():
            _check_known(key, known, f"{file}: [{table}]")
            values[key] = _typed(hints[key], key, value, f"{file}: {table}.{key}")
    prefix = f"{ENVIRONMENT_PREFIX}{table.upper()}_"
    for variable, text in sorted((environment or {}).items()):
        _check_table(variable, {*TABLES, table})
        if variable.startswith(prefix):
            key = variable[len(prefix) :].lower()
            _check_known(key, known, f"environment: {variable}")
            values[key] = _typed(hints[key], key, text, variable)
    for key, given in (flags or {}).items():
        if given is not None:
            _check_known(key, known, "flags")
            values[key] = _typed(hints[key], key, given, f"--{flag_name(key)}")
    missing = [name for name in _required(kind) if name not in values]
    if missing:
        raise InvalidRequest(
            f"{table}: {missing[0]} is not set; give --{flag_name(missing[0])}, "
            f"{prefix}{missing[0].upper()} or {missing[0]} in [{table}] of --config FILE"
        )
    return kind(**values)


def add_config_arguments(
    parser: argparse.ArgumentParser, kind: type, *, config_flag: str = "--config"
) -> None:
    """One flag a field, documented by the field's own docstring, and `config_flag FILE`."""
    documented = field_documents(kind)
    hints = typing.get_type_hints(kind)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    parser.add_argument(config_flag, metavar="FILE", help="TOML file with these settings")
    for name in field_names(kind):
        shown = _shown_default(name, defaults[name])
        text = " ".join((documented.get(name, "") + shown).split()).replace("%", "%%")
        flag = f"--{flag_name(name)}"
        if hints[name] is bool:
            parser.add_argument(
                flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text
            )
        elif _is_tuple(hints[name]):
            record = _record_of(hints[name])
            metavar = f"{field_names(record)[0]}=...,..." if record else f"{name.upper()},..."
            parser.add_argument(flag, dest=name, action="append", metavar=metavar, help=text)
        else:
            parser.add_argument(flag, dest=name, metavar=_metavar(name), help=text)


def given_flags(arguments: argparse.Namespace, kind: type) -> dict[str, object]:
    """The fields of `kind` that were given as flags."""
    found = {name: getattr(arguments, name, None) for name in field_names(kind)}
    return {name: value for name, value in found.items() if value is not None}


def field_names(kind: type) -> tuple[str, ...]:
    """Settable fields of a dataclass, in order."""
    if not dataclasses.is_dataclass(kind):
        raise TypeError(f"{kind!r} is not a dataclass")
    return tuple(field.name for field in dataclasses.fields(kind) if field.init)


def flag_name(field: str) -> str:
    """`disk_bytes` -> `disk-bytes`."""
    return field.replace("_", "-")


def field_documents(kind: type) -> dict[str, str]:
    """What each field means: the string below it in the class body, else the sentence of the
    class docstring that names it in backticks. Without the source, only the latter."""
    found = {}
    sentences = _SENTENCE_END.split(" ".join((kind.__doc__ or "").split()))
    for name in field_names(kind):
        sentence = next((text for text in sentences if f"`{name}`" in text), "")
        if sentence:
            found[name] = sentence.strip().rstrip(".")
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return found
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    for field, below in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            found[field.target.id] = inspect.cleandoc(below.value.value).rstrip(".")
    return found


def nearest(name: str, known: Collection[str]) -> str:
    """` Did you mean 'x'?`, or the whole list where nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(sorted(known))}"


def _table_of(path: Path, table: str) -> Mapping[str, object]:
    try:
        with path.open("rb") as opened:
            content = tomllib.load(opened)
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} is not TOML: {error}") from error
    found = content.get(table)
    if found is None:
        named = ", ".join(f"[{name}]" for name in content) or "nothing"
        raise InvalidRequest(f"{path} has no table [{table}]; it has {named}")
    if not isinstance(found, dict):
        raise InvalidRequest(f"{path}: {table} must be a table, not {found!r}")
    return found


def _check_known(key: str, known: Collection[str], where: str) -> None:
    if key not in known:
        raise InvalidRequest(f"{where}: unknown setting '{key}'{nearest(key, known)}")


def _check_table(variable: str, tables: Collection[str]) -> None:
    """Without it a misspelt table would be a setting that silently does nothing."""
    if not variable.startswith(ENVIRONMENT_PREFIX):
        return
    written, _, field = variable.removeprefix(ENVIRONMENT_PREFIX).partition("_")
    if written not in {table.upper() for table in tables} or not field:
        raise InvalidRequest(
            f"environment: {variable} is of no known table "
            f"({ENVIRONMENT_PREFIX}<TABLE>_<SETTING>){nearest(written.lower(), tables)}"
        )


def _required(kind: type) -> list[str]:
    return [
        field.name
        for field in dataclasses.fields(kind)
        if field.init
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]


def _is_tuple(hint: object) -> bool:
    return typing.get_origin(hint) is tuple


def _typed(hint: object, key: str, value: object, where: str) -> object:
    """`value` as the type of the field. Texts are parsed; other types must match."""
    try:
        record = _record_of(hint)
        if record is not None:
            return _records(record, value)
        if _is_tuple(hint):
            return _tuple(value)
        if hint is bool:
            return _bool(value)
        if hint is int or hint is float:
            return _number(hint, key, value)
        if hint is str:
            if not isinstance(value, str):
                raise InvalidRequest(f"{value!r} is not a text")
            return value
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {error}") from error
    raise TypeError(f"{where}: fields of type {hint!r} cannot be configured")


def _tuple(value: object) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise InvalidRequest(f"{value!r} is not a list of texts")
    parts = [part.strip() for item in items for part in item.split(",")]
    return tuple(part for part in parts if part)


def _record_of(hint: object) -> type | None:
    """The dataclass of a tuple of dataclasses."""
    inner = typing.get_args(hint)[0] if _is_tuple(hint) else None
    return inner if isinstance(inner, type) and dataclasses.is_dataclass(inner) else None


def _records(kind: type, value: object) -> tuple[object, ...]:
    """Tables of a file, or texts `a=1,b=2;a=3`."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple):
        raise InvalidRequest(f"{value!r} is not a list of tables")
    tables: list[Mapping[str, object]] = []
    for item in given:
        if isinstance(item, str):
            tables += [_assignments(text) for text in item.split(";") if text.strip()]
        elif isinstance(item, dict):
            tables.append(item)
        else:
            raise InvalidRequest(f"{item!r} is not a table")
    hints = typing.get_type_hints(kind)
    known = field_names(kind)
    found = []
    for table in tables:
        for key in table:
            _check_known(key, known, ", ".join(f"{k}={v}" for k, v in table.items()))
        missing = [name for name in _required(kind) if name not in table]
        if missing:
            raise InvalidRequest(f"{dict(table)!r} has no '{missing[0]}'")
        found.append(kind(**{k: _typed(hints[k], k, v, k) for k, v in table.items()}))
    return tuple(found)


def _assignments(text: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        key, separator, value = part.partition("=")
        if not separator:
            raise InvalidRequest(f"'{part}' is not field=value")
        found[key.strip()] = value.strip()
    return found


def _bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in TRUE_TEXTS:
        return True
    if isinstance(value, str) and value.lower() in _FALSE:
        return False
    raise InvalidRequest(f"{value!r} is neither true nor false")


def _number(hint: object, key: str, value: object) -> float:
    if isinstance(value, str):
        value = _parsed(hint, key, value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{value!r} is not a number")
    if not math.isfinite(value) or (value < 0 and _is_quantity(key)):
        raise InvalidRequest(f"{value} must be finite and not negative")
    if hint is int and value != int(value):
        raise InvalidRequest(f"{value} is not a whole number")
    return int(value) if hint is int else float(value)


def _parsed(hint: object, key: str, text: str) -> float:
    if key.endswith("_bytes_per_s"):
        return parse_rate(text)
    if key.endswith(("_bytes", "_bytes_max")):
        return parse_bytes(text)
    if key.endswith(("_s", "_s_max")):
        return parse_seconds(text)
    try:
        return int(text, 10) if hint is int else float(text)
    except ValueError:
        raise InvalidRequest(f"'{text}' is not a number") from None


def _is_quantity(key: str) -> bool:
    return key.removesuffix("_max").endswith(("_bytes", "_s"))


def _metavar(name: str) -> str:
    if name.endswith("_bytes_per_s"):
        return "RATE"
    return "SIZE" if name.endswith(("_bytes", "_bytes_max")) else name.upper()


def _shown_default(name: str, default: object) -> str:
    if default in (dataclasses.MISSING, "", (), None) or isinstance(default, bool):
        return ""
    if name.endswith(("_bytes", "_bytes_max")) and isinstance(default, int):
        return f" (default {format_bytes(default)})"
    return f" (default {default})"
