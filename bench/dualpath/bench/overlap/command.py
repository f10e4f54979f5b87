"""The program `dualpath bench overlap`: its flags, its exit status, what it prints and writes."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dualpath.bench.document import put_figures
from dualpath.bench.machine import describe_machine
from dualpath.bench.progress import Progress
from dualpath.bench.table import print_table
from dualpath.cli.sizes import parse_rate
from dualpath.transfer.errors import DualPathError, InvalidRequest

if TYPE_CHECKING:
    from dualpath.bench.overlap.figures import Figures

EXIT_OK, EXIT_MISSED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
ROUNDS, ROUNDS_MAX = 5, 1000
LINK = "100MB/s"
LINK_BYTES_PER_S_MIN = 1e6
LOAD_S = 0.6
"""What a load takes alone, about."""
QUICK_LOAD_S = 0.1
PARTS = (0.5, 1.0, 2.0)

_EPILOG = """examples:
  dualpath bench overlap --json out.json
  dualpath bench overlap --link 200MB/s --rounds 9 --check
  dualpath bench overlap --quick              tries everything for a few seconds

A load in the order of layers over a paced link; the engine computes each layer (a wait on a timer)
as soon as it is there. Compared with the least that could take, and with loading first and
computing then, which is also what blocks one after another would come to.

exit status: 0 it ran; 1 it broke, a byte was wrong, or, with --check, the target is missed; 2 wrong
usage
"""


class OverlapBench:
    """See the module docstring."""

    name = "overlap"
    help = "layers that are computed while the next ones are loaded"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flags."""
        parser.epilog = _EPILOG
        parser.add_argument(
            "--rounds", type=int, default=ROUNDS, metavar="N", help=f"default {ROUNDS}"
        )
        parser.add_argument("--link", default=LINK, metavar="RATE", help=f"default {LINK}")
        parser.add_argument("--quick", action="store_true", help="one round of short loads")
        parser.add_argument("--check", action="store_true", help="exit 1 if the target is missed")
        parser.add_argument("--json", default="", metavar="FILE", help="write the figures as JSON")
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
            print(f"dualpath bench overlap: {error}", file=sys.stderr)
            return EXIT_USAGE
        try:
            rounds, load_s = (1, QUICK_LOAD_S) if args.quick else (args.rounds, LOAD_S)
            return _tell(asyncio.run(measure(rate, rounds, load_s, Progress())), args)
        except (DualPathError, OSError) as error:
            print(f"dualpath bench overlap: {error}", file=sys.stderr)
            return EXIT_MISSED
        except KeyboardInterrupt:
            print("dualpath bench overlap: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED


async def measure(
    rate_bytes_per_s: float, rounds: int, load_s: float, progress: Progress
) -> Figures:
    """All cases in turn, `rounds` times. Raises Unavailable, Corrupt."""
    from dualpath.bench.overlap.figures import Case, Figures  # noqa: PLC0415 - numpy behind it
    from dualpath.bench.overlap.scene import LAYER_BYTES, scene, shape_of  # noqa: PLC0415

    # What agents say about the filler that leaves is no news here.
    logging.getLogger("dualpath").setLevel(logging.ERROR)
    figures = Figures(rate_bytes_per_s, describe_machine(), time.strftime("%Y-%m-%d"))
    shapes = [shape_of(each, int(rate_bytes_per_s * load_s)) for each in LAYER_BYTES]
    async with scene(shapes, rate_bytes_per_s) as engines:
        cases = {
            Case(shape, part): engine
            for shape, engine in zip(shapes, engines, strict=True)
            for part in PARTS
        }
        for number in range(rounds):
            for case, engine in cases.items():
                run = await engine.run(case)
                figures.runs.setdefault(case, []).append(run)
                progress.say(
                    f"  round {number + 1}/{rounds} {case.shape.layer_bytes >> 10} KiB, compute "
                    f"{case.part:g} of the load: {run.overlapped_s:.2f} s"
                )
    return figures


def _tell(figures: Figures, args: argparse.Namespace) -> int:
    from dualpath.bench.overlap.figures import HEADINGS, lines, markdown, rows  # noqa: PLC0415

    print_table(HEADINGS, rows(figures), sys.stdout)
    print(*lines(figures), sep="\n", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(figures.to_json(), indent=2) + "\n", encoding="utf-8")
    if args.markdown:
        put_figures(Path(args.markdown), markdown(figures))
    return EXIT_MISSED if args.check and figures.misses() else EXIT_OK


command = OverlapBench()
