"""Whether a store that went through something opens, and serves only right bytes.

Run in a process of its own: a damaged store may kill its reader, and that is a finding too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dualpath.bench.soak import world
from dualpath.bench.soak.children import Tell
from dualpath.bench.soak.place import DeviceKind, data_of, open_store
from dualpath.bench.soak.witness import Claims, Witness
from dualpath.kvstore.block_store import BlockStore
from dualpath.kvstore.chain import parents_of
from dualpath.kvstore.fsck import Fsck
from dualpath.kvstore.store_api import ReserveStatus, SealStatus
from dualpath.transfer.errors import DualPathError, InvalidRequest


@dataclass(frozen=True, slots=True)
class Expected:
    """What must be there and what must not; without its index the store is not what fsck expects.
    Keys are namespace id and hash."""

    durable: frozenset[bytes]
    invalidated: frozenset[bytes] = frozenset()
    index_lost: bool = False


@dataclass(slots=True)
class Verdict:
    """What was found. Keys are namespace id and hash."""

    opened: bool = False
    error: str = ""
    served: set[bytes] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Durable and not served."""
    back: list[str] = field(default_factory=list)
    """Invalidated, and served."""
    fsck: str = ""
    """The problems that fsck found before the store was opened; a crash must leave none."""
    corrupt_blocks: int = 0
    """Dropped because their bytes were bad; after a crash there must be none."""
    rebuilt: bool = False
    takes_saves: bool = False
    """Whether it also stores something new, durably."""
    left: set[bytes] = field(default_factory=set)
    """Durable blocks that are there when all this is over."""

    @property
    def bad(self) -> str:
        """What must never happen; "" if all is well."""
        found = []
        if not self.opened:
            found.append(f"it does not open: {self.error}")
        if self.fsck:
            found.append(f"fsck: {self.fsck}")
        if self.wrong:
            found.append(f"{len(self.wrong)} wrong blocks were served: {self.wrong[:3]}")
        if self.missing:
            found.append(f"{len(self.missing)} durable blocks are gone: {self.missing[:3]}")
        if self.back:
            found.append(f"{len(self.back)} invalidated blocks are back: {self.back[:3]}")
        if self.corrupt_blocks:
            found.append(f"{self.corrupt_blocks} blocks that the index names are torn")
        if self.opened and not self.takes_saves:
            found.append("it takes no saves")
        return "; ".join(found)


def verify(tell: Tell, root: Path, device: DeviceKind, expected: Expected, close: bool) -> None:
    """Tell the verdict on the store at `root`. `close` it cleanly, or leave that to whoever ends
    the process."""
    tell(_verdict(root, device, expected, close))


def _verdict(root: Path, device: DeviceKind, expected: Expected, close: bool) -> Verdict:
    """Open the store, read everything that it serves, store one chain."""
    verdict = Verdict()
    if data_of(root).exists() and not expected.index_lost:
        verdict.fsck = _problems(root, device)
    try:
        store = open_store(root, device)
    except (DualPathError, OSError) as error:
        verdict.error = f"{type(error).__name__}: {error}"
        return verdict
    notes: list[bytes] = []
    Witness(store, notes.append)
    verdict.opened = True
    verdict.rebuilt = store.recovered.rebuilt
    for tenant in range(len(world.TENANTS)):
        for number in range(world.CHAINS + 1):  # the last one is our own
            _read(store, tenant, number, verdict)
    verdict.missing = [key.hex() for key in expected.durable - verdict.served]
    verdict.back = [key.hex() for key in expected.invalidated & verdict.served]
    verdict.corrupt_blocks = store.stats().corrupt_blocks
    verdict.takes_saves = _takes_saves(store)
    if close:
        store.close()
    claims = Claims()
    claims.restart(verdict.served)
    claims.follow(notes)
    verdict.left = claims.durable
    return verdict


def _problems(root: Path, device: DeviceKind) -> str:
    """What fsck finds. A directory whose making was cut is none yet, and a raw device that is
    still blank is nobody's."""
    raw = str(root / "raw") if device is DeviceKind.RAW else ""
    try:
        with Fsck(data_of(root), raw_device=raw) as fsck:
            found = [item for item in fsck.check().findings if item.code.is_problem]
    except InvalidRequest:
        return ""
    return ", ".join(f"{item.code.value} {item.where}: {item.detail}" for item in found[:3])


def _read(store: BlockStore, tenant: int, number: int, verdict: Verdict) -> None:
    space = store.open_namespace(world.TENANTS[tenant])
    hashes = world.chain(tenant, number)
    for block_hash, block in zip(hashes, store.get(space, hashes), strict=False):
        if block == world.content(tenant, block_hash):
            verdict.served.add(space + block_hash)
        else:
            verdict.wrong.append((space + block_hash).hex())


def _takes_saves(store: BlockStore) -> bool:
    space = store.open_namespace(world.TENANTS[0])
    hashes = world.chain(0, world.CHAINS)
    data = [world.content(0, h) for h in hashes]
    statuses = store.put(space, hashes, parents_of(hashes), data)
    good = (SealStatus.SEALED, ReserveStatus.EXISTS)
    return all(status in good for status in statuses) and store.get(space, hashes) == data
