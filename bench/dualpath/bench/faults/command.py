"""`dualpath bench faults`: random faults over real processes, with a verdict.

Prints its seed and what was found; exit code 1 if anything that must never happen has happened.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dualpath.bench.cluster.fault import Fault, parse_faults
from dualpath.bench.progress import Progress
from dualpath.bench.testbed.namespaces import why_not_kernel
from dualpath.bench.testbed.run_folder import make_run_folder
from dualpath.bench.testbed.topology import Topology
from dualpath.transfer.errors import DualPathError, InvalidRequest, Unavailable

if TYPE_CHECKING:
    from dualpath.bench.faults.report import FaultsReport

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
ROUNDS_MAX = 100_000
SECONDS_MAX = 600.0
FOLDER_PREFIX = "dualpath-faults-"
_SAID = "dualpath bench faults"

_EXAMPLES = """examples:
  dualpath bench faults --json out.json                200 schedules, about a quarter of an hour
  dualpath bench faults --rounds 10
  dualpath bench faults --seed 7 --round 42            that one again, alone
  dualpath bench faults --rounds 5 --faults kill:decode0@0.2s,stop:storage@0.3s,restore:storage@1s

Faults as of `dualpath bench cluster`, but of every node: the agents of prefill nodes and the
daemon, on the node `storage`, can be killed and stopped as well. Needs root, `ip` and `tc`.

exit status: 0 all held; 1 something broke: the seed, the schedule and what was wrong; 2 wrong usage
"""


class FaultsCommand:
    """One of the programs of `dualpath bench`."""

    name = "faults"
    help = "random faults over real processes: how every load ends, and what is left behind"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flags."""
        parser.epilog = _EXAMPLES
        add = parser.add_argument
        add("--rounds", type=int, default=200, metavar="N", help="schedules of faults (200)")
        add("--seed", type=int, default=0, metavar="N", help="0: draw one")
        add("--round", type=int, default=-1, metavar="K", help="only this one of the seed's")
        add("--faults", metavar="LIST", help="these in every round, not random ones")
        add("--seconds", type=float, default=1.5, metavar="S", help="of faults in a round (1.5)")
        add("--prefill", type=int, default=1, metavar="P", help="nodes (1)")
        add("--decode", type=int, default=2, metavar="D", help="nodes (2)")
        add("--fresh", type=int, default=50, metavar="N", help="rounds of one cluster (50)")
        add("--json", default="", metavar="FILE", help="write the result as JSON")

    def run(self, args: argparse.Namespace) -> int:
        """Run the rounds; return the exit status."""
        folder: Path | None = None
        try:
            topology = _checked(args)
            folder = make_run_folder(FOLDER_PREFIX)
            report = asyncio.run(_run(args, topology, folder))
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
        print("\n".join(report.lines()))
        if args.json:
            try:
                text = json.dumps(report.to_json(), indent=2)
                Path(args.json).write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                print(f"{_SAID}: {error}", file=sys.stderr)
                return EXIT_FAILED
        return EXIT_OK if report.ok else EXIT_FAILED


def _checked(args: argparse.Namespace) -> Topology:
    """Raises InvalidRequest."""
    for flag, value, low, high in (
        ("--rounds", args.rounds, 1, ROUNDS_MAX),
        ("--seed", args.seed, 0, 1 << 62),
        ("--round", args.round, -1, ROUNDS_MAX),
        ("--seconds", args.seconds, 0.1, SECONDS_MAX),
        ("--fresh", args.fresh, 1, ROUNDS_MAX),
    ):
        if not low <= value <= high:
            raise InvalidRequest(f"{flag} must lie in {low:g}..{high:g}, not {value:g}")
    if args.round >= 0 and not args.seed:
        raise InvalidRequest(f"--round {args.round} of which seed? Add --seed")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise InvalidRequest(f"{args.json}: there is no folder {Path(args.json).parent}")
    topology = Topology.of(args.prefill, args.decode)
    _given(args, topology)
    return topology


def _given(args: argparse.Namespace, topology: Topology) -> tuple[Fault, ...]:
    """The faults of every round; none: random ones. Raises InvalidRequest."""
    if args.faults is None:
        return ()
    return parse_faults(args.faults, topology, everywhere=True)


async def _run(args: argparse.Namespace, topology: Topology, folder: Path) -> FaultsReport:
    # Imported here: `dualpath bench --help` must not pay for gRPC and numpy.
    from dualpath.bench.faults.campaign import Campaign  # noqa: PLC0415

    reason = why_not_kernel()
    if reason:
        raise Unavailable(f"the kernel cannot shape links here: {reason}")
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    campaign = Campaign(
        topology,
        folder,
        Progress(),
        seed=args.seed or 1 + secrets.randbits(31),
        seconds=args.seconds,
        fresh=args.fresh,
        faults=_given(args, topology),
    )
    numbers = range(args.round, args.round + 1) if args.round >= 0 else range(args.rounds)
    started_s = time.monotonic()
    report = await campaign.run(numbers)
    report.elapsed_s = time.monotonic() - started_s
    return report


command = FaultsCommand()
