"""`dualpath bench cluster`: its flags, its exit status, what it prints and writes."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dualpath.bench.cluster.config import (
    LOAD_BYTES,
    LOADS_A_LINK,
    LONE_LOAD_BYTES,
    LONE_WIDTHS,
    POLICIES,
    ClusterBenchConfig,
)
from dualpath.bench.document import put_figures
from dualpath.bench.progress import Progress
from dualpath.bench.testbed.run_folder import make_run_folder
from dualpath.bench.testbed.scheduler_runs import add_scheduler_argument, scheduler_list
from dualpath.bench.testbed.topology import Topology
from dualpath.bench.testbed.workload import Context
from dualpath.cli.sizes import parse_rate
from dualpath.transfer.errors import DualPathError, InvalidRequest, Unavailable

if TYPE_CHECKING:
    from dualpath.bench.cluster.report import ClusterReport

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
FOLDER_PREFIX = "dualpath-cluster-"
_SAID = "dualpath bench cluster"

_EXAMPLES = """examples:
  dualpath bench cluster --prefill 1 --decode 2 --json out.json
  dualpath bench cluster --topology 1P1D,1P2D,2P1D,2P4D --policies direct,split
  dualpath bench cluster --prefill 1 --decode 2 --faults kill:decode1@5s,slow:decode0@8s:0.25
  dualpath bench cluster --prefill 1 --decode 1 --converged
  dualpath bench cluster --lone --prefill 1 --decode 2
  dualpath bench cluster --prefill 1 --decode 2 --policies direct,split --scheduler paper,split

faults: kill, stop, cut, slow or restore, of a node such as decode1 or of one of its links, such as
decode1.snic or prefill0.cnic, at a time; slow takes a factor. Needs root, `ip` and `tc`.

exit status: 0 every block arrived and was right; 1 a load failed or a byte was wrong, or with
--check a target was missed; 2 wrong usage
"""


class ClusterCommand:
    """One of the programs of `dualpath bench`."""

    name = "cluster"
    help = "a shaped cluster on one machine: how near to the limit of its links loads come"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flags; their defaults are ClusterBenchConfig's."""
        default = ClusterBenchConfig()
        parser.epilog = _EXAMPLES
        cluster = parser.add_argument_group("cluster")
        cluster.add_argument("--prefill", type=int, default=1, metavar="P", help="nodes (1)")
        cluster.add_argument("--decode", type=int, default=2, metavar="D", help="nodes (2)")
        cluster.add_argument(
            "--topology",
            metavar="LIST",
            help="several, one after another, such as 1P1D,1P2D; instead of the two above",
        )
        cluster.add_argument(
            "--snic",
            default="auto",
            metavar="RATE",
            help="of each node's storage link, such as 20MB/s (auto: at most 50MB/s, less where "
            "the links would not be what binds); 10MB/s,5MB/s: of each of its two",
        )
        cluster.add_argument(
            "--cnic",
            default="auto",
            metavar="RATE",
            help="of each compute link (auto: a node's together are 8 times its storage link)",
        )
        cluster.add_argument(
            "--gpus",
            type=int,
            metavar="G",
            help=f"compute links a node, an engine at each (1; --lone: {max(LONE_WIDTHS)})",
        )
        cluster.add_argument(
            "--converged",
            action="store_true",
            help="one NIC a node for both networks; engines with memory that is not behind it",
        )
        cluster.add_argument("--data", default="", metavar="DIR", help="of the store (temporary)")
        self._add_work_arguments(parser, default)

    @staticmethod
    def _add_work_arguments(parser: argparse.ArgumentParser, default: ClusterBenchConfig) -> None:
        work = parser.add_argument_group("work")
        work.add_argument(
            "--policies",
            default=",".join(POLICIES),
            metavar="LIST",
            help=f"of {', '.join(POLICIES)} (default: all)",
        )
        add_scheduler_argument(work)
        work.add_argument("--rounds", type=int, default=default.rounds, metavar="N", help="(3)")
        work.add_argument(
            "--seconds",
            type=float,
            default=default.seconds,
            metavar="S",
            help=f"what the direct policy shall need for a round ({default.seconds:g})",
        )
        work.add_argument(
            "--load-mib",
            type=float,
            metavar="N",
            help=f"mean size of a load ({LOAD_BYTES >> 20}; --lone: {LONE_LOAD_BYTES >> 20})",
        )
        work.add_argument(
            "--concurrency",
            type=int,
            default=default.concurrency,
            metavar="N",
            help=f"loads in flight (default: {LOADS_A_LINK} for each storage link)",
        )
        work.add_argument(
            "--context",
            choices=[each.value for each in Context],
            default=default.context.value,
            help="row of the paper's table for the spread of the loads' sizes (64k)",
        )
        work.add_argument("--seed", type=int, default=default.seed, metavar="N", help="(1)")
        work.add_argument(
            "--lone",
            action="store_true",
            help=f"single loads into engines of {', '.join(map(str, LONE_WIDTHS))} GPUs instead",
        )
        work.add_argument(
            "--no-hand-off",
            action="store_true",
            help="loads only: prompts do not go on to their decode engines",
        )
        work.add_argument("--faults", default="", metavar="LIST", help="see below")
        out = parser.add_argument_group("output")
        out.add_argument("--json", default="", metavar="FILE", help="write the result as JSON")
        out.add_argument("--plot", default="", metavar="FILE", help="picture, as PNG")
        out.add_argument(
            "--markdown",
            default="",
            metavar="FILE[#MARK]",
            help="put the tables into a document, between its marks MARK (measured)",
        )
        out.add_argument("--check", action="store_true", help="missed targets fail (exit 1)")

    def run(self, args: argparse.Namespace) -> int:
        """Run it; return the exit status."""
        folder: Path | None = None
        try:
            config = config_of(args)
            folder = make_run_folder(FOLDER_PREFIX)
            report = asyncio.run(_run(config, folder, Progress()))
        except InvalidRequest as error:
            print(f"{_SAID}: {error}", file=sys.stderr)
            return EXIT_USAGE
        except DualPathError as error:
            print(f"{_SAID}: {error.reason}: {error}", file=sys.stderr)
            return EXIT_FAILED
        except (KeyboardInterrupt, asyncio.CancelledError):
            print(f"{_SAID}: interrupted; everything was removed", file=sys.stderr)
            return EXIT_INTERRUPTED
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        return _write(args, report)


