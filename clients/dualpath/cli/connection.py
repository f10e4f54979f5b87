"""How the commands that move blocks reach the store: by an agent inside this process that talks
to a daemon, or by an agent that runs on this node.

Owns the table `client` of the configuration. Keeps no connection.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from dualpath.agent.config import AgentConfig
from dualpath.cli.config_file import add_config_arguments, given_flags, read_config
from dualpath.cli.logs import LEVELS, configure_logs
from dualpath.client.kv_client import KVClient
from dualpath.proto.tls import Tls
from dualpath.transfer.errors import InvalidRequest

TABLE = "client"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Where the store is and how long a command may take."""

    daemon: str = "127.0.0.1:7070"
    """Control address of the daemon: host:port or unix:PATH."""
    agent: str = ""
    """Use this agent of the node (unix:PATH) instead of one inside this process."""
    token: str = ""
    """Shown to the daemon or the agent."""
    tls_ca: str = ""
    """PEM file of who signed the certificate of the daemon or agent, "system" for those that gRPC
    knows; with it TCP control goes over TLS."""
    tls_cert: str = ""
    """PEM file of our certificate, for those that ask for one."""
    tls_key: str = ""
    """PEM file of its key."""
    tls_name: str = ""
    """Name to expect in the other side's certificate, instead of the host dialled."""
    data_tls: bool = False
    """The daemon has `data_tls` set: blocks go by TLS, with `tls_ca`, `tls_cert` and `tls_key`."""
    deadline_s: float = 60.0
    """Longest time for each batch of blocks."""
    batch_bytes: int = 64 << 20
    """Bytes moved at once; at least one block. With an agent, the whole file is moved at once."""

    def __post_init__(self) -> None:
        if not self.deadline_s > 0:
            raise InvalidRequest(f"deadline_s must be positive, not {self.deadline_s}")
        if not (self.token.isascii() and self.token.isprintable()):
            raise InvalidRequest(
                "token: only printable ASCII can be sent; is there a newline, of a file perhaps?"
            )
        _ = self.tls  # raises what does not go together

    @property
    def tls(self) -> Tls:
        """How to dial."""
        return Tls(self.tls_ca, self.tls_cert, self.tls_key, self.tls_name)


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `ClientConfig`, and --json."""
    add_config_arguments(parser, ClientConfig)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--log-level", choices=LEVELS, default="error", help="(default error)")


def connection_of(args: argparse.Namespace) -> ClientConfig:
    """From the file's [client], DUALPATH_CLIENT_* and flags. Also sets the log level."""
    configure_logs(args.log_level)
    return read_config(
        ClientConfig,
        TABLE,
        file=args.config,
        environment=os.environ,
        flags=given_flags(args, ClientConfig),
    )


async def open_client(config: ClientConfig) -> KVClient:
    """A client session; the caller closes it. Raises Unavailable."""
    if config.agent:
        return await KVClient.connect(config.agent, token=config.token, tls=config.tls)
    return await KVClient.embedded(
        AgentConfig(
            name=f"cli-{os.getpid()}",
            daemons=(config.daemon,),
            token=config.token,
            tls_ca=config.tls_ca,
            tls_cert=config.tls_cert,
            tls_key=config.tls_key,
            tls_name=config.tls_name,
            data_tls=config.data_tls,
        )
    )
