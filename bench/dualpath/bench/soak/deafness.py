"""Syncs that do nothing: how the soak proves that it would notice.

A store whose data, index or names are not synced must lose something when the power goes. Only
for a child process that is to be recorded.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from functools import partial

import lmdb
from dualpath.kvstore import (
    data_directory,
    directory_format,
    durable_index,
    fd_file,
    psync_device,
    recovery,
)
from dualpath.kvstore.record import BlockRecord


class Deafness(enum.Enum):
    """What is not synced."""

    DATA = "data"
    INDEX = "index"
    NAMES = "names"
    FOUND = "found"
    """What an opening after a kill has found by headers, and lets the index tell of."""


def deafen(kind: Deafness) -> None:
    """From now on, in this process."""
    if kind is Deafness.DATA:
        fd_file.FdFile.sync = _nothing  # type: ignore[method-assign,assignment]
    elif kind is Deafness.INDEX:
        lmdb.open = partial(lmdb.open, sync=False)  # type: ignore[assignment]
    elif kind is Deafness.FOUND:
        recovery.flushed = _unflushed  # type: ignore[attr-defined,assignment]
    else:
        for module in (data_directory, directory_format, durable_index, psync_device):
            module.sync_directory = _nothing  # type: ignore[attr-defined]


def _unflushed(
    records: Mapping[bytes, BlockRecord], *_where: object, again: bool
) -> dict[bytes, BlockRecord]:
    return dict(records)


def _nothing(_what: object) -> None:
    """Instead of a sync."""
