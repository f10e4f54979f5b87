"""The folder of one run: sockets, logs and the store; removed with those that killed runs left.

Its path is short, since Unix sockets lie in it (their paths have 107 bytes).
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from dualpath.bench.testbed.ownership import is_stale, owner_tag


def make_run_folder(prefix: str, *, kept: bool = False) -> Path:
    """A new folder `<prefix><tag of this process>`; with `kept` no later run removes it."""
    temporary = Path(tempfile.gettempdir())
    for path in temporary.glob(f"{prefix}*"):
        if is_stale(path.name, prefix):
            shutil.rmtree(path, ignore_errors=True)
    folder = temporary / f"{prefix}{'kept-' if kept else ''}{owner_tag()}"
    folder.mkdir(mode=0o700)
    return folder
