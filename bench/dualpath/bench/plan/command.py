"""The subcommand `dualpath plan`: its flags, what it prints and writes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dualpath.bench.agents.named_set import SET_NAMES, named_set
from dualpath.bench.agents.trace_set import trace_set
from dualpath.bench.agents.trajectory import Trajectory
from dualpath.bench.flag_values import rate_of, size_of
from dualpath.bench.models.calibration import Calibration, read_calibration
from dualpath.bench.models.catalogue import find_model, model_names
from dualpath.bench.plan.bottleneck_range import NodeRates
from dualpath.bench.plan.plan_request import PlanRequest
from dualpath.bench.plan.planner import Plan, make_plan
from dualpath.bench.plan.report import as_json, as_text
from dualpath.bench.progress import Progress
from dualpath.bench.slo import parse_slo
from dualpath.transfer.errors import InvalidRequest

if TYPE_CHECKING:
    from dualpath.bench.plan.ratio_simulation import SimulatedRatio

EXIT_OK = 0
STAGING = "80GB"
_EPILOG = """examples:
  dualpath plan --model ds-v3.2 --gpus 48 --snic 400Gb --cnic 400Gb --workload agent-64k
  dualpath plan --model ds-v3.2 --gpus 96 --snic 400Gb --cnic 400Gb --trace FILE --json
  dualpath plan --model FILE.toml --gpus 24 --snic 200Gb --cnic 400Gb --slo ttft=4s,tpot=50ms

Answers with the ratios P/D at which no device but storage binds, what a turn asks for, how many
turns a second each ratio carries by one path, by two and by splitting loads, and what binds next.
Projected, in closed form: means, no queues; models and efficiencies are the committed ones.
--simulate runs the best ratio and those beside it under the scheduler's policies, and says where
and why the closed form differs.

exit status: 0 planned; 1 a file could not be written; 2 numbers that cannot be, with the reason"""


class PlanCommand:
    """See the module docstring."""

    name = "plan"
    help = "say what two paths would give a cluster, and its best ratio of prefill to decode"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flags."""
        parser.epilog = _EPILOG
        add = parser.add_argument
        add(
            "--model",
            required=True,
            metavar="M",
            help=f"{', '.join(model_names())}, or FILE.toml[:TABLE]",
        )
        add("--gpus", required=True, type=int, metavar="N", help="of the whole cluster")
        add("--snic", required=True, metavar="RATE", help="storage NIC of a node, such as 400Gb")
        add("--cnic", required=True, metavar="RATE", help="compute NIC of a GPU, such as 400Gb")
        add("--dram", default="500GB/s", metavar="RATE", help="of a node (default 500GB/s)")
        add("--gpus-per-node", type=int, default=8, metavar="N", help="default 8")
        source = parser.add_mutually_exclusive_group()
        source.add_argument(
            "--workload", metavar="NAME", help=f"{', '.join(SET_NAMES)} (default agent-64k)"
        )
        source.add_argument("--trace", metavar="FILE", help="of `runs` or `hash_ids`")
        add("--slo", default="", metavar="LIST", help="ttft=4s,tpot=50ms, either or both")
        add("--calibration", metavar="FILE", help="inputs in place of the committed ones")
        add("--seed", type=int, default=0, metavar="N", help="of the workload (default 0)")
        add(
            "--simulate",
            action="store_true",
            help="simulate the best ratio and those beside it, too (a minute; with --slo some)",
        )
        add(
            "--staging",
            metavar="SIZE",
            help="--simulate: host memory a node for KV on its way (default 80GB)",
        )
        add("--json", action="store_true", help="print the plan as JSON")
        add(
            "--plot",
            nargs="?",
            const="dualpath-plan.png",
            default="",
            metavar="FILE",
            help="draw it as PNG (default name dualpath-plan.png)",
        )

    def run(self, args: argparse.Namespace) -> int:
        """Plan and print. Raises InvalidRequest, and Unavailable for the picture."""
        if args.plot and not Path(args.plot).absolute().parent.is_dir():
            raise InvalidRequest(f"--plot {args.plot}: there is no folder for it")
        if args.staging is not None and not args.simulate:
            raise InvalidRequest("--staging is for --simulate; the closed form does not know it")
        calibration = read_calibration(Path(args.calibration) if args.calibration else None)
        workload, trajectories = _workload(args)
        plan = _plan(args, calibration, workload, trajectories)
        simulated: list[SimulatedRatio] = []
        if args.simulate:
            simulated = _simulate(plan, calibration, trajectories, args)
        shown = as_json(plan, simulated)
        print(json.dumps(shown, indent=2) if args.json else as_text(plan, simulated))
        if args.plot:
            from dualpath.bench.plan.plot import draw  # noqa: PLC0415 - slow import

            draw(plan, args.plot, simulated)
            if not args.json:
                print(f"picture     {args.plot}")
        return EXIT_OK


def _simulate(
    plan: Plan,
    calibration: Calibration,
    trajectories: Sequence[Trajectory],
    args: argparse.Namespace,
) -> list[SimulatedRatio]:
    from dualpath.bench.plan.ratio_simulation import (  # noqa: PLC0415 - numpy behind it
        RatioSimulation,
        worth_simulating,
    )

    progress = Progress()
    simulation = RatioSimulation(
        plan,
        calibration,
        trajectories,
        staging_bytes=size_of("staging", args.staging or STAGING),
        seed=args.seed,
    )
    wanted = worth_simulating(plan)
    found: list[SimulatedRatio] = []
    for number, (ratio, loading) in enumerate(wanted, start=1):
        progress.stage(f"simulate {ratio.name} {loading.value} ({number}/{len(wanted)})")
        found.append(simulation.run(ratio, loading, progress.move))
        progress.done(f"{found[-1].turns_per_s:.1f} turns/s")
    return found


def _plan(
    args: argparse.Namespace,
    calibration: Calibration,
    workload: str,
    trajectories: Sequence[Trajectory],
) -> Plan:
    request = PlanRequest(
        gpus=args.gpus,
        rates=NodeRates(
            gpus=args.gpus_per_node,
            snic_bytes_per_s=rate_of("snic", args.snic),
            cnic_bytes_per_s=rate_of("cnic", args.cnic),
            dram_bytes_per_s=rate_of("dram", args.dram),
        ),
        slo=parse_slo(args.slo),
    )
    geometry = find_model(args.model)
    return make_plan(request, geometry, calibration, workload, trajectories)


def _workload(args: argparse.Namespace) -> tuple[str, tuple[Trajectory, ...]]:
    if args.trace:
        agents = trace_set(args.trace)
        return Path(args.trace).name, tuple(agent.trajectory for agent in agents)
    name = args.workload or "agent-64k"
    return name, named_set(name, seed=args.seed)


command = PlanCommand()
"""Loaded by the CLI through the entry-point group `dualpath.commands`."""
