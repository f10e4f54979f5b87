"""The subcommand `dualpath simulate`: its flags, its exit status, what it prints and writes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dualpath.bench.document import put_figures
from dualpath.bench.flag_values import rate_of, seconds_of, size_of
from dualpath.bench.models.catalogue import model_names
from dualpath.bench.progress import Progress
from dualpath.bench.simulate.detail_flags import DETAILS, add_detail_flags, details_of
from dualpath.bench.simulate.system import SYSTEMS
from dualpath.bench.slo import parse_slo
from dualpath.transfer.errors import InvalidRequest, Unavailable

if TYPE_CHECKING:
    from dualpath.bench.simulate.request import SimulationRequest

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

_RUN_ONLY = (
    *("model", "prefill", "decode", "gpus_per_node", "snic", "cnic", "dram", "staging", "system"),
    *("max_len", "trace", "online", "recorded", "aps", "duration", "slo", "tool_latency", "plot"),
)
_EPILOG = """examples:
  dualpath simulate --model ds-v3.2 --prefill 2 --decode 4 --agents 2048 --max-len 64K
  dualpath simulate --model ds-27b --prefill 1 --decode 1 --system basic,dualpath,split,oracle
  dualpath simulate --model qwen2.5-32b --prefill 1 --decode 2 --online --aps 0.1:1.0:0.1
  dualpath simulate --model ds-v3.2 --snic 800Gbit/s --cnic 800Gbit/s --json out.json
  dualpath simulate --model FILE.toml --prefill 2 --decode 4 --trace FILE --tool-latency 0s
  dualpath simulate paper --json out.json --jobs 2   the published results beside simulated ones
  dualpath simulate sensitivity --jobs 2             how they move with inputs; other hardware
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
            choices=("run", "paper", "sensitivity", "cluster"),
            default="run",
            help="run (default): one cluster; paper: every published result; sensitivity: how "
            "results move with inputs; cluster: one that `dualpath bench cluster` measured",
        )
        add(
            "--from",
            nargs="+",
            default=[],
            metavar="FILE",
            dest="measured",
            help="cluster: what `dualpath bench cluster --json` wrote",
        )
        self._add_cluster_flags(parser)
        self._add_work_flags(parser)
        add_detail_flags(parser)
        self._add_output_flags(parser)
        self._defaults = {one: parser.get_default(one) for one in (*_RUN_ONLY, *DETAILS)}

    @staticmethod
    def _add_cluster_flags(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument_group("cluster").add_argument
        add(
            "--model",
            default="ds-v3.2",
            metavar="NAME",
            help=f"{', '.join(model_names())}, or FILE.toml[:TABLE] of the same fields as "
            "catalogue.toml (default ds-v3.2)",
        )
        add("--prefill", type=int, default=2, metavar="N", help="prefill nodes (default 2)")
        add("--decode", type=int, default=4, metavar="N", help="decode nodes (default 4)")
        add("--gpus-per-node", type=int, default=8, metavar="N", help="default 8")
        add("--snic", default="400Gb", metavar="RATE", help="of a node's storage NIC (400Gb)")
        add("--cnic", default="400Gb", metavar="RATE", help="of a GPU's compute NIC (400Gb)")
        add("--dram", default="500GB/s", metavar="RATE", help="of a node's memory (500GB/s)")
        add("--staging", default="80GB", metavar="SIZE", help="host memory a node for KV (80GB)")
        add(
            "--system",
            default="basic,dualpath,split,oracle",
            metavar="LIST",
            help=f"of {', '.join(SYSTEMS)} (default basic,dualpath,split,oracle)",
        )
        add("--calibration", default="", metavar="FILE", help="inputs in place of committed ones")

    @staticmethod
    def _add_work_flags(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument_group("work").add_argument
        add("--max-len", default="64K", metavar="LEN", help="32K, 48K or 64K (default 64K)")
        add(
            "--trace", default="", metavar="FILE", help="its conversations instead; see planning.md"
        )
        add("--agents", type=int, metavar="N", help="all at once (default 512)")
        add("--online", action="store_true", help="Poisson arrivals instead of all at once")
        add("--recorded", action="store_true", help="agents arrive when they did in the trace")
        add("--aps", default="0.1:0.5:0.1", metavar="A:B:STEP", help="agents a second; or a list")
        add("--duration", default="1200s", metavar="T", help="of arrivals (default 1200s)")
        add(
            "--slo",
            default="ttft=4s,tpot=50ms",
            metavar="LIST",
            help="of the means, for the capacity; a system twice past it at two rates is not "
            "run at higher ones (default ttft=4s,tpot=50ms)",
        )
        add(
            "--tool-latency",
            default=None,
            metavar="T",
            help="mean before each turn (default: the trace's; else 0s)",
        )
        add("--seed", type=int, default=0, metavar="N", help="of trajectories and arrivals")

    @staticmethod
    def _add_output_flags(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument_group("output").add_argument
        add("--jobs", type=int, default=1, metavar="N", help="paper, sensitivity: processes")
        add("--json", default="", metavar="FILE", help="write the figures as JSON")
        add("--plot", default="", metavar="FILE", help="run: a picture, as PNG")
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
            self._check_mode(args)
            if args.what == "cluster":
                figures, markdown, agrees = _cluster(args, progress)
            elif args.what == "paper":
                figures, markdown = _paper(args, progress)
            elif args.what == "sensitivity":
                figures, markdown = _sensitivity(args, progress)
            else:
                figures, markdown = _run(_request(args), args.plot, progress), ""
            _write(args, figures, markdown)
        except InvalidRequest as error:
            print(f"dualpath simulate: {error}", file=sys.stderr)
            return EXIT_USAGE
        except (OSError, Unavailable) as error:
            print(f"dualpath simulate: {error}", file=sys.stderr)
            return EXIT_FAILED
        except KeyboardInterrupt:
            print("dualpath simulate: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        return EXIT_OK if agrees else EXIT_FAILED

    def _check_mode(self, args: argparse.Namespace) -> None:
        """A flag that would change nothing is a mistake."""
        if args.jobs != 1 and args.what not in ("paper", "sensitivity"):
            raise InvalidRequest("--jobs is for `paper` and `sensitivity`")
        if args.what == "run":
            if args.plots or args.markdown:
                raise InvalidRequest("--plots and --markdown are for `paper`; give --plot FILE")
            self._check_run(args)
            return
        for dest, default in self._defaults.items():
            if getattr(args, dest) != default:
                raise InvalidRequest(
                    f"--{dest.removesuffix('_s').replace('_', '-')} changes nothing in `simulate "
                    f"{args.what}`; leave it out"
                )

    def _check_run(self, args: argparse.Namespace) -> None:
        given = {one for one in _RUN_ONLY if getattr(args, one) != self._defaults[one]}
        if args.agents == 0:
            raise InvalidRequest("--agents 0: nothing would be simulated; give 1 or more")
        lost = given & {"aps", "duration", "slo"}
        if lost and not args.online:
            raise InvalidRequest(f"--{min(lost)} is for --online, which is not given")
        if args.trace and "max_len" in given:
            raise InvalidRequest("--max-len names a set of trajectories; --trace takes its place")


def _check_outputs(args: argparse.Namespace) -> None:
    """Minutes of simulating shall not be lost for a folder that is not there."""
    if bool(args.measured) != (args.what == "cluster"):
        raise InvalidRequest(
            "give `dualpath simulate cluster --from FILE`, of `dualpath bench cluster --json FILE`"
        )
    for flag in ("json", "markdown", "plot"):
        path = getattr(args, flag).partition("#")[0]
        if path and not Path(path).absolute().parent.is_dir():
            raise InvalidRequest(f"--{flag} {path}: there is no folder {Path(path).parent}")
    if args.plots and not Path(args.plots).is_dir():
        raise InvalidRequest(f"--plots {args.plots}: there is no such folder")


def _request(args: argparse.Namespace) -> SimulationRequest:
    from dualpath.bench.simulate.request import SimulationRequest, rates  # noqa: PLC0415

    tool = args.tool_latency
    return SimulationRequest(
        model=args.model,
        prefill=args.prefill,
        decode=args.decode,
        agents=args.agents or 0,
        max_len=args.max_len,
        trace=args.trace,
        recorded=args.recorded,
        systems=tuple(name.strip() for name in args.system.split(",") if name.strip()),
        aps=rates(args.aps) if args.online else (),
        duration_s=seconds_of("duration", args.duration),
        tool_s=None if tool is None else seconds_of("tool-latency", tool, above_zero=False),
        snic_bytes_per_s=rate_of("snic", args.snic),
        cnic_bytes_per_s=rate_of("cnic", args.cnic),
        dram_bytes_per_s=rate_of("dram", args.dram),
        staging_bytes=size_of("staging", args.staging),
        gpus_per_node=args.gpus_per_node,
        details=details_of(args),
        slo=parse_slo(args.slo),
        calibration=args.calibration,
        seed=args.seed,
    )


def _run(request: SimulationRequest, plot: str, progress: Progress) -> dict[str, object]:
    from dualpath.bench.simulate.sweep import capacities, run_sweep  # noqa: PLC0415 - numpy behind
    from dualpath.bench.simulate.table import print_results  # noqa: PLC0415

    sweep = run_sweep(request, progress)
    print_results(sweep.results, sys.stdout)
    found = capacities(sweep, request)
    for name, capacity in found.items():
        least = " or more" if capacity["at_least"] else ""
        print(f"{name}: {capacity['agents_per_s']:.3f} agents/s{least} within the SLO (means)")
    for note in sweep.notes():
        print(note)
    if plot:
        from dualpath.bench.simulate.run_plot import draw_runs  # noqa: PLC0415 - slow import

        draw_runs(sweep.results, request.slo, plot, request.title)
        print(f"picture: {plot}")
    return {
        "request": request.to_json(),
        "results": sweep.results,
        "within_slo": found,
        "left_out": dict(sweep.left_out),
    }


def _paper(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, object], str]:
    from dualpath.bench.simulate.paper import reproduce  # noqa: PLC0415 - numpy behind it
    from dualpath.bench.simulate.table import comparison_rows, markdown_document  # noqa: PLC0415
    from dualpath.bench.table import print_table  # noqa: PLC0415

    report = reproduce(
        progress,
        seed=args.seed,
        calibration=args.calibration,
        agents=(args.agents,) if args.agents else (),
        jobs=args.jobs,
    )
    print_table(*comparison_rows(report), sys.stdout)
    if args.plots:
        from dualpath.bench.simulate.plot import draw  # noqa: PLC0415 - slow import

        for path in draw(report, Path(args.plots)):
            print(f"picture: {path}")
    return report.to_json(), markdown_document(report)


def _sensitivity(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, object], str]:
    from dualpath.bench.simulate.sensitivity import LARGE_AGENTS, Sensitivity  # noqa: PLC0415
    from dualpath.bench.simulate.setting import Setting  # noqa: PLC0415 - numpy behind it
    from dualpath.bench.simulate.table import markdown_section  # noqa: PLC0415
    from dualpath.bench.table import print_table  # noqa: PLC0415

    factor = args.agents / LARGE_AGENTS if args.agents else 1.0
    base = Setting(seed=args.seed, calibration=args.calibration)
    report = Sensitivity(base, factor).report(progress, jobs=args.jobs)
    for table in report.tables:
        print(table.title)
        print_table(table.headings, table.rows, sys.stdout)
    if args.plots:
        from dualpath.bench.simulate.plot import draw_curves  # noqa: PLC0415 - slow import

        print(f"picture: {draw_curves(report.curves, Path(args.plots) / 'paper_sensitivity.png')}")
    return report.to_json(), "\n\n".join(markdown_section(table) for table in report.tables)


def _cluster(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, object], str, bool]:
    from dualpath.bench.simulate.agreement import (  # noqa: PLC0415 - numpy behind it
        DEVIATES,
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
    agrees = all(one.verdict != DEVIATES for one in found)
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
