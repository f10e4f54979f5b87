"""Entry point of `dualpath`: find the command, parse, run, turn errors into an exit code.

Exit codes: 0 ok, 1 failed, 2 usage (also for an InvalidRequest, the caller's own mistake), 130
interrupted, 141 if whoever read the output closed it first. A DualPathError is one line on stderr,
never a traceback; with --json, where that is a switch, it is an object on stdout as well. Modules
of commands are imported only when they run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from dualpath.cli.checked_stdout import ReaderGone, checked_stdout
from dualpath.cli.command import Command, CommandSource, known_commands
from dualpath.cli.config_file import nearest
from dualpath.transfer.errors import DualPathError, InvalidRequest, Overloaded

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
EXIT_READER_GONE = 141
"""As a shell shows the end of a program by SIGPIPE."""

_EPILOG = """example:
  dualpath serve --data DIR &
  dualpath put README.md --key readme
  dualpath get --key readme -o copy.md

`dualpath COMMAND --help` shows the flags and an example of each command.
exit codes: 0 ok, 1 failed, 2 wrong usage"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # gRPC's core writes lines of its own beside the one that names the error.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        with checked_stdout():
            code = _run(arguments)
            print(end="", flush=True)
            return code
    except DualPathError as error:
        print(f"dualpath: {error.reason}: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, InvalidRequest) else EXIT_FAILED
    except ReaderGone:
        return EXIT_READER_GONE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def product_version() -> str:
    """Of the installed distribution."""
    try:
        return version("dualpath")
    except PackageNotFoundError:
        return "unknown (not installed)"


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-V", "--version"):
        print(f"dualpath {product_version()}")
        return EXIT_OK
    known = known_commands()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview(known))
        return EXIT_OK if arguments else EXIT_USAGE
    source = known.get(arguments[0])
    if source is None:
        raise InvalidRequest(
            f"'{arguments[0]}' is not a command{nearest(arguments[0], known)}", reason="usage"
        )
    command = source.load()
    parser = command_parser(command)
    parser.expect_json(arguments[1:])
    try:
        return command.run(parser.parse_args(arguments[1:]))
    except DualPathError as error:
        if parser.as_json:
            print(_as_json(error))
        raise


class CommandParser(argparse.ArgumentParser):
    """A parser that answers a wrong flag as JSON too, where --json asks for it."""

    as_json = False

    def expect_json(self, arguments: Sequence[str]) -> None:
        """Look for the switch --json before anything is parsed: that may fail."""
        flags = arguments[: arguments.index("--")] if "--" in arguments else arguments
        # Elsewhere --json names a file to write to, and its default is not False.
        self.as_json = self.get_default("json") is False and "--json" in flags

    def print_help(self, file: Any = None) -> None:
        """As the parser's, which passes over what cannot be written."""
        print(self.format_help(), end="", file=file, flush=True)

    def error(self, message: str) -> NoReturn:
        """Exit code 2, as everywhere."""
        if self.as_json:
            print(_as_json(InvalidRequest(message, reason="usage")))
        super().error(message)


def _as_json(error: DualPathError) -> str:
    values: dict[str, object] = {
        "error": type(error).__name__,
        "reason": error.reason,
        "message": str(error),
    }
    if isinstance(error, Overloaded):
        values["retry_after_s"] = error.retry_after_s
    return json.dumps(values)


def command_parser(command: Command) -> CommandParser:
    """The parser of one command, as `dualpath NAME --help` shows it."""
    parser = CommandParser(
        prog=f"dualpath {command.name}",
        description=command.help,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return parser


def _overview(known: Mapping[str, CommandSource]) -> str:
    lines = ["usage: dualpath COMMAND [flags]", "", "KV-cache storage that loads by two paths", ""]
    for source in known.values():
        lines.append(f"  {source.name:12} {source.help or _help_of(source)}")
    return "\n".join([*lines, "", "  --version    show the version", "", _EPILOG])


def _help_of(source: CommandSource) -> str:
    try:
        return source.load().help
    except DualPathError as error:
        return f"(not available: {error})"


if __name__ == "__main__":
    sys.exit(main())
