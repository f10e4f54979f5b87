"""`dualpath scheduler`: the scheduler of a cluster, in the foreground.

Owns the flags and the line `ready {json}` on stdout; the scheduler itself is `dualpath.scheduler`.
Ends on SIGTERM or SIGINT.
"""

from __future__ import annotations

import argparse
import asyncio
import os

from dualpath.cli.config_file import add_config_arguments, given_flags, read_config
from dualpath.cli.logs import LEVELS, configure_logs
from dualpath.cli.ready import ready_teller
from dualpath.scheduler.config import SchedulerConfig
from dualpath.scheduler.process import run_scheduler

TABLE = "scheduler"
_EXAMPLE = """example:
  dualpath scheduler --listen 127.0.0.1:7090 --metrics-listen 127.0.0.1:9190
  dualpath scheduler --listen 10.0.0.9:7090 --policy split --beta-tokens 800000 --tokens SECRET

Leaders of engine groups and front ends dial it over gRPC (dualpath.v1.Scheduler, docs/protocol.md).
Prints one line `ready {json}` on stdout once it serves; logs go to stderr. Every flag can also be
set in the table [scheduler] of --config FILE or as DUALPATH_SCHEDULER_<FLAG>; a flag wins over the
environment, the environment over the file. Lists are separated by commas."""


class SchedulerCommand:
    """See the module docstring."""

    name = "scheduler"
    help = "run the scheduler: which engines a request gets, and who reads"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """One flag a field of `SchedulerConfig`."""
        parser.epilog = _EXAMPLE
        add_config_arguments(parser, SchedulerConfig)
        parser.add_argument("--log-level", choices=LEVELS, default="info")

    def run(self, args: argparse.Namespace) -> int:
        """Serve until told to stop."""
        config = read_config(
            SchedulerConfig,
            TABLE,
            file=args.config,
            environment=os.environ,
            flags=given_flags(args, SchedulerConfig),
        )
        configure_logs(args.log_level)
        asyncio.run(run_scheduler(config, ready_teller(os.environ)))
        return 0


command = SchedulerCommand()
