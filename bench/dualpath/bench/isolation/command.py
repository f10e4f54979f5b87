"""The program `dualpath bench isolation`: its flags, its exit status, what it prints and writes."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dualpath.bench.document import put_figures
from dualpath.bench.machine import describe_machine
from dualpath.bench.progress import Progress
from dualpath.cli.sizes import parse_rate
from dualpath.transfer.errors import DualPathError, InvalidRequest

if TYPE_CHECKING:
    from dualpath.bench.isolation.figures import Figures

EXIT_OK, EXIT_MISSED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
ROUNDS, ROUNDS_MAX = 6, 1000
WINDOW_S = 2.0
QUICK_WINDOW_S = 1.0
LINK = "50MB/s"
LINK_BYTES_PER_S_MIN = 1e6

_EPILOG = """examples:
  dualpath bench isolation --json out.json --plot out.png
  dualpath bench isolation --link 100MB/s --rounds 10 --check
  dualpath bench isolation --quick            tries everything for a few seconds

Cases, in turn in each round: `control` (KV fills another link), `lanes` (the same link, KV marked),
`no_lanes` (the same link, unmarked), and the control again for the noise of the machine.

exit status: 0 it ran, or said `skipped:` and why not; 1 it broke, a byte was wrong, or, with
--check, a target is missed; 2 wrong usage
"""


class IsolationBench:
    """See the module docstring."""

    name = "isolation"
    help = "the model's traffic on a link that KV transfers fill, with lanes and without"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flags."""
        parser.epilog = _EPILOG
        parser.add_argument(
            "--rounds", type=int, default=ROUNDS, metavar="N", help=f"default {ROUNDS}"
        )
        parser.add_argument("--link", default=LINK, metavar="RATE", help=f"default {LINK}")
        parser.add_argument("--quick", action="store_true", help="one short round")
        parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")
        parser.add_argument("--json", default="", metavar="FILE", help="write the figures as JSON")
        parser.add_argument("--plot", default="", metavar="FILE", help="draw them as PNG")
        parser.add_argument(
            "--markdown", default="", metavar="FILE", help="put the table into a document"
        )

    def run(self, args: argparse.Namespace) -> int:
        """Measure; return the exit status."""
        try:
            rate = parse_rate(args.link)
            if rate < LINK_BYTES_PER_S_MIN:
                raise InvalidRequest(f"--link {args.link} is less than 1 MB/s")
            if not 1 <= args.rounds <= ROUNDS_MAX:
                raise InvalidRequest(f"--rounds must lie in 1..{ROUNDS_MAX}, not {args.rounds}")
        except InvalidRequest as error:
            print(f"dualpath bench isolation: {error}", file=sys.stderr)
            return EXIT_USAGE
        from dualpath.bench.isolation.link import why_not  # noqa: PLC0415

        if reason := why_not():
            print(f"skipped: {reason}")
            return EXIT_OK
        try:
            rounds, seconds = (1, QUICK_WINDOW_S) if args.quick else (args.rounds, WINDOW_S)
            figures = measure(rate, rounds, seconds, Progress())
            return _tell(figures, args)
        except (DualPathError, OSError) as error:
            print(f"dualpath bench isolation: {error}", file=sys.stderr)
            return EXIT_MISSED
        except KeyboardInterrupt:
            print("dualpath bench isolation: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED


def measure(rate_bytes_per_s: float, rounds: int, seconds: float, progress: Progress) -> Figures:
    """All cases in turn, each for `seconds` a round. Raises Unavailable, Corrupt."""
    from dualpath.bench.isolation.figures import Figures  # noqa: PLC0415 - numpy behind it
    from dualpath.bench.isolation.scene import Case, scene  # noqa: PLC0415

    # What the transports say about connections that end is no news here.
    logging.getLogger("dualpath").setLevel(logging.ERROR)
    figures = Figures(rate_bytes_per_s, describe_machine(), time.strftime("%Y-%m-%d"))
    cases = list(Case)
    with scene(rate_bytes_per_s) as stage:
        progress.stage("isolation")
        for number in range(rounds):
            turn = number % len(cases)
            for index, case in enumerate(cases[turn:] + cases[:turn]):
                figures.windows[case].append(stage.window(case, seconds))
                progress.move((number * len(cases) + index + 1) / (rounds * len(cases)), case.value)
        progress.done()
    return figures


def _tell(figures: Figures, args: argparse.Namespace) -> int:
    from dualpath.bench.isolation.report import draw, markdown, print_report  # noqa: PLC0415

    print_report(figures)
    if args.json:
        Path(args.json).write_text(json.dumps(figures.to_json(), indent=2) + "\n", encoding="utf-8")
    if args.markdown:
        put_figures(Path(args.markdown), markdown(figures))
    if args.plot:
        draw(figures, args.plot)
    return EXIT_MISSED if args.check and figures.misses() else EXIT_OK


command = IsolationBench()
