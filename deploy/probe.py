"""The health check of a container: asks the process's own probe, and needs nothing but Python.

Exits with 0 if it answers 200, else with 1 and the reason on stdout, where Docker keeps it.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 4.0
VARIABLE = "DUALPATH_PROBE"


def main() -> int:
    """Ask once."""
    url = os.environ.get(VARIABLE, "")
    if not url.startswith("http://"):
        print(f"{VARIABLE} must be http://HOST:PORT/healthz or /readyz, not {url!r}")
        return 1
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            print(answer.read(1000).decode(errors="replace").strip())
            return 0
    except urllib.error.HTTPError as error:
        print(error.read(1000).decode(errors="replace").strip())
    except (OSError, ValueError) as error:
        print(f"{url}: {error}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
