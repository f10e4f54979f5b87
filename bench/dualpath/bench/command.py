"""The subcommand `dualpath bench`: finds the program that was asked for and hands over to it.

Owns the list of programs. Each lives in a module of its own that is imported only when it runs, and
is a `Command` like those of the CLI: `name`, `help`, `add_arguments`, `run`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from dualpath.cli.command import Command
from dualpath.transfer.errors import DualPathError, InvalidRequest

PROGRAMS: Mapping[str, tuple[str, str]] = {
    "store": (
        "dualpath.bench.store.command",
        "the store against fio, memcpy and sockets, target by target",
    ),
    "transfer": (
        "dualpath.bench.transfer.command",
        "the transports by grain, against memcpy and sockets",
    ),
    "isolation": (
        "dualpath.bench.isolation.command",
        "the model's traffic beside KV on one link, with lanes and without",
    ),
    "overlap": (
        "dualpath.bench.overlap.command",
        "layers that are computed while the next ones are loaded",
    ),
    "eviction": (
        "dualpath.bench.eviction.command",
        "hit rates of the eviction policies on a trace",
    ),
    "scheduler": (
        "dualpath.bench.scheduler.command",
        "how many requests a second the scheduler decides, and how long one fetch takes",
    ),
    "peers": ("dualpath.bench.peers.command", "other KV stores and this one, the same work"),
    "gpu": ("dualpath.bench.gpu.command", "copies into paged GPU memory against the bus"),
    "headline": ("dualpath.bench.headline", "their headline figures into a document"),
    "cluster": (
        "dualpath.bench.cluster.command",
        "a shaped cluster of this machine's: both paths against the limit of its links, faults",
    ),
    "faults": (
        "dualpath.bench.faults.command",
        "random faults over real processes: how every load ends, and what is left behind",
    ),
    "explore": (
        "dualpath.bench.explore.command",
        "orders of messages, writes and faults of a small load, exhaustively",
    ),
    "soak": ("dualpath.bench.soak.command", "crashes, torn writes and flipped bytes for long"),
}
"""Module and one line of help of each program."""

_OUTPUTS = ("json", "plot", "markdown")
"""Flags of programs that name a file to write."""
_EPILOG = """examples:
  dualpath bench store --json out.json --plot out.png
  dualpath bench peers --mib 512 --only redis,dualpath-local
  dualpath bench eviction --trace FILE --json out.json
  dualpath bench scheduler --json out.json
  dualpath bench cluster --prefill 1 --decode 2 --json out.json
  dualpath bench faults --rounds 10
  dualpath bench explore --delays 2 --faults 2 --seconds 600
  dualpath bench soak --help

`dualpath bench PROGRAM --help` shows the flags of each program."""


class BenchCommand:
    """Loaded by the CLI through the entry-point group `dualpath.commands`."""

    name = "bench"
    help = "measure this machine: " + ", ".join(PROGRAMS)

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """One positional word; what follows it is the program's own."""
        lines = [f"  {name:10} {text}" for name, (_, text) in PROGRAMS.items()]
        parser.epilog = "\n".join(["programs:", *lines, "", _EPILOG])
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument("program", choices=tuple(PROGRAMS), metavar="PROGRAM")
        parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its flags")

    def run(self, args: argparse.Namespace) -> int:
        """Parse the rest for the program and run it; return its exit status."""
        program = load_program(args.program)
        parser = argparse.ArgumentParser(
            prog=f"dualpath bench {args.program}",
            description=program.help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        program.add_arguments(parser)
        arguments = parser.parse_args(args.arguments)
        check_outputs(arguments)
        with _ended_politely():
            return program.run(arguments)


def check_outputs(arguments: argparse.Namespace) -> None:
    """Minutes of measuring shall not be lost for a folder that is not there. Raises
    InvalidRequest."""
    for name in _OUTPUTS:
        path = str(getattr(arguments, name, None) or "")
        if path and not Path(path).absolute().parent.is_dir():
            raise InvalidRequest(f"--{name} {path}: there is no folder {Path(path).parent}")
        if path and Path(path).is_dir():
            raise InvalidRequest(f"--{name} {path}: that is a folder; name a file in it")


@contextlib.contextmanager
def _ended_politely() -> Iterator[None]:
    """SIGTERM cleans up as SIGINT does: namespaces and processes would stay otherwise."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def load_program(name: str) -> Command:
    """Import a program. Raises InvalidRequest (no such one), DualPathError (not importable)."""
    if name not in PROGRAMS:
        raise InvalidRequest(f"'{name}' is not a program of bench; known: {', '.join(PROGRAMS)}")
    module, _ = PROGRAMS[name]
    try:
        return cast(Command, importlib.import_module(module).command)
    except ImportError as error:
        raise DualPathError(
            f"`bench {name}` cannot be loaded: {error}; "
            "install its dependencies with `pip install 'dualpath[bench]'`"
        ) from error


command = BenchCommand()
