"""`dualpath stat`: the counters of a daemon or an agent, once. For watching over time there is the
Prometheus endpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dualpath.cli.connection import ClientConfig, add_connection_arguments, connection_of
from dualpath.cli.sizes import format_bytes, format_rate
from dualpath.proto.dial import open_blocking_channel
from dualpath.proto.status import translated
from dualpath.proto.v1 import agent_pb2, agent_pb2_grpc, store_pb2, store_pb2_grpc
from google.protobuf.message import Message

_DEADLINE_S = 10.0
_EXAMPLE = """example:
  dualpath stat                              # the daemon at 127.0.0.1:7070
  dualpath stat --daemon 10.0.0.5:7070 --json
  dualpath stat --agent unix:run/dualpath.sock"""


class StatCommand:
    """See the module docstring."""

    name = "stat"
    help = "show the counters of a daemon or an agent"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Connection."""
        parser.epilog = _EXAMPLE
        add_connection_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Ask once and print."""
        stats = as_values(_stats(connection_of(args)))
        print(json.dumps(stats) if args.json else "\n".join(_lines(stats)))
        return 0


def _stats(config: ClientConfig) -> Message:
    target = config.agent or config.daemon
    metadata = (("authorization", f"Bearer {config.token}"),) if config.token else ()
    timeout_s = min(config.deadline_s, _DEADLINE_S)
    opened = open_blocking_channel(target, config.tls)
    with opened, translated(target):
        if config.agent:
            return agent_pb2_grpc.AgentStub(opened).Stats(
                agent_pb2.AgentStatsRequest(), timeout=timeout_s, metadata=metadata
            )
        return store_pb2_grpc.StoreStub(opened).Stats(
            store_pb2.StatsRequest(), timeout=timeout_s, metadata=metadata
        )


def as_values(message: Message) -> dict[str, Any]:
    """Every field, also those at zero, as plain values; numbers stay numbers."""
    return {field.name: _plain(getattr(message, field.name)) for field in message.DESCRIPTOR.fields}


def _plain(value: Any) -> Any:
    if isinstance(value, Message):
        return as_values(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str) or not isinstance(value, Sequence):
        return value
    return [_plain(item) for item in value]


def _lines(values: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Scalars first, then the repeated parts, each under its name."""
    nested = {name: value for name, value in values.items() if isinstance(value, list | dict)}
    for name, value in values.items():
        if name not in nested:
            yield f"{indent}{name:24} {_shown(name, value)}"
    for name, value in nested.items():
        rows = value if isinstance(value, list) else [value]
        for row in rows:
            if row:
                yield f"{indent}{name}:"
                yield from _lines(row, indent + "  ")


def _shown(name: str, value: Any) -> str:
    if name.endswith("_bytes_per_s"):
        return format_rate(value)
    if name.endswith("bytes"):
        return format_bytes(value)
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)


command = StatCommand()
