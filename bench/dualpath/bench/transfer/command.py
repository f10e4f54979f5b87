"""The program `dualpath bench transfer`: its flags, its exit status, what it prints and writes."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dualpath.bench.document import put_figures
from dualpath.bench.machine import describe_machine
from dualpath.bench.progress import Progress
from dualpath.bench.rounds import Sample, interleave
from dualpath.transfer.errors import DualPathError

if TYPE_CHECKING:
    from dualpath.bench.transfer.report import Report

EXIT_OK, EXIT_MISSED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
ROUNDS, ROUNDS_MAX = 7, 1000
MIB, MIB_MAX = 256, 1 << 14
QUICK_MIB = 32

_EPILOG = """examples:
  dualpath bench transfer --json out.json --plot out.png
  dualpath bench transfer --only tcp --rounds 15 --mib 512 --check
  dualpath bench transfer --quick             tries everything with little data
  dualpath bench transfer --posting           only what posting RDMA writes costs (seconds)

Each transport moves the same bytes in each grain, verified by their hash where they land; the
writers of tcp and shm are processes of their own. Beside them memcpy on the same kind of pages, and
one TCP stream between two processes that do nothing else, bare and hashing at both ends; beside
tcp+tls one TLS stream between such processes, and the cipher alone on one core.

exit status: 0 everything ran and every byte was right; 1 not so, or, with --check, a target is
missed; 2 wrong usage
"""


class TransferBench:
    """See the module docstring."""

    name = "transfer"
    help = "the transports by grain, against memcpy and sockets"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flags."""
        parser.epilog = _EPILOG
        parser.add_argument(
            "--rounds", type=int, default=ROUNDS, metavar="N", help=f"default {ROUNDS}"
        )
        parser.add_argument(
            "--mib", type=int, default=MIB, metavar="N", help=f"MiB a measurement, default {MIB}"
        )
        parser.add_argument(
            "--only", default="", metavar="LIST", help="of memory, shm, tcp, tcp+tls"
        )
        parser.add_argument(
            "--posting", action="store_true", help="posting RDMA writes to a null provider instead"
        )
        parser.add_argument("--quick", action="store_true", help="one round of little data")
        parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")
        parser.add_argument("--json", default="", metavar="FILE", help="write the figures as JSON")
        parser.add_argument("--plot", default="", metavar="FILE", help="draw them as PNG")
        parser.add_argument(
            "--markdown", default="", metavar="FILE", help="put the table into a document"
        )

    def run(self, args: argparse.Namespace) -> int:
        """Measure; return the exit status."""
        from dualpath.bench.transfer.contestant import KINDS  # noqa: PLC0415 - numpy behind it

        kinds = [name.strip() for name in args.only.split(",") if name.strip()] or list(KINDS)
        unknown = [kind for kind in kinds if kind not in KINDS]
        wrong = ""
        if unknown:
            wrong = f"--only: no transport {unknown[0]!r}; known: {', '.join(KINDS)}"
        elif not 1 <= args.rounds <= ROUNDS_MAX:
            wrong = f"--rounds must lie in 1..{ROUNDS_MAX}, not {args.rounds}"
        elif not 1 <= args.mib <= MIB_MAX:
            wrong = f"--mib must lie in 1..{MIB_MAX}, not {args.mib}"
        if wrong:
            print(f"dualpath bench transfer: {wrong}", file=sys.stderr)
            return EXIT_USAGE
        try:
            rounds, mib = (1, QUICK_MIB) if args.quick else (args.rounds, args.mib)
            if args.posting:
                return _tell_posting(rounds, args)
            return _tell(measure(kinds, mib << 20, rounds, Progress()), args)
        except (DualPathError, OSError) as error:
            print(f"dualpath bench transfer: {error}", file=sys.stderr)
            return EXIT_MISSED
        except KeyboardInterrupt:
            print("dualpath bench transfer: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED


def measure(kinds: Sequence[str], total_bytes: int, rounds: int, progress: Progress) -> Report:
    """Everything in turn. Raises Unavailable, Corrupt."""
    from dualpath.bench.transfer.contestant import (  # noqa: PLC0415
        flow,
        memcpy,
        sockets,
        tls_limits,
    )
    from dualpath.bench.transfer.grain import GRAINS  # noqa: PLC0415
    from dualpath.bench.transfer.report import LIMITS, Report  # noqa: PLC0415

    # What the transports say about connections that end is no news here.
    logging.getLogger("dualpath").setLevel(logging.ERROR)
    machine = describe_machine()
    names = {(kind, grain.name): f"{kind} {grain.name}" for kind in kinds for grain in GRAINS}
    with contextlib.ExitStack() as stack:
        contestants: dict[str, Callable[[], Sample]] = {
            **stack.enter_context(memcpy(total_bytes)),
            **stack.enter_context(sockets(total_bytes)),
        }
        if "tcp+tls" in kinds:
            contestants |= stack.enter_context(tls_limits(total_bytes))
        for kind in kinds:
            for grain in GRAINS:
                measured = stack.enter_context(flow(kind, grain, total_bytes))
                contestants[names[kind, grain.name]] = measured
        series = interleave(contestants, rounds, lambda text: progress.say(f"  {text}"))
    return Report(
        {name: series[name] for name in LIMITS if name in series},
        {of: series[name] for of, name in names.items()},
        total_bytes,
        rounds,
        machine,
        time.strftime("%Y-%m-%d"),
    )


def _tell(report: Report, args: argparse.Namespace) -> int:
    from dualpath.bench.transfer.report import draw, markdown, print_report  # noqa: PLC0415

    print_report(report)
    if args.json:
        Path(args.json).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    if args.markdown:
        put_figures(Path(args.markdown), markdown(report))
    if args.plot:
        draw(report, args.plot)
    return EXIT_MISSED if args.check and report.misses() else EXIT_OK


def _tell_posting(rounds: int, args: argparse.Namespace) -> int:
    from dualpath.bench.transfer.posting import (  # noqa: PLC0415
        markdown,
        measure_posting,
        print_posting,
    )

    posting = measure_posting(rounds, describe_machine())
    print_posting(posting)
    if args.json:
        Path(args.json).write_text(json.dumps(posting.to_json(), indent=2) + "\n", encoding="utf-8")
    if args.markdown:
        put_figures(Path(args.markdown), markdown(posting))
    return EXIT_MISSED if args.check and posting.misses() else EXIT_OK


command = TransferBench()