def config_of(args: argparse.Namespace) -> ClusterBenchConfig:
    """Read the flags. Raises InvalidRequest."""
    topologies = [(args.prefill, args.decode)]
    if args.topology is not None:
        labels = [label for label in args.topology.split(",") if label.strip()]
        topologies = [Topology.parse(label) for label in labels]
    snics = [] if args.snic == "auto" else [_rate("--snic", each) for each in args.snic.split(",")]
    gpus, load_bytes = (max(LONE_WIDTHS), LONE_LOAD_BYTES) if args.lone else (1, LOAD_BYTES)
    return ClusterBenchConfig(
        topologies=tuple(topologies),
        snic_bytes_per_s=snics[0] if snics else 0.0,
        further_snics=tuple(snics[1:]),
        cnic_bytes_per_s=0.0 if args.cnic == "auto" else _rate("--cnic", args.cnic),
        gpus=gpus if args.gpus is None else args.gpus,
        converged=args.converged,
        lone=args.lone,
        hand_off=not args.no_hand_off,
        policies=tuple(name.strip() for name in args.policies.split(",") if name.strip()),
        schedulers=scheduler_list(args.scheduler),
        rounds=args.rounds,
        seconds=args.seconds,
        load_bytes=load_bytes if args.load_mib is None else round(args.load_mib * (1 << 20)),
        concurrency=args.concurrency,
        context=Context(args.context),
        faults=args.faults,
        seed=args.seed,
        data=args.data,
    )


def _rate(flag: str, text: str) -> float:
    """Of a link; 0, which elsewhere means that there is no limit, is refused."""
    rate = parse_rate(text)
    if not rate:
        raise InvalidRequest(f"{flag} {text}: a link has a rate, such as 20MB/s, or is auto")
    return rate


async def _run(config: ClusterBenchConfig, folder: Path, progress: Progress) -> ClusterReport:
    # Imported here: `dualpath bench --help` must not pay for gRPC and numpy.
    from dualpath.bench.cluster.benchmark import ClusterBenchmark  # noqa: PLC0415

    # SIGINT cancels the main task by itself; SIGTERM shall clean up the same way.
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await ClusterBenchmark(config, folder, progress).run()
    except BaseExceptionGroup as group:
        # What a task group wraps is one failure for the user: the first.
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from group


def _write(args: argparse.Namespace, report: ClusterReport) -> int:
    from dualpath.bench.cluster.plot import draw  # noqa: PLC0415
    from dualpath.bench.cluster.table import markdown, print_report  # noqa: PLC0415
    from dualpath.bench.cluster.targets import judge  # noqa: PLC0415

    print_report(report, sys.stdout)
    missed = any(each.met is False for each in judge(report))
    status = EXIT_OK if report.ok and not (args.check and missed) else EXIT_FAILED
    try:
        if args.json:
            text = json.dumps(report.to_json(), indent=2)
            Path(args.json).write_text(text + "\n", encoding="utf-8")
        if args.markdown:
            path, _, mark = args.markdown.partition("#")
            put_figures(Path(path), markdown(report), mark or "measured")
        if args.plot:
            draw(report, args.plot)
    except (OSError, InvalidRequest, Unavailable) as error:
        print(f"{_SAID}: {error}", file=sys.stderr)
        status = EXIT_FAILED
    return status


command = ClusterCommand()
