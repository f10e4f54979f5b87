"""The subcommand `dualpath simulate`: its flags, its exit status, what it prints and writes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dualpath.bench.document import put_figures
from dualpath.bench.progress import Progress
from dualpath.transfer.errors import InvalidRequest

if TYPE_CHECKING:
    from dualpath.bench.simulate.request import SimulationRequest

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

_EPILOG = """examples:
  dualpath simulate --model ds-v3.2 --prefill 2 --decode 4 --agents 2048 --max-len 64K
  dualpath simulate --model ds-27b --prefill 1 --decode 1 --system basic,dualpath,split,oracle
  dualpath simulate --model qwen2.5-32b --prefill 1 --decode 2 --online --aps 0.1:1.0:0.1
  dualpath simulate --model ds-v3.2 --snic 800Gbit/s --cnic 800Gbit/s --json out.json
  dualpath simulate paper --json out.json      the published results beside simulated ones
  dualpath simulate cluster --from out.json    what `bench cluster --json` measured, simulated

Nothing here is measured: a cluster is simulated at the level of flows, with compute by a roofline
(calibration.toml) and engine details as declared. The scheduler is the one that `dualpath
scheduler` serves.

exit status: 0 simulated; 1 a file could not be written, or what was measured and what was simulated
differ by more than 10 %; 2 wrong usage
"""


class SimulateCommand:
    """Loaded by the CLI through the entry-point group `dualpath.commands`."""

    name = "simulate"
    help = "simulate prefill and decode clusters under the scheduler; compare with the paper"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flags."""
        parser.epilog = _EPILOG
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        add = parser.add_argument
        add(
            "what",
            nargs="?",
            choices=("run", "paper", "cluster"),
            default="run",
            help="run (default): one cluster; paper: every published result; cluster: one that "
            "`dualpath bench cluster` measured",
        )
        add(
            "--from",
            nargs="+",
            default=[],
            metavar="FILE",
            dest="measured",
            help="cluster: what `dualpath bench cluster --json` wrote",
        )
        add("--model", default="ds-v3.2", metavar="NAME", help="or FILE.toml (default ds-v3.2)")
        add("--prefill", type=int, default=2, metavar="N", help="prefill nodes (default 2)")
        add("--decode", type=int, default=4, metavar="N", help="decode nodes (default 4)")
        add("--agents", type=int, default=0, metavar="N", help="at once (default 512)")
        add("--max-len", default="64K", metavar="LEN", help="32K, 48K or 64K (default 64K)")
        add(
            "--system",
            default="basic,dualpath,split,oracle",
            metavar="LIST",
            help="of basic, layerwise, dualpath-unscheduled, dualpath, split, oracle",
        )
        add("--online", action="store_true", help="Poisson arrivals instead of all at once")
        add("--aps", default="0.1:0.5:0.1", metavar="A:B:STEP", help="agents a second; or a list")
        add("--duration", default="1200s", metavar="T", help="of arrivals (default 1200s)")
        add("--tool-latency", default="0s", metavar="T", help="mean before each turn (default 0s)")
        add("--snic", default="400Gbit/s", metavar="RATE", help="of a node's storage NIC")
        add("--cnic", default="400Gbit/s", metavar="RATE", help="of a GPU's compute NIC")
        add("--dram", default="500GB/s", metavar="RATE", help="of a node's memory")
        add("--staging", default="80GB", metavar="SIZE", help="host memory a node for KV")
        add("--calibration", default="", metavar="FILE", help="inputs in place of committed ones")
        add("--seed", type=int, default=0, metavar="N", help="of trajectories and arrivals")
        add("--json", default="", metavar="FILE", help="write the figures as JSON")
        add("--plots", default="", metavar="DIR", help="paper: write its pictures there")
        add(
            "--markdown",
            default="",
            metavar="FILE[#MARK]",
            help="paper, cluster: put tables into a document, between its marks MARK (simulated)",
        )

    def run(self, args: argparse.Namespace) -> int:
        """Simulate; return the exit status."""
        progress = Progress()
        agrees = True
        try:
            _check_outputs(args)
            if args.what == "cluster":
                figures, markdown, agrees = _cluster(args, progress)
            elif args.what == "paper":
                figures, markdown = _paper(args, progress)
            else:
                figures, markdown = _run(_request(args), progress), ""
            _write(args, figures, markdown)
        except InvalidRequest as error:
            print(f"dualpath simulate: {error}", file=sys.stderr)
            return EXIT_USAGE
        except OSError as error:
            print(f"dualpath simulate: {error}", file=sys.stderr)
            return EXIT_FAILED
        except KeyboardInterrupt:
            print("dualpath simulate: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        return EXIT_OK if agrees else EXIT_FAILED


def _check_outputs(args: argparse.Namespace) -> None:
    """Minutes of simulating shall not be lost for a folder that is not there."""
    if bool(args.measured) != (args.what == "cluster"):
        raise InvalidRequest(
            "give `dualpath simulate cluster --from FILE`, of `dualpath bench cluster --json FILE`"
        )
    for flag in ("json", "markdown"):
        path = getattr(args, flag).partition("#")[0]
        if path and not Path(path).absolute().parent.is_dir():
            raise InvalidRequest(f"--{flag} {path}: there is no folder {Path(path).parent}")
    if args.plots and not Path(args.plots).is_dir():
        raise InvalidRequest(f"--plots {args.plots}: there is no such folder")


def _request(args: argparse.Namespace) -> SimulationRequest:
    from dualpath.bench.simulate.request import SimulationRequest, rates  # noqa: PLC0415
    from dualpath.cli.sizes import parse_bytes, parse_rate, parse_seconds  # noqa: PLC0415

    return SimulationRequest(
        model=args.model,
        prefill=args.prefill,
        decode=args.decode,
        agents=args.agents,
        max_len=args.max_len,
        systems=tuple(name.strip() for name in args.system.split(",") if name.strip()),
        aps=rates(args.aps) if args.online else (),
        duration_s=parse_seconds(args.duration),
        tool_s=parse_seconds(args.tool_latency),
        snic_bytes_per_s=parse_rate(args.snic),
        cnic_bytes_per_s=parse_rate(args.cnic),
        dram_bytes_per_s=parse_rate(args.dram),
        staging_bytes=parse_bytes(args.staging),
        calibration=args.calibration,
        seed=args.seed,
    )


def _run(request: SimulationRequest, progress: Progress) -> dict[str, object]:
    from dualpath.bench.simulate.simulation import simulate  # noqa: PLC0415 - numpy behind it
    from dualpath.bench.simulate.table import print_results  # noqa: PLC0415

    found: list[dict[str, object]] = []
    for name, aps, setup in request.setups():
        title = f"{name} at {aps:g} agents/s" if aps else name
        progress.stage(title)
        result = simulate(setup, progress.move)
        progress.done(f"{result.jct_s:.0f} s simulated, {result.events} events")
        found.append(result.to_json() | ({"aps": aps} if aps else {}))
    print_results(found, sys.stdout)
    return {"request": request.to_json(), "results": found}


def _paper(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, object], str]:
    from dualpath.bench.simulate.paper import reproduce  # noqa: PLC0415 - numpy behind it
    from dualpath.bench.simulate.table import comparison_rows, markdown_document  # noqa: PLC0415
    from dualpath.bench.table import print_table  # noqa: PLC0415

    only: Sequence[int] = (args.agents,) if args.agents else ()
    report = reproduce(progress, seed=args.seed, calibration=args.calibration, agents=only)
    print_table(*comparison_rows(report), sys.stdout)
    if args.plots:
        from dualpath.bench.simulate.plot import draw  # noqa: PLC0415 - slow import

        for path in draw(report, Path(args.plots)):
            print(f"picture: {path}")
    return report.to_json(), markdown_document(report)


