"""One daemon as the commands of operators call it: a blocking channel and the token.

Owns the channel for as long as the context lasts, and the translation of failed calls. Knows
nothing of what is called.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from dualpath.cli.config_file import read_config
from dualpath.cli.connection import TABLE, ClientConfig
from dualpath.cli.logs import LEVELS, configure_logs
from dualpath.proto.dial import open_blocking_channel
from dualpath.proto.status import translated
from dualpath.proto.v1 import store_pb2_grpc
from dualpath.transfer.errors import InvalidRequest

CALL_S_MAX = 10.0
"""Longest wait for the answer to a short call."""
_SETTINGS = ("token", "tls_ca", "tls_cert", "tls_key", "tls_name")


@dataclass(frozen=True, slots=True)
class DaemonStub:
    """`stub` has the calls of the Store service; pass `metadata` to each."""

    stub: Any
    metadata: tuple[tuple[str, str], ...]


@contextmanager
def daemon_stub(config: ClientConfig) -> Iterator[DaemonStub]:
    """The daemon at `config.daemon`. Errors of calls inside become those of the tree."""
    metadata = (("authorization", f"Bearer {config.token}"),) if config.token else ()
    with translated(config.daemon), open_blocking_channel(config.daemon, config.tls) as channel:
        yield DaemonStub(store_pb2_grpc.StoreStub(channel), metadata)


def add_daemon_arguments(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """The address(es) as positional arguments, how to reach them, --json."""
    parser.add_argument(
        "address",
        nargs="*" if several else "?",
        help="control address: host:port or unix:PATH (default: `daemon` of the settings)",
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with a table [client]")
    for name in _SETTINGS:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, dest=name, help="as in the table [client]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--log-level", choices=LEVELS, default="error", help="(default error)")


def configs_of(args: argparse.Namespace) -> list[ClientConfig]:
    """One configuration an address. Also sets the log level."""
    configure_logs(args.log_level)
    config = read_config(
        ClientConfig,
        TABLE,
        file=args.config,
        environment=os.environ,
        flags={name: getattr(args, name) for name in _SETTINGS if getattr(args, name)},
    )
    given = args.address if isinstance(args.address, list) else [args.address]
    return [replace(config, daemon=address) for address in given if address] or [config]


def namespace_id_of(text: str | None) -> bytes:
    """A namespace id written in hex; b"" for none. Raises InvalidRequest."""
    return _hex("--namespace", text)


def hash_of(text: str | None) -> bytes:
    """A block hash written in hex; b"" for none. Raises InvalidRequest."""
    return _hex("--hash", text)


def _hex(flag: str, text: str | None) -> bytes:
    try:
        return bytes.fromhex(text or "")
    except ValueError:
        raise InvalidRequest(f"{flag}: {text!r} is not hexadecimal") from None
