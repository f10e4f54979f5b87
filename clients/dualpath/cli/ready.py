"""How a started process tells whoever started it that it can be reached, and where."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping


def print_ready(where: Mapping[str, object]) -> None:
    """Print `ready {json}` as one line on stdout, flushed."""
    print(f"ready {json.dumps(dict(where), sort_keys=True)}", flush=True)


def ready_teller(environment: Mapping[str, str]) -> Callable[[Mapping[str, object]], None]:
    """`print_ready`, and systemd's notification where a unit of Type=notify asks for it."""

    def tell(where: Mapping[str, object]) -> None:
        print_ready(where)
        address = environment.get("NOTIFY_SOCKET", "")
        if not address:
            return
        # An abstract address is written with an @.
        path = "\0" + address[1:] if address.startswith("@") else address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
            notify.sendto(b"READY=1", path)

    return tell
