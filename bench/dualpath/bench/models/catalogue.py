"""Finds a model's geometry by name, in the catalogue of this package or in a file of the user's.

The catalogue cites where each number comes from, or says that it is declared.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from dualpath.bench.models.geometry import ModelGeometry
from dualpath.cli.config_file import nearest, read_config
from dualpath.transfer.errors import InvalidRequest

CATALOGUE = Path(__file__).with_name("catalogue.toml")
_SUFFIX = ".toml"


def model_names() -> tuple[str, ...]:
    """Of the catalogue, in its order."""
    return _tables(CATALOGUE)


def find_model(wanted: str) -> ModelGeometry:
    """`ds-v3.2`, or `FILE.toml` (of one model), or `FILE.toml:TABLE`.

    Raises InvalidRequest: unknown name (with the nearest), unreadable file, a number that no model
    has.
    """
    path, _, table = wanted.rpartition(":")
    if wanted.endswith(_SUFFIX):
        file = Path(wanted)
        names = _tables(file)
        if len(names) != 1:
            raise InvalidRequest(
                f"{wanted} has {len(names)} models; name one: {wanted}:"
                + (f"{names[0]}" if names else "NAME (a table with its geometry)")
            )
        return _read(file, names[0])
    if path.endswith(_SUFFIX):
        file = Path(path)
        names = _tables(file)
    else:
        file, table, names = CATALOGUE, wanted, model_names()
    if table not in names:
        raise InvalidRequest(
            f"'{table}' is not a model of {'the catalogue' if file is CATALOGUE else file}"
            f"{nearest(table, names)}; or give a TOML file with its geometry"
        )
    return _read(file, table)


def _read(file: Path, table: str) -> ModelGeometry:
    return read_config(ModelGeometry, table, file=file, fallbacks={"name": table})


def _tables(file: Path) -> tuple[str, ...]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"cannot read {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{file} is not TOML: {error}") from error
    return tuple(name for name, value in content.items() if isinstance(value, dict))
