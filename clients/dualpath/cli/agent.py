"""`dualpath agent`: the agent of a node, in the foreground.

Owns the flags and the line `ready {json}` on stdout; the agent itself is `dualpath.agent`. Ends
on SIGTERM or SIGINT after its loads are fenced.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket

from dualpath.agent.config import AgentConfig
from dualpath.agent.process import run_agent
from dualpath.cli.config_file import add_config_arguments, given_flags, read_config
from dualpath.cli.logs import LEVELS, configure_logs
from dualpath.cli.ready import ready_teller

TABLE = "agent"
_EXAMPLE = """example, one on a prefill node and one on a decode node:
  dualpath agent --name decode-1 --daemons 10.0.0.5:7070 --listen 10.1.0.2:7081 \\
      --data-listen 10.1.0.2:0 --insecure
  dualpath agent --name prefill-1 --daemons 10.0.0.5:7070 --unix run/dualpath.sock \\
      --relays decode-1=10.1.0.2:7081

Prints one line `ready {json}` on stdout once it serves; logs go to stderr. Every flag can also be
set in the table [agent] of --config FILE or as DUALPATH_AGENT_<FLAG>; a flag wins over the
environment, the environment over the file. Lists are separated by commas."""


class AgentCommand:
    """See the module docstring."""

    name = "agent"
    help = "run the agent of a node: loads and relays"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """One flag a field of `AgentConfig`."""
        parser.epilog = _EXAMPLE
        add_config_arguments(parser, AgentConfig)
        parser.add_argument("--log-level", choices=LEVELS, default="info")

    def run(self, args: argparse.Namespace) -> int:
        """Serve until told to stop."""
        config = read_config(
            AgentConfig,
            TABLE,
            file=args.config,
            environment=os.environ,
            flags=given_flags(args, AgentConfig),
            fallbacks={"name": socket.gethostname()},
        )
        configure_logs(args.log_level)
        asyncio.run(run_agent(config, ready_teller(os.environ)))
        return 0


command = AgentCommand()
