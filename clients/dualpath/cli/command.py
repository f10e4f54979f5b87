"""The port of a subcommand, and how subcommands are found.

Built-in ones are listed here with their module, which is imported only when the command runs, so
that `dualpath --help` and `serve` do not pay for the others. Other distributions and the bench
component add theirs through the entry-point group `dualpath.commands`: each entry point is an
object with the four members of `Command`.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, cast

from dualpath.transfer.errors import DualPathError

ENTRY_POINT_GROUP = "dualpath.commands"


class Command(Protocol):
    """A subcommand. `help` is one line; its `add_arguments` may set `parser.epilog` (example)."""

    @property
    def name(self) -> str:
        """The word after `dualpath`."""

    @property
    def help(self) -> str:
        """What it does, one line."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare flags and positional arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; 0 ok, 1 failed, 2 usage. A DualPathError becomes one line on stderr."""


@dataclass(frozen=True, slots=True)
class CommandSource:
    """Where a command comes from, known without importing it."""

    name: str
    help: str
    module: str = ""
    entry_point: EntryPoint | None = None

    def load(self) -> Command:
        """Import it. Raises DualPathError that names the missing module and the remedy."""
        try:
            if self.entry_point is not None:
                return cast(Command, self.entry_point.load())
            return cast(Command, importlib.import_module(self.module).command)
        except ImportError as error:
            raise DualPathError(
                f"command '{self.name}' cannot be loaded: {error}; "
                "is the extra that it needs installed? `dualpath doctor` lists the extras"
            ) from error


BUILT_IN = (
    CommandSource("serve", "run the storage daemon of a node", "dualpath.cli.serve"),
    CommandSource("agent", "run the agent of a node: loads and relays", "dualpath.cli.agent"),
    CommandSource(
        "scheduler",
        "run the scheduler: which engines a request gets, and who reads",
        "dualpath.cli.scheduler",
    ),
    CommandSource("put", "store a file as blocks", "dualpath.cli.put"),
    CommandSource("get", "bring a stored file back", "dualpath.cli.get"),
    CommandSource("lookup", "show how much of a prefix is stored", "dualpath.cli.lookup"),
    CommandSource("stat", "show the counters of a daemon or an agent", "dualpath.cli.stat"),
    CommandSource("top", "watch what daemons do", "dualpath.cli.top"),
    CommandSource("events", "follow which blocks come and go", "dualpath.cli.events"),
    CommandSource(
        "invalidate", "remove blocks by namespace, prefix or writer", "dualpath.cli.invalidate"
    ),
    CommandSource("retain", "keep a stored prefix for a while", "dualpath.cli.retain"),
    CommandSource(
        "drain", "let a daemon finish what runs, and take nothing new", "dualpath.cli.drain"
    ),
    CommandSource("fsck", "check a data directory, and repair it", "dualpath.cli.fsck"),
    CommandSource("doctor", "show what this machine offers", "dualpath.cli.doctor"),
)


def known_commands() -> Mapping[str, CommandSource]:
    """Built-in commands first; a plug-in cannot replace one."""
    found = {source.name: source for source in BUILT_IN}
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
        found.setdefault(point.name, CommandSource(point.name, "", entry_point=point))
    return found
