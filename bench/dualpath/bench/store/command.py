"""The program `dualpath bench store`: its flags, its exit status, what it prints and writes."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dualpath.bench.document import put_figures
from dualpath.bench.progress import Progress
from dualpath.bench.store.section import SECTIONS, chosen
from dualpath.transfer.errors import DualPathError, InvalidRequest

if TYPE_CHECKING:
    from dualpath.bench.store.report import StoreReport

EXIT_OK, EXIT_MISSED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
ROUNDS = 5
ROUNDS_MAX = 1000

_EPILOG = """examples:
  dualpath bench store --json out.json --plot out.png
  dualpath bench store --only cold_read_1m,cold_read_256k --rounds 9
  dualpath bench store --quick                tries everything with little data; judges nothing

Every figure stands beside the limit of the same machine, measured in turn with it: fio with the
same pages, depth and bytes; memcpy on the same pages; one TCP stream that hashes at both ends. A
ratio is the median of the rounds' ratios.

exit status: 0 every target holds (with --quick: everything ran and every byte was right); 1 a
target was missed, could not be measured, or a byte was wrong; 2 wrong usage
"""


class StoreBench:
    """See the module docstring."""

    name = "store"
    help = "measure the store's tiers against the limits of this machine"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flags."""
        parser.epilog = _EPILOG
        parser.add_argument(
            "--rounds", type=int, default=ROUNDS, metavar="N", help=f"default {ROUNDS}"
        )
        parser.add_argument("--quick", action="store_true", help="one round of little data")
        parser.add_argument(
            "--only",
            default="",
            metavar="LIST",
            help="of " + ", ".join(section.name for section in SECTIONS),
        )
        parser.add_argument(
            "--data",
            default="",
            metavar="DIR",
            help="make the stores in a new folder in here: the disk to measure (default: .)",
        )
        parser.add_argument("--json", default="", metavar="FILE", help="write the figures as JSON")
        parser.add_argument("--plot", default="", metavar="FILE", help="draw them as PNG")
        parser.add_argument(
            "--markdown", default="", metavar="FILE", help="put tables into a document"
        )

    def run(self, args: argparse.Namespace) -> int:
        """Measure; return the exit status."""
        names = [name.strip() for name in args.only.split(",") if name.strip()]
        try:
            sections = chosen(names)
        except KeyError as error:
            print(f"dualpath bench store: --only: no section {error}", file=sys.stderr)
            return EXIT_USAGE
        if not 1 <= args.rounds <= ROUNDS_MAX:
            print(
                f"dualpath bench store: --rounds must lie in 1..{ROUNDS_MAX}, not {args.rounds}",
                file=sys.stderr,
            )
            return EXIT_USAGE
        from dualpath.bench.store.runner import run_sections  # noqa: PLC0415 - numpy behind it

        rounds = 1 if args.quick else args.rounds
        try:
            with tempfile.TemporaryDirectory(
                prefix="dualpath-bench-", dir=args.data or "."
            ) as scratch:
                report = run_sections(sections, Path(scratch), rounds, Progress())
        except InvalidRequest as error:
            print(f"dualpath bench store: {error}", file=sys.stderr)
            return EXIT_USAGE
        except OSError as error:
            print(f"dualpath bench store: {error}", file=sys.stderr)
            return EXIT_MISSED
        except KeyboardInterrupt:
            print("dualpath bench store: interrupted; the data was removed", file=sys.stderr)
            return EXIT_INTERRUPTED
        return _tell(report, args)


def _tell(report: StoreReport, args: argparse.Namespace) -> int:
    from dualpath.bench.store.report import markdown, print_report  # noqa: PLC0415

    print_report(report)
    ok = report.ok
    try:
        if args.json:
            text = json.dumps(report.to_json(), indent=2) + "\n"
            Path(args.json).write_text(text, encoding="utf-8")
        if args.markdown:
            put_figures(Path(args.markdown), markdown(report))
    except (OSError, InvalidRequest) as error:
        print(f"dualpath bench store: {error}", file=sys.stderr)
        ok = False
    if args.plot:
        from dualpath.bench.store.plot import draw  # noqa: PLC0415 - slow import

        try:
            draw(report, args.plot)
            print(f"picture: {args.plot}")
        except DualPathError as error:
            print(f"dualpath bench store: {error}", file=sys.stderr)
            ok = False
    return EXIT_OK if ok else EXIT_MISSED


command = StoreBench()
