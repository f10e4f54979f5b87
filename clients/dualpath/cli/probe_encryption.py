"""Whether the settings of a daemon or an agent encrypt its calls and leave its blocks in clear."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

from dualpath.cli.config_file import ENVIRONMENT_PREFIX, TRUE_TEXTS
from dualpath.cli.finding import Finding, Status
from dualpath.transfer.errors import InvalidRequest

TABLES = ("serve", "agent")


def encryption_findings(file: str, environment: Mapping[str, str]) -> list[Finding]:
    """One for each of TABLES whose calls go over TLS, by the TOML `file` ("": none) and the
    environment. Raises InvalidRequest for a file that cannot be read."""
    tables = _content(file) if file else {}
    found = []
    for table in TABLES:
        settings = dict(_mapping(tables.get(table)))
        prefix = f"{ENVIRONMENT_PREFIX}{table.upper()}_"
        for variable, text in environment.items():
            if variable.startswith(prefix):
                settings[variable.removeprefix(prefix).lower()] = text
        if settings.get("tls_cert") or settings.get("tls_ca"):
            found.append(_finding(table, settings.get("data_tls", False)))
    return found


def _finding(table: str, data_tls: object) -> Finding:
    name = f"TLS of [{table}]"
    if data_tls is True or str(data_tls).lower() in TRUE_TEXTS:
        return Finding(name=name, status=Status.OK, detail="calls and blocks")
    return Finding(
        name=name,
        status=Status.PARTIAL,
        detail="calls; blocks go over TCP in clear",
        cost="who can listen on the storage or the compute network reads the KV of prompts",
        remedy="data_tls = true here and on every peer, or networks that only you use",
    )


def _content(file: str) -> Mapping[str, object]:
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"cannot read {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{file} is not TOML: {error}") from error


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}
