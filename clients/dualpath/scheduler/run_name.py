"""How a peer tells one run of the scheduler from the next: a name that each run makes up."""

from __future__ import annotations

import secrets

RUN_KEY = "dualpath-run"
"""Initial metadata of each stream. Numbers of assignments count from 1 in each run."""


def new_run() -> str:
    """The name of a run."""
    return secrets.token_hex(8)
