"""`dualpath serve`: the storage daemon of a node, in the foreground.

Owns the flags and the line `ready {json}` on stdout; the daemon itself is
`dualpath.kvstore.service`. Ends on SIGTERM or SIGINT after a clean shutdown.
"""

from __future__ import annotations

import argparse
import asyncio
import os

from dualpath.cli.config_file import add_config_arguments, given_flags, read_config
from dualpath.cli.logs import LEVELS, configure_logs
from dualpath.cli.ready import ready_teller
from dualpath.kvstore.service.config import DaemonConfig
from dualpath.kvstore.service.process import run_daemon

TABLE = "serve"
_EXAMPLE = """example:
  dualpath serve --data DIR --disk-bytes 20GiB --dram-bytes 1GiB
  dualpath serve --config dualpath.toml                  # its table [serve]
  DUALPATH_SERVE_TOKENS=... dualpath serve --data DIR --listen 0.0.0.0:7070 \\
      --advertise-host 10.0.0.5

Prints one line `ready {json}` on stdout once it serves; logs go to stderr. Every flag can also be
set in the file's table or as DUALPATH_SERVE_<FLAG>; a flag wins over the environment, the
environment over the file. Tokens given as flags are visible to other users of the machine:
prefer the environment or the file."""


class ServeCommand:
    """See the module docstring."""

    name = "serve"
    help = "run the storage daemon of a node"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """One flag a field of `DaemonConfig`."""
        parser.epilog = _EXAMPLE
        add_config_arguments(parser, DaemonConfig)
        parser.add_argument("--log-level", choices=LEVELS, default="info")

    def run(self, args: argparse.Namespace) -> int:
        """Serve until told to stop."""
        config = read_config(
            DaemonConfig,
            TABLE,
            file=args.config,
            environment=os.environ,
            flags=given_flags(args, DaemonConfig),
        )
        configure_logs(args.log_level)
        asyncio.run(run_daemon(config, ready_teller(os.environ)))
        return 0


command = ServeCommand()
