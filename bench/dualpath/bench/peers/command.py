"""The program `dualpath bench peers`: its flags, its exit status, what it prints and writes."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dualpath.bench.document import put_figures
from dualpath.bench.machine import describe_machine, describe_storage, describe_versions
from dualpath.bench.peers.catalogue import ENTRIES, chosen
from dualpath.bench.progress import Progress
from dualpath.transfer.errors import DualPathError, InvalidRequest

if TYPE_CHECKING:
    from dualpath.bench.peers.report import PeersReport

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
SIZES = {"64K": 64 << 10, "256K": 256 << 10, "1M": 1 << 20, "4M": 4 << 20}

_EPILOG = """examples:
  dualpath bench peers --install                 everything; installs the peers the first time
  dualpath bench peers --only dualpath-tcp,mooncake-tcp,redhare-tcp --blocks 1M,4M
  dualpath bench peers --mib 512 --piece 256     a put or get moves 256 MiB at once
  dualpath bench peers --mib 64 --rounds 1       tries everything with little data

Each peer runs in an environment of its own below --environments, pinned versions, only on loopback.
What cannot be installed or does not run is skipped, with the reason.

exit status: 0 ours ran and every byte that came back was right; 1 not so; 2 wrong usage
"""


class PeersBench:
    """See the module docstring."""

    name = "peers"
    help = "put other KV stores and this one through the same work"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flags."""
        parser.epilog = _EPILOG
        parser.add_argument("--mib", type=int, default=512, metavar="N", help="working set (512)")
        parser.add_argument(
            "--piece", type=int, default=64, metavar="N", help="MiB of one put or get (64)"
        )
        parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default 5")
        parser.add_argument(
            "--blocks", default=",".join(SIZES), metavar="LIST", help="of " + ", ".join(SIZES)
        )
        parser.add_argument(
            "--only",
            default="",
            metavar="LIST",
            help="of " + ", ".join(entry.name for entry in ENTRIES),
        )
        parser.add_argument("--install", action="store_true", help="install what is missing")
        parser.add_argument(
            "--environments", default=".venv-peers", metavar="DIR", help="default .venv-peers"
        )
        parser.add_argument("--data", default=".", metavar="DIR", help="the disk to measure (.)")
        parser.add_argument("--json", default="", metavar="FILE", help="write the figures as JSON")
        parser.add_argument("--plot", default="", metavar="FILE", help="draw them as PNG")
        parser.add_argument(
            "--markdown", default="", metavar="FILE", help="put tables into a document"
        )

    def run(self, args: argparse.Namespace) -> int:
        """Measure; return the exit status."""
        try:
            report = _measured(args, Progress())
        except InvalidRequest as error:
            print(f"dualpath bench peers: {error}", file=sys.stderr)
            return EXIT_USAGE
        except OSError as error:
            print(f"dualpath bench peers: {error}", file=sys.stderr)
            return EXIT_FAILED
        except KeyboardInterrupt:
            print("dualpath bench peers: interrupted; the data was removed", file=sys.stderr)
            return EXIT_INTERRUPTED
        return _tell(report, args)


def _measured(args: argparse.Namespace, progress: Progress) -> PeersReport:
    from dualpath.bench.peers.comparison import Comparison  # noqa: PLC0415 - slow imports
    from dualpath.bench.peers.environments import Environments  # noqa: PLC0415
    from dualpath.bench.peers.report import PeersReport  # noqa: PLC0415

    try:
        entries = chosen([name.strip() for name in args.only.split(",") if name.strip()])
    except KeyError as error:
        raise InvalidRequest(f"--only: no entry {error}") from error
    names = [name.strip().upper() for name in args.blocks.split(",") if name.strip()]
    unknown = [name for name in names if name not in SIZES]
    if unknown or not names:
        raise InvalidRequest(f"--blocks: {unknown or 'nothing'} is not of {', '.join(SIZES)}")
    if args.piece < 16 or args.piece % 4:
        raise InvalidRequest(f"--piece must be at least 16 and a multiple of 4, not {args.piece}")
    if args.mib < args.piece or args.mib % args.piece:
        raise InvalidRequest(f"--mib must be a multiple of --piece ({args.piece}), not {args.mib}")
    if args.rounds < 1:
        raise InvalidRequest(f"--rounds must be positive, not {args.rounds}")
    sizes = [SIZES[name] for name in names]
    with tempfile.TemporaryDirectory(prefix="dualpath-peers-", dir=args.data) as scratch:
        folder = Path(scratch).absolute()
        machine = {**describe_machine(), **describe_storage(folder)}
        environments = Environments(Path(args.environments), progress.say)
        comparison = Comparison(entries, folder, environments, progress.say, args.piece << 20)
        comparison.prepare(install=args.install)
        comparison.run(args.rounds, sizes, args.mib << 20)
    return PeersReport(
        comparison,
        args.rounds,
        sizes,
        args.mib << 20,
        machine,
        describe_versions(),
        time.strftime("%Y-%m-%d"),
    )


def _tell(report: PeersReport, args: argparse.Namespace) -> int:
    from dualpath.bench.peers.plot import draw  # noqa: PLC0415 - slow imports
    from dualpath.bench.peers.report import markdown, print_report  # noqa: PLC0415

    print_report(report)
    ok = report.ok
    try:
        if args.json:
            text = json.dumps(report.to_json(), indent=2) + "\n"
            Path(args.json).write_text(text, encoding="utf-8")
        if args.markdown:
            put_figures(Path(args.markdown), markdown(report))
    except (OSError, InvalidRequest) as error:
        print(f"dualpath bench peers: {error}", file=sys.stderr)
        ok = False
    if args.plot:
        try:
            draw(report, args.plot)
            print(f"picture: {args.plot}")
        except DualPathError as error:
            print(f"dualpath bench peers: {error}", file=sys.stderr)
            ok = False
    return EXIT_OK if ok else EXIT_FAILED


command = PeersBench()