def _cluster(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, object], str, bool]:
    from dualpath.bench.simulate.agreement import (  # noqa: PLC0415 - numpy behind it
        HEADINGS,
        WITHIN,
        Agreement,
        compare,
        rows,
    )
    from dualpath.bench.simulate.bench_measurement import read_measurements  # noqa: PLC0415
    from dualpath.bench.table import markdown_table, print_table  # noqa: PLC0415

    measured = [each for path in args.measured for each in read_measurements(path)]
    found: list[Agreement] = []
    for each in measured:
        progress.stage(f"simulate {each.label}")
        found += compare(each)
        progress.done()
    print_table(HEADINGS, rows(found), sys.stdout)
    agrees = all(abs(one.deviation) <= WITHIN for one in found if one.judged)
    print(f"within {WITHIN:.0%}: {'yes' if agrees else 'NO'}")
    figures: dict[str, object] = {"agrees": agrees, "figures": [one.to_json() for one in found]}
    return figures, markdown_table(HEADINGS, rows(found)), agrees


def _write(args: argparse.Namespace, figures: dict[str, object], markdown: str) -> None:
    if args.json:
        text = json.dumps(figures, indent=2) + "\n"
        Path(args.json).write_text(text, encoding="utf-8")
    if args.markdown and markdown:
        path, _, mark = args.markdown.partition("#")
        put_figures(Path(path), markdown, mark or "simulated")


command = SimulateCommand()
