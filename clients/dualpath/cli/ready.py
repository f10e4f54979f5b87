"""The line by which a started process tells its parent where it can be reached."""

from __future__ import annotations

import json
from collections.abc import Mapping


def print_ready(where: Mapping[str, object]) -> None:
    """Print `ready {json}` as one line on stdout, flushed."""
    print(f"ready {json.dumps(dict(where), sort_keys=True)}", flush=True)
