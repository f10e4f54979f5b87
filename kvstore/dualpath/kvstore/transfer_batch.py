"""Many transfers at once between the files of a device and one memory: values and their progress.

`TransferBatch` says what to move, as arrays: no object an item. `BatchProgress` is a batch under
way. Contract, held by every device and by `check_device`:

Order
    None among items. Items must not overlap in memory, nor, when writing, in a file.
Depth
    The device moves a bounded number of items at a time and starts the next ones inside `wait`:
    a batch that nobody waits for may stand still.
Memory
    An item's memory belongs to the device until the item has ended, whatever the caller has
    asked for meanwhile: `cancel` only hurries it, a timeout ends nothing. The device keeps the
    memory itself alive.
Who may call
    One thread at a time for one batch; any number of batches at once.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dualpath.kvstore.device import DeviceFile

BATCH_ITEMS_MAX = 1 << 16
ITEM_BYTES_MAX = 1 << 30
UNDER_WAY = -1
"""In `BatchProgress.errors`: the item has not ended."""


@dataclass(frozen=True, slots=True)
class TransferBatch:
    """Item i moves `nbytes[i]` bytes between `files[file[i]]` at `offset[i]` and `memory` at
    `at[i]`. All arrays have the same length; all numbers are multiples of ALIGN_BYTES."""

    files: Sequence[DeviceFile]
    file: NDArray[np.int32]
    offset: NDArray[np.int64]
    memory: memoryview
    at: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    depth: int = 0
    """Most items in flight where the device can tell them apart; 0: as many as it likes."""
    paced: bool = False
    """Rather tell of some items early than of many at once: whoever waits has work on each, which
    goes on beside the transfers that are left. Costs a little in wakes."""

    def __len__(self) -> int:
        return len(self.offset)

    def view(self, item: int) -> memoryview:
        """The memory of an item."""
        start = int(self.at[item])
        return self.memory[start : start + int(self.nbytes[item])]


class BatchProgress(Protocol):
    """A batch under way. See the module docstring."""

    @property
    def errors(self) -> NDArray[np.int32]:
        """Of each item: 0 once all its bytes have moved, UNDER_WAY, or the errno of its failure
        (EIO, ENOSPC, ...; ECANCELED after `cancel`)."""

    @property
    def pending(self) -> int:
        """Items that have not ended."""

    def wait(self, timeout_s: float, least: int = 1) -> NDArray[np.int32]:
        """Items that have ended since the last call, when there are `least` at the latest; none
        when the time is over or nothing is pending. Each item is told once."""

    def cancel(self) -> None:
        """End what is pending soon, as ECANCELED where it has not moved. Go on waiting."""


def check_batch(batch: TransferBatch, align_bytes: int) -> None:
    """Raises OSError (EINVAL) if the batch breaks the contract."""
    items = len(batch)
    if items > BATCH_ITEMS_MAX:
        raise OSError(errno.EINVAL, f"{items} transfers in one batch; at most {BATCH_ITEMS_MAX}")
    if not len(batch.file) == len(batch.at) == len(batch.nbytes) == items:
        raise OSError(errno.EINVAL, "the arrays of a batch differ in length")
    if items == 0:
        return
    if batch.file.min() < 0 or batch.file.max() >= len(batch.files):
        raise OSError(errno.EINVAL, f"a transfer names a file outside of 0..{len(batch.files) - 1}")
    # The lowest bits of all numbers, and a sign if one of them has it.
    all_bits = int(np.bitwise_or.reduce(batch.offset | batch.at | batch.nbytes))
    if all_bits % align_bytes:
        raise OSError(errno.EINVAL, "a transfer of the batch is not 4 KiB-aligned")
    file_bytes = [file.nbytes for file in batch.files]
    sizes = np.array(file_bytes, np.int64)[batch.file] if len(file_bytes) > 1 else file_bytes[0]
    # No sum is made of what was given: it could overflow.
    bad = (batch.offset > sizes - batch.nbytes) | (batch.at > batch.memory.nbytes - batch.nbytes)
    if all_bits < 0 or batch.nbytes.min() < 1 or batch.nbytes.max() > ITEM_BYTES_MAX:
        bad |= (batch.offset < 0) | (batch.at < 0) | (batch.nbytes < 1)
        bad |= batch.nbytes > ITEM_BYTES_MAX
    if bad.any():
        item = int(bad.argmax())
        raise OSError(
            errno.EINVAL,
            f"transfer {item}: {batch.nbytes[item]} bytes at {batch.offset[item]} of "
            f"{file_bytes[batch.file[item]]}, in memory at {batch.at[item]} of "
            f"{batch.memory.nbytes}",
        )


class FailedProgress:
    """A batch that could not begin: every item has failed with one errno."""

    def __init__(self, items: int, error: int) -> None:
        self.pending = items
        self.errors: NDArray[np.int32] = np.full(items, error, np.int32)

    def wait(self, timeout_s: float, least: int = 1) -> NDArray[np.int32]:
        """See BatchProgress."""
        count, self.pending = self.pending, 0
        return np.arange(count, dtype=np.int32)

    def cancel(self) -> None:
        """See BatchProgress."""


class SerialProgress:
    """The reference: each `wait` moves one item with `move(file, offset, view)`."""

    def __init__(
        self, batch: TransferBatch, move: Callable[[DeviceFile, int, memoryview], None]
    ) -> None:
        self._batch = batch
        self._move = move
        self._next = 0
        self._cancelled = False
        self.errors: NDArray[np.int32] = np.full(len(batch), UNDER_WAY, np.int32)

    @property
    def pending(self) -> int:
        """See BatchProgress."""
        return len(self._batch) - self._next

    def wait(self, timeout_s: float, least: int = 1) -> NDArray[np.int32]:
        """See BatchProgress."""
        item = self._next
        if item == len(self._batch):
            return np.empty(0, np.int32)
        self._next += 1
        self.errors[item] = errno.ECANCELED if self._cancelled else self._moved(item)
        return np.array([item], np.int32)

    def _moved(self, item: int) -> int:
        batch = self._batch
        try:
            file = batch.files[int(batch.file[item])]
            self._move(file, int(batch.offset[item]), batch.view(item))
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def cancel(self) -> None:
        """See BatchProgress."""
        self._cancelled = True


def read_one(file: DeviceFile, offset: int, view: memoryview) -> None:
    """Read an item by itself."""
    file.read(offset, [view])


def write_one(file: DeviceFile, offset: int, view: memoryview) -> None:
    """Write an item by itself."""
    file.write(offset, [view])
