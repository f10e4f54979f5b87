"""The program `dualpath bench eviction`: its flags, its exit status, what it prints and writes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dualpath.bench.document import put_figures
from dualpath.bench.progress import Progress
from dualpath.transfer.errors import DualPathError, InvalidRequest

if TYPE_CHECKING:
    from dualpath.bench.eviction.replay import EvictionConfig, EvictionReport

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

_EPILOG = """examples:
  dualpath bench eviction                              generated sessions, both policies
  dualpath bench eviction --trace FILE --json out.json --plot out.png
  dualpath bench eviction --trace FILE --capacities 0.1,200000 --sessions 40
  dualpath bench eviction --trace FILE --tier dram     copies in DRAM of blocks that stay on SSD

The policies are the store's own. Their hit rates stand beside the optimum, a bound: what Belady's
MIN would hit, knowing the future. A trace is a file of `runs` or `hash_ids`, plain or gzip.

exit status: 0 replayed; 1 a file could not be written; 2 wrong usage, or a trace that is none
"""


class EvictionBench:
    """See the module docstring."""

    name = "eviction"
    help = "replay a trace through the eviction policies and print their hit rates"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flags."""
        parser.epilog = _EPILOG
        add = parser.add_argument
        add("--trace", default="", metavar="FILE", help="default: generated sessions")
        add("--policies", default="", metavar="LIST", help="default: all (s3-fifo,lru)")
        add(
            "--capacities",
            default="",
            metavar="LIST",
            help="shares of the trace's distinct blocks, or counts of blocks above 1 "
            "(default 0.02,0.05,0.1,0.2,0.4)",
        )
        add("--tier", choices=("ssd", "dram"), default="ssd", help="what may leave (default ssd)")
        add(
            "--concurrency",
            type=int,
            default=64,
            metavar="N",
            help="sessions at a time, where each has a clock of its own (default 64)",
        )
        add("--sessions", type=int, default=0, metavar="N", help="replay so many (default: all)")
        add("--seed", type=int, default=0, metavar="N", help="of the order, and of generated ones")
        add("--json", default="", metavar="FILE", help="write the figures as JSON")
        add(
            "--plot",
            nargs="?",
            const="dualpath-eviction.png",
            default="",
            metavar="FILE",
            help="draw them as PNG (default name dualpath-eviction.png)",
        )
        add("--markdown", default="", metavar="FILE", help="put the table into a document")
        add("--mark", default="measured", metavar="NAME", help="place in that document")

    def run(self, args: argparse.Namespace) -> int:
        """Replay; return the exit status."""
        from dualpath.bench.eviction.replay import replay  # noqa: PLC0415 - numpy behind it

        try:
            report = replay(_config(args), Progress())
        except InvalidRequest as error:
            print(f"dualpath bench eviction: {error}", file=sys.stderr)
            return EXIT_USAGE
        except KeyboardInterrupt:
            print("dualpath bench eviction: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        return _tell(report, args)


def _config(args: argparse.Namespace) -> EvictionConfig:
    from dualpath.bench.eviction.prefix_cache import TierKind  # noqa: PLC0415
    from dualpath.bench.eviction.replay import CAPACITIES, EvictionConfig  # noqa: PLC0415
    from dualpath.kvstore.eviction_choice import POLICIES  # noqa: PLC0415

    try:
        capacities = tuple(float(text) for text in args.capacities.split(",") if text.strip())
    except ValueError as error:
        raise InvalidRequest(f"--capacities {args.capacities!r}: {error}") from error
    return EvictionConfig(
        trace=args.trace,
        policies=tuple(text.strip() for text in args.policies.split(",") if text.strip())
        or tuple(POLICIES),
        capacities=capacities or CAPACITIES,
        tier=TierKind(args.tier),
        concurrency=args.concurrency,
        sessions=args.sessions,
        seed=args.seed,
    )


def _tell(report: EvictionReport, args: argparse.Namespace) -> int:
    from dualpath.bench.eviction.table import markdown, print_report  # noqa: PLC0415

    print_report(report)
    status = EXIT_OK
    try:
        if args.json:
            text = json.dumps(report.to_json(), indent=2) + "\n"
            Path(args.json).write_text(text, encoding="utf-8")
        if args.markdown:
            put_figures(Path(args.markdown), markdown(report), args.mark)
    except (OSError, InvalidRequest) as error:
        print(f"dualpath bench eviction: {error}", file=sys.stderr)
        status = EXIT_FAILED
    if args.plot:
        from dualpath.bench.eviction.plot import draw  # noqa: PLC0415 - slow import

        try:
            draw(report, args.plot)
            print(f"picture: {args.plot}")
        except DualPathError as error:
            print(f"dualpath bench eviction: {error}", file=sys.stderr)
            status = EXIT_FAILED
    return status


command = EvictionBench()
