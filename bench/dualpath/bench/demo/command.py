"""The subcommand `dualpath demo`: its flags, its exit status, what it prints and writes."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dualpath.bench.demo.config import (
    POLICIES,
    DemoConfig,
    Destination,
    Shaping,
    parse_rate,
)
from dualpath.bench.progress import Progress
from dualpath.bench.testbed.scheduler_runs import add_scheduler_argument, scheduler_list
from dualpath.bench.testbed.workload import Context
from dualpath.transfer.errors import DualPathError, InvalidRequest, Unavailable

if TYPE_CHECKING:
    from dualpath.bench.demo.report import DemoReport

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_EXAMPLES = """examples:
  dualpath demo                                      table and picture of the default cluster
  dualpath demo --prefill 1 --decode 1 --json out.json
  dualpath demo --concurrency 1                      one load at a time: latency, not throughput
  dualpath demo --concurrency 1 --compute-ratio 1    where a second path gains nothing
  dualpath demo --policies direct,split --scheduler  requests beside go through `dualpath scheduler`
  dualpath demo --trace sessions.jsonl.gz --sessions 20

exit status: 0 every block arrived and was right (also when the processor was the limit, which is
said); 1 a load failed, a byte was wrong or the cluster could not run; 2 wrong usage
"""


class DemoCommand:
    """Loaded by the CLI through the entry-point group `dualpath.commands`."""

    name = "demo"
    help = "start a small cluster with limited links and measure what the second path adds"
    epilog = _EXAMPLES

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flags; their defaults are DemoConfig's."""
        parser.epilog = _EXAMPLES
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        default = DemoConfig()
        cluster = parser.add_argument_group("cluster")
        cluster.add_argument(
            "--prefill",
            type=int,
            default=default.prefill,
            metavar="N",
            help=f"prefill nodes (default {default.prefill})",
        )
        cluster.add_argument(
            "--decode",
            type=int,
            default=default.decode,
            metavar="N",
            help=f"decode nodes (default {default.decode})",
        )
        cluster.add_argument(
            "--storage-rate",
            default="auto",
            metavar="RATE",
            help="of each node's storage link, such as 50MB/s or 400Mbit/s (default auto: 50MB/s, "
            "less where this machine is too slow for the links to be what binds)",
        )
        cluster.add_argument(
            "--compute-ratio",
            type=float,
            default=default.compute_ratio,
            metavar="X",
            help="rate of a compute link as a multiple of a storage link's (default 8)",
        )
        cluster.add_argument(
            "--destination",
            choices=[each.value for each in Destination],
            default=default.destination.value,
            help="gpu: memory behind the compute link, which every byte crosses; host: not",
        )
        cluster.add_argument(
            "--shaping",
            choices=[each.value for each in Shaping],
            default=default.shaping.value,
            help="kernel: namespaces and HTB (root); pacing: token buckets (default: auto)",
        )
        cluster.add_argument("--data", default="", metavar="DIR", help="of the store (temporary)")
        cluster.add_argument("--keep", action="store_true", help="leave store and logs in place")
        self._add_workload_arguments(parser, default)

    @staticmethod
    def _add_workload_arguments(parser: argparse.ArgumentParser, default: DemoConfig) -> None:
        work = parser.add_argument_group("workload and output")
        work.add_argument(
            "--policies",
            default=",".join(POLICIES),
            metavar="LIST",
            help=f"of {', '.join(POLICIES)}; separated by commas (default: all)",
        )
        add_scheduler_argument(work)
        work.add_argument(
            "--concurrency",
            type=int,
            default=default.concurrency,
            metavar="N",
            help=f"sessions at once (default {default.concurrency}); 1: lone, larger loads",
        )
        work.add_argument(
            "--sessions", type=int, default=0, metavar="N", help="default: twice the concurrency"
        )
        work.add_argument("--trace", default="", metavar="FILE", help="replay this, plain or .gz")
        work.add_argument(
            "--context",
            choices=[each.value for each in Context],
            default=default.context.value,
            help="generated sessions: row of the paper's table (default 64k)",
        )
        work.add_argument(
            "--budget-mib",
            type=int,
            default=0,
            metavar="N",
            help="what each policy loads (default 0: enough for the links to settle)",
        )
        work.add_argument(
            "--seed", type=int, default=default.seed, metavar="N", help="of sessions and bytes"
        )
        work.add_argument("--json", default="", metavar="FILE", help="write the result as JSON")
        work.add_argument(
            "--plot",
            default="dualpath-demo.png",
            metavar="FILE",
            help='picture of the links over time (default dualpath-demo.png; "" for none)',
        )

    def run(self, args: argparse.Namespace) -> int:
        """Run the demo; return the exit status."""
        progress = Progress()
        try:
            config = self._config(args)
            report = asyncio.run(_run(config, progress))
        except InvalidRequest as error:
            print(f"dualpath demo: {error}", file=sys.stderr)
            return EXIT_USAGE
        except DualPathError as error:
            print(f"dualpath demo: {error.reason}: {error}", file=sys.stderr)
            return EXIT_FAILED
        except (KeyboardInterrupt, asyncio.CancelledError):
            print("dualpath demo: interrupted; everything was removed", file=sys.stderr)
            return EXIT_INTERRUPTED
        from dualpath.bench.demo.table import print_report  # noqa: PLC0415 - numpy, gRPC behind it

        print_report(report)
        return self._write(config, report)

    @staticmethod
    def _config(args: argparse.Namespace) -> DemoConfig:
        return DemoConfig(
            prefill=args.prefill,
            decode=args.decode,
            policies=tuple(name.strip() for name in args.policies.split(",") if name.strip()),
            schedulers=scheduler_list(args.scheduler),
            concurrency=args.concurrency,
            sessions=args.sessions,
            trace=args.trace,
            context=Context(args.context),
            storage_bytes_per_s=0.0
            if args.storage_rate == "auto"
            else parse_rate(args.storage_rate),
            compute_ratio=args.compute_ratio,
            destination=Destination(args.destination),
            budget_bytes=args.budget_mib * (1 << 20),
            shaping=Shaping(args.shaping),
            seed=args.seed,
            json=args.json,
            plot=args.plot,
            data=args.data,
            keep=args.keep,
        )

    @staticmethod
    def _write(config: DemoConfig, report: DemoReport) -> int:
        status = EXIT_OK if report.ok else EXIT_FAILED
        if config.json:
            try:
                text = json.dumps(report.to_json(), indent=2)
                Path(config.json).write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                print(f"dualpath demo: {config.json}: {error.strerror}", file=sys.stderr)
                status = EXIT_FAILED
        if config.plot:
            from dualpath.bench.demo.plot import draw_utilisation  # noqa: PLC0415 - slow import

            try:
                draw_utilisation(report, config.plot)
                print(f"picture: {config.plot}")
            except Unavailable as error:
                print(f"dualpath demo: {error}", file=sys.stderr)
        return status


async def _run(config: DemoConfig, progress: Progress) -> DemoReport:
    # Imported here: `dualpath --help` must not pay for gRPC and numpy.
    from dualpath.bench.demo.demonstration import Demonstration  # noqa: PLC0415

    # SIGINT cancels the main task by itself; SIGTERM shall clean up the same way.
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await Demonstration(config, progress).run()
    except BaseExceptionGroup as group:
        # What a task group wraps is one failure for the user: the first.
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from group


command = DemoCommand()
