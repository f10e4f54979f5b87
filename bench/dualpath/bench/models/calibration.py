"""What the simulator and the planner are told about hardware and engines, each with its source.

One committed file, `calibration.toml`; nothing in it is tuned to a figure. Another file in the same
format may be given for other GPUs: inputs that it leaves out keep the committed value.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dualpath.cli.config_file import nearest
from dualpath.transfer.errors import InvalidRequest

CALIBRATION = Path(__file__).with_name("calibration.toml")
KINDS = ("datasheet", "published", "declared")
_SHARES = (
    *("hbm_usable", "hbm_efficiency", "attention_efficiency", "decode_attention_efficiency"),
    *("indexer_efficiency", "moe_linear_efficiency", "dense_linear_efficiency"),
)
_FROM_ZERO = ("exchange_exposed", "layer_overhead_s", "reference_cached_tokens")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rates of one GPU, and what share of them engines reach. Units last in the names; shares in
    (0, 1]."""

    fp8_flops_per_s: float
    bf16_flops_per_s: float
    hbm_bytes: float
    hbm_bytes_per_s: float
    hbm_usable: float
    hbm_efficiency: float
    attention_efficiency: float
    decode_attention_efficiency: float
    indexer_efficiency: float
    moe_linear_efficiency: float
    dense_linear_efficiency: float
    exchange_bytes_per_s: float
    exchange_exposed: float
    layer_overhead_s: float
    reference_cached_tokens: float
    reference_new_tokens: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value < 0:
                raise InvalidRequest(f"calibration: {field.name} is {value}; it must be positive")
            if value == 0 and field.name not in _FROM_ZERO:
                raise InvalidRequest(f"calibration: {field.name} must not be 0")
            if value > 1 and field.name in (*_SHARES, "exchange_exposed"):
                raise InvalidRequest(
                    f"calibration: {field.name} is {value}; it is a share of at most 1"
                )


@dataclass(frozen=True, slots=True)
class CalibrationInput:
    """One input as the file states it."""

    name: str
    value: float
    kind: str
    source: str


def committed_calibration() -> Calibration:
    """Of the file in this package."""
    return read_calibration(None)


def read_calibration(path: Path | None) -> Calibration:
    """The committed values, with those of `path` in their place. Raises InvalidRequest."""
    values = {each.name: each.value for each in calibration_inputs(CALIBRATION)}
    if path is not None:
        values |= {each.name: each.value for each in calibration_inputs(path)}
    return Calibration(**values)


def calibration_inputs(path: Path) -> tuple[CalibrationInput, ...]:
    """The inputs of a file, with their sources. Raises InvalidRequest that names the input."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} is not TOML: {error}") from error
    known = [field.name for field in dataclasses.fields(Calibration)]
    found = []
    for name, table in content.items():
        if name not in known:
            raise InvalidRequest(f"{path}: unknown input '{name}'{nearest(name, known)}")
        found.append(_input(name, table, path))
    return tuple(found)


def _input(name: str, table: object, path: Path) -> CalibrationInput:
    where = f"{path}: [{name}]"
    if not isinstance(table, Mapping) or set(table) != {"value", "kind", "source"}:
        raise InvalidRequest(f"{where} must have value, kind and source, and nothing else")
    value, kind, source = table["value"], table["kind"], table["source"]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{where}: value {value!r} is not a number")
    if kind not in KINDS:
        raise InvalidRequest(f"{where}: kind {kind!r} is none of {', '.join(KINDS)}")
    if not isinstance(source, str) or not source.strip():
        raise InvalidRequest(f"{where}: source must say where the value comes from")
    return CalibrationInput(name, float(value), str(kind), source)
