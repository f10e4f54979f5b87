"""`dualpath doctor`: what this machine offers, what each absence costs, how to get it.

Exit code 1 only if something is missing without which nothing runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path

from dualpath.agent.config import check_address
from dualpath.cli.finding import Finding, Status
from dualpath.cli.probe_encryption import encryption_findings
from dualpath.cli.probe_memory import memory_findings
from dualpath.cli.probe_network import network_findings
from dualpath.cli.probe_software import software_findings
from dualpath.cli.probe_storage import storage_findings
from dualpath.cli.topology import Topology
from dualpath.transfer.errors import InvalidRequest

_EXAMPLE = """example:
  dualpath doctor
  dualpath doctor --data DIR --json
  dualpath doctor --config dualpath.toml                 # also what it encrypts
  dualpath doctor --topology --towards 10.0.1.1:7070 --towards 10.0.2.5:7081"""


class DoctorCommand:
    """See the module docstring."""

    name = "doctor"
    help = "show what this machine offers"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Data directory, --json."""
        parser.epilog = _EXAMPLE
        parser.add_argument(
            "--data", default=".", metavar="DIR", help="data directory of the daemon (default .)"
        )
        parser.add_argument(
            "--config",
            default="",
            metavar="FILE",
            help="settings of the daemon or the agent, for what they encrypt",
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.add_argument(
            "--topology",
            action="store_true",
            help="show network devices, disks, NUMA nodes instead",
        )
        parser.add_argument(
            "--towards",
            action="append",
            default=[],
            metavar="HOST:PORT",
            help="with --topology: which device leads to this daemon or relay (again for others)",
        )

    def run(self, args: argparse.Namespace) -> int:
        """Probe and print."""
        if args.topology:
            return _show_topology(args)
        if args.towards:
            raise InvalidRequest("--towards goes with --topology")
        findings = [
            *software_findings(),
            *storage_findings(Path(args.data)),
            *memory_findings(),
            *network_findings(),
            *encryption_findings(args.config, os.environ),
        ]
        fatal = [finding for finding in findings if finding.fatal]
        if args.json:
            print(json.dumps(_as_json(findings)))
        else:
            print(f"{platform.system()} {platform.release()} on {platform.machine()}")
            for finding in findings:
                _print(finding)
        for finding in fatal:
            print(f"missing: {finding.name}: {finding.detail}", file=sys.stderr)
        return 1 if fatal else 0


def _show_topology(args: argparse.Namespace) -> int:
    for address in args.towards:
        check_address(address, unix=False)
    found = Topology.of_machine(args.towards)
    print(json.dumps(found.to_json()) if args.json else "\n".join(found.lines()))
    return 0


def _as_json(findings: list[Finding]) -> dict[str, object]:
    return {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "ok": not any(finding.fatal for finding in findings),
        "findings": [asdict(finding) | {"status": finding.status.value} for finding in findings],
    }


def _print(finding: Finding) -> None:
    print(f"  {finding.status.value:8} {finding.name:22} {finding.detail}")
    if finding.status is not Status.OK:
        for word, text in (("costs", finding.cost), ("get it", finding.remedy)):
            if text:
                print(f"  {'':8} {word:>22}: {text}")


command = DoctorCommand()
