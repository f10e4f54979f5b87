"""The program `dualpath bench scheduler`: its flags, its exit status, what it prints and writes."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from pathlib import Path

from dualpath.bench.document import put_figures
from dualpath.bench.machine import describe_machine
from dualpath.bench.progress import Progress
from dualpath.bench.scheduler.edge import EdgeFigures, measure_edge
from dualpath.bench.scheduler.measurement import Figures, measure
from dualpath.bench.scheduler.report import Report, markdown, print_report
from dualpath.bench.scheduler.shape import Shape
from dualpath.scheduler.policies import POLICIES
from dualpath.transfer.errors import DualPathError, InvalidRequest

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
TIMES_MAX = 100
GRPC_MAX = 10_000_000
DEFAULT_POLICIES = "paper,split,aware"

_EPILOG = """examples:
  dualpath bench scheduler                             1,152 GPUs in 144 nodes, and ten times that
  dualpath bench scheduler --json out.json --times 1
  dualpath bench scheduler --policies paper --prefill 2 --decode 4 --rate 2000
  dualpath bench scheduler --policies split --times 1 --grpc 100000

One core decides for a cluster under a virtual clock. Counted is the time in the scheduler from a
request's submission to its end, reports included, by the clock and on the processor; not counted
are messages on the network: --grpc passes requests through the service. A fetch is a group's report
and the fetch that goes with it. Measured on this machine.

exit status: 0 measured; 1 the service failed or a file could not be written; 2 wrong usage
"""


class SchedulerBench:
    """See the module docstring."""

    name = "scheduler"
    help = "how many requests a second the scheduler decides, and how long one fetch takes"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flags."""
        parser.epilog = _EPILOG
        shape, add = Shape(), parser.add_argument
        add(
            "--policies",
            default=DEFAULT_POLICIES,
            metavar="LIST",
            help=f"of {', '.join(POLICIES)} (default {DEFAULT_POLICIES})",
        )
        add(
            "--times",
            default="1,10",
            metavar="LIST",
            help="sizes: so many times the nodes, the rate unchanged (default 1,10)",
        )
        for name, text in (
            ("prefill", "prefill nodes"),
            ("decode", "decode nodes"),
            ("gpus", "engines a node"),
            ("prefill_group", "nodes a prefill group"),
            ("decode_group", "nodes a decode group"),
            ("rate", "requests a second that arrive"),
            ("seconds", "virtual seconds that are measured"),
            ("interval_s", "virtual seconds between a group's fetches"),
            ("seed", "of the requests' lengths"),
        ):
            value = getattr(shape, name)
            add(
                "--" + name.replace("_", "-"),
                type=type(value),
                default=value,
                metavar="N",
                help=f"{text} (default {value:g})",
            )
        add(
            "--grpc",
            type=int,
            default=0,
            metavar="N",
            help="pass N requests of each policy through the service as well, at the first size",
        )
        add("--json", default="", metavar="FILE", help="write the figures as JSON")
        add(
            "--markdown",
            default="",
            metavar="FILE[#MARK]",
            help="put the tables into a document, between its marks MARK (measured)",
        )

    def run(self, args: argparse.Namespace) -> int:
        """Measure; return the exit status."""
        try:
            machine = describe_machine()
            figures = _measure(args)
            edges = _measure_edges(args)
        except InvalidRequest as error:
            print(f"dualpath bench scheduler: {error}", file=sys.stderr)
            return EXIT_USAGE
        except DualPathError as error:
            print(f"dualpath bench scheduler: {error.reason}: {error}", file=sys.stderr)
            return EXIT_FAILED
        except KeyboardInterrupt:
            print("dualpath bench scheduler: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        report = Report.now(figures, edges, machine)
        print_report(report, sys.stdout)
        return _write(args, report)


def _write(args: argparse.Namespace, report: Report) -> int:
    try:
        if args.json:
            text = json.dumps(report.to_json(), indent=2) + "\n"
            Path(args.json).write_text(text, encoding="utf-8")
        if args.markdown:
            path, _, mark = args.markdown.partition("#")
            put_figures(Path(path), markdown(report), mark or "measured")
    except (OSError, InvalidRequest) as error:
        print(f"dualpath bench scheduler: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


def _shape(args: argparse.Namespace) -> Shape:
    flags = [field.name for field in dataclasses.fields(Shape) if hasattr(args, field.name)]
    return Shape(**{name: getattr(args, name) for name in flags})


def _policies(args: argparse.Namespace) -> list[str]:
    policies = [text.strip() for text in args.policies.split(",") if text.strip()]
    for name in policies:
        if name not in POLICIES:
            raise InvalidRequest(
                f"--policies names '{name}', which is none; give some of {', '.join(POLICIES)}"
            )
    if not policies:
        raise InvalidRequest(f"--policies is empty; give some of {', '.join(POLICIES)}")
    if not 0 <= args.grpc <= GRPC_MAX:
        raise InvalidRequest(f"--grpc is {args.grpc}; give 0 to {GRPC_MAX} requests")
    return policies


def _measure_edges(args: argparse.Namespace) -> list[EdgeFigures]:
    """The service at the first size, if it is asked for."""
    shape, times = _shape(args), _times(args.times)[0]
    sized = dataclasses.replace(shape, prefill=shape.prefill * times, decode=shape.decode * times)
    say = Progress().say
    return [
        asyncio.run(measure_edge(sized, policy, args.grpc, say))
        for policy in (_policies(args) if args.grpc else ())
    ]


def _measure(args: argparse.Namespace) -> list[Figures]:
    shape, policies = _shape(args), _policies(args)
    progress, found = Progress(), []
    for times in _times(args.times):
        sized = dataclasses.replace(
            shape, prefill=shape.prefill * times, decode=shape.decode * times
        )
        found += [measure(sized, policy, progress.say) for policy in policies]
    return found


def _times(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or not all(1 <= times <= TIMES_MAX for times in found):
        raise InvalidRequest(
            f"--times {text!r}: give whole numbers from 1 to {TIMES_MAX}, as in 1,10"
        )
    return found


command = SchedulerBench()
