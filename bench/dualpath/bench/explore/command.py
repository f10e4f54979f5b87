"""The program `dualpath bench explore`: its flags, its exit status, what it prints and writes."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dualpath.bench.progress import Progress
from dualpath.transfer.errors import InvalidRequest

if TYPE_CHECKING:
    from dualpath.bench.explore.schedules import Tally

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

_EPILOG = """examples:
  dualpath bench explore                               one delay and one fault, anywhere
  dualpath bench explore --delays 2 --faults 2 --seconds 600 --seed 7
  dualpath bench explore --hand-off --retain --delays 2 --faults 2 --seconds 600
  dualpath bench explore --blocks 3 --relays 2 --policy shorter-queue
  dualpath bench explore --schedule 4:2,9:f11          play one again, event by event

A load and its relays are the real ones; messages, writes, time and faults come in every order that
differs from the natural one in at most so many places. What must hold: nothing wrong ever counts,
nothing lands in memory that is used again, no two writes share bytes, every load ends by its
deadline with a fitting reason, one fault costs no block, and nothing is left behind.

exit status: 0 all held; 1 something broke: the schedule and what happened; 2 wrong usage
"""


class ExploreBench:
    """See the module docstring."""

    name = "explore"
    help = "every order of messages, writes and faults of a small load, as far as asked"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flags."""
        parser.epilog = _EPILOG
        add = parser.add_argument
        add("--blocks", type=int, default=2, metavar="N", help="of the load (default 2)")
        add("--relays", type=int, default=1, metavar="N", help="decode nodes (default 1)")
        add("--policy", default="split", metavar="NAME", help="placement policy (default split)")
        add("--retain", action="store_true", help="the first relay keeps what it relays")
        add("--hand-off", action="store_true", help="a hand-off and its receive, not a load")
        add("--delays", type=int, default=1, metavar="N", help="most reorderings (default 1)")
        add("--faults", type=int, default=1, metavar="N", help="most faults (default 1)")
        add("--seconds", type=float, default=math.inf, metavar="S", help="stop then (default: no)")
        add("--runs", type=float, default=math.inf, metavar="N", help="stop then (default: no)")
        add("--seed", type=int, default=0, metavar="N", help="which of them, if not all fit")
        add("--schedule", default="", metavar="LIST", help="play this one and print what happens")
        add("--json", default="", metavar="FILE", help="write the counts as JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Explore; return the exit status."""
        from dualpath.bench.explore.schedules import Broken  # noqa: PLC0415 - numpy, gRPC behind it

        try:
            return _play(args) if args.schedule else _explore(args)
        except InvalidRequest as error:
            print(f"dualpath bench explore: {error}", file=sys.stderr)
            return EXIT_USAGE
        except Broken as broken:
            print(broken)
            return EXIT_FAILED
        except OSError as error:
            print(f"dualpath bench explore: {args.json}: {error.strerror}", file=sys.stderr)
            return EXIT_FAILED
        except KeyboardInterrupt:
            print("dualpath bench explore: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED


def _play(args: argparse.Namespace) -> int:
    from dualpath.bench.explore.schedules import parse_schedule, play  # noqa: PLC0415
    from dualpath.bench.explore.stage import StageConfig  # noqa: PLC0415

    config = StageConfig(args.blocks, args.relays, args.policy, args.retain, args.hand_off)
    for number, line in enumerate(play(config, parse_schedule(args.schedule))):
        print(f"{number:4} {line}")
    return EXIT_OK


def _explore(args: argparse.Namespace) -> int:
    from dualpath.bench.explore.schedules import Bounds, explore  # noqa: PLC0415
    from dualpath.bench.explore.stage import StageConfig  # noqa: PLC0415

    config = StageConfig(args.blocks, args.relays, args.policy, args.retain, args.hand_off)
    bounds = Bounds(
        delays=args.delays,
        faults=args.faults,
        seconds=args.seconds,
        runs=args.runs,
        seed=args.seed,
    )
    progress = Progress()
    progress.stage(f"{args.blocks} blocks, {args.relays} relays, {args.policy}")
    began_s = time.monotonic()

    def show(tally: Tally) -> None:
        ended = tally.runs / (tally.runs + tally.waiting)
        spent = (time.monotonic() - began_s) / bounds.seconds
        progress.move(max(ended, spent, tally.runs / bounds.runs), f"{tally.runs} schedules")

    tally = explore(config, bounds, show)
    progress.done(f"{tally.runs} schedules")
    extent = "all" if tally.whole else "some"
    print(
        f"{tally.runs} schedules, {tally.steps} events: {extent} with at most {args.delays} delays "
        f"and {args.faults} faults; everything held"
    )
    print("in so many: " + ", ".join(f"{name} {n}" for name, n in tally.events.most_common()))
    if args.json:
        figures: dict[str, object] = {
            "runs": tally.runs,
            "events": tally.steps,
            "whole": tally.whole,
        }
        figures["in_runs"] = dict(tally.events)
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return EXIT_OK


command = ExploreBench()
