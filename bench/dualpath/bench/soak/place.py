"""Where a store of the soak lies, and on which device its segments are.

A root holds the data directory and, for the raw device, the file that stands for it: all of what
a recording must see, and nothing else.
"""

from __future__ import annotations

import enum
from dataclasses import replace
from pathlib import Path

from dualpath.bench.soak.world import STORE
from dualpath.kvstore.block_store import BlockStore
from dualpath.kvstore.io_mode import IoMode
from dualpath.kvstore.store_config import StoreConfig

_RAW_BYTES = STORE.disk_bytes + (4 << 20)


class DeviceKind(enum.Enum):
    """Which device moves the bytes of segments."""

    PSYNC = "psync"
    RING = "io_uring"
    RAW = "raw"

    @property
    def family(self) -> str:
        """Kinds of one family can open each other's stores."""
        return "raw" if self is DeviceKind.RAW else "files"


def make_place(root: Path, family: str) -> None:
    """Make the root of a store that does not exist yet."""
    root.mkdir(parents=True)
    if family == DeviceKind.RAW.family:
        with (root / "raw").open("wb") as file:
            file.truncate(_RAW_BYTES)


def data_of(root: Path) -> Path:
    """The data directory."""
    return root / "data"


def store_config(root: Path, kind: DeviceKind) -> StoreConfig:
    """The configuration of a store there."""
    io = IoMode.AUTO if kind is DeviceKind.RING else IoMode.PSYNC
    raw = str(root / "raw") if kind is DeviceKind.RAW else ""
    return replace(STORE, io=io.value, raw_device=raw)


def open_store(root: Path, kind: DeviceKind) -> BlockStore:
    """Open it. Raises what BlockStore.open raises."""
    return BlockStore.open(data_of(root), store_config(root, kind))
