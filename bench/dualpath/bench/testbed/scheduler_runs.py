"""Runs that go through `dualpath scheduler`: their names, their flag, the scheduler's own flags.

Values and checks only; imported where `--help` must not pay for gRPC.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dualpath.scheduler.policies import POLICIES
from dualpath.transfer.errors import InvalidRequest

SCHEDULER_PREFIX = "scheduler:"
"""Before a policy of the scheduler, in tables."""
SCHEDULER_POLICIES = ("paper", "split")
"""Those that `--scheduler` means by itself."""
ALPHA_S = 3.0
"""The paper's alpha, in seconds of a node's storage links."""


def add_scheduler_argument(group: argparse._ArgumentGroup) -> None:
    """`--scheduler [LIST]`."""
    group.add_argument(
        "--scheduler",
        nargs="?",
        default="",
        const=",".join(SCHEDULER_POLICIES),
        metavar="LIST",
        help="measure beside them requests that go through `dualpath scheduler`, which names their "
        f"engines and read shares: its policies, of {', '.join(POLICIES)} (without a list: "
        f"{','.join(SCHEDULER_POLICIES)})",
    )


def scheduler_list(text: str) -> tuple[str, ...]:
    """What the flag names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def check_scheduler_policies(names: Sequence[str]) -> None:
    """Raise InvalidRequest for one that is none, or is named twice."""
    for name in names:
        if name not in POLICIES:
            raise InvalidRequest(f"--scheduler {name}: there are {', '.join(POLICIES)}")
    if len(set(names)) != len(names):
        raise InvalidRequest(f"--scheduler names one twice: {','.join(names)}")


def check_scheduler_nodes(decode: int) -> None:
    """Raise InvalidRequest for a cluster that has no decode node to name."""
    if decode < 1:
        raise InvalidRequest(f"--scheduler names decode engines: --decode is {decode}; give more")


def scheduler_words(
    policy: str, *, storage_bytes_per_s: float, token_bytes: float, tokens_max: int
) -> Sequence[str]:
    """Flags of `dualpath scheduler` for a cluster of which only the links bind: alpha as the links
    are shaped (0: no limit), and no bound by compute, of which there is none."""
    alpha = ALPHA_S * storage_bytes_per_s / token_bytes
    return (
        *("--policy", policy.removeprefix(SCHEDULER_PREFIX)),
        *("--alpha-tokens", str(alpha or tokens_max)),
        *("--beta-tokens", str(tokens_max)),
    )
