"""Rounds of rot: one flipped byte of a store that was closed cleanly, then fsck, then a reader.

The byte is drawn from those that mean something: all but the data of free slots and the number in
LOCK. Each kind of place gets an equal share, so that small files are hit as hard as data. fsck
must find each; the store that opens must serve nothing wrong. Every so often the damage is
repaired, and the repaired store must open, be clean, and serve nothing wrong either. All of it in
children: one that dies of a flipped byte is a finding.
"""

from __future__ import annotations

import enum
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from dualpath.bench.soak import world
from dualpath.bench.soak.children import Child, ChildLost, Nursery, Tell
from dualpath.bench.soak.place import DeviceKind, data_of, make_place, open_store
from dualpath.kvstore.block_store import BlockStore
from dualpath.kvstore.chain import parents_of
from dualpath.kvstore.device import ALIGN_BYTES
from dualpath.kvstore.fsck import Fsck
from dualpath.kvstore.fsck_repair import FsckRepair
from dualpath.kvstore.fsck_report import FsckCode
from dualpath.kvstore.namespace_files import COPIES_NAME, NAMESPACES_NAME
from dualpath.kvstore.record import BlockRecord
from dualpath.kvstore.store_api import MissReason
from dualpath.transfer.errors import DualPathError, InvalidRequest

_CHAINS = 4
"""Of each tenant, in the store that is damaged: about 4 MB."""
_REPAIRED_EVERY = 20
_BATCH = 100
_WAIT_S_MAX = 300.0


class Spot(enum.Enum):
    """Kinds of places."""

    DATA = "data"
    HEADERS = "headers"
    SUPERBLOCK = "superblock"
    INDEX = "index"
    SNAPSHOT = "snapshot"
    NAMESPACE = "namespace"
    META = "meta"
    CLEAN = "clean"


@dataclass(frozen=True, slots=True)
class Flip:
    """Byte `offset` of `name` (below the data directory) is xored with `mask`."""

    number: int
    spot: Spot
    name: str
    offset: int
    mask: int


@dataclass(slots=True)
class FlipRound:
    """What came of a flip."""

    flip: Flip
    found: bool = False
    refused: bool = False
    """The store did not open, with a reason."""
    wrong: int = 0
    """Wrong blocks that were served."""
    lost: int = 0
    """Blocks that were not served."""
    repaired: bool = False
    bad: str = ""


class FlipRounds:
    """See the module docstring. `folder` is emptied."""

    def __init__(self, nursery: Nursery, folder: Path, seed: int) -> None:
        self._nursery = nursery
        self._dice = random.Random(seed)
        self._root, self._work = folder / "whole", folder / "work"
        shutil.rmtree(folder, ignore_errors=True)
        make_place(self._root, DeviceKind.PSYNC.family)
        nursery.call(made_store, self._root, wait_s=_WAIT_S_MAX)
        self._places = _places(data_of(self._root))

    def rounds(self, count: int) -> Iterator[FlipRound]:
        """Flip `count` bytes, one at a time."""
        flips = [self._draw(number) for number in range(count)]
        last = flips[-1] if flips else None
        while flips:
            child = self._nursery.start(flipped, self._root, self._work, tuple(flips[:_BATCH]))
            done = 0
            try:
                for _ in flips[:_BATCH]:
                    yield self._heard(child)
                    done += 1
            except ChildLost as error:
                yield FlipRound(flips[done], bad=f"a process died of it: {error}")
                done += 1
            finally:
                child.kill()
            del flips[:done]
        if last is not None:
            with Fsck(data_of(self._root)) as fsck:
                if fsck.check().findings:
                    yield FlipRound(last, bad="the store that was copied is damaged itself")

    def _heard(self, child: Child) -> FlipRound:
        heard = child.hear(_WAIT_S_MAX)
        assert isinstance(heard, FlipRound)
        return heard

    def _draw(self, number: int) -> Flip:
        spot = self._dice.choice(list(Spot))
        ranges = self._places[spot]
        total = sum(len(span) for _, span in ranges)
        at = self._dice.randrange(total)
        for name, span in ranges:
            if at < len(span):
                return Flip(number, spot, name, span[at], self._dice.randrange(1, 256))
            at -= len(span)
        raise AssertionError("unreachable")


def made_store(tell: Tell, root: Path) -> None:
    """Make a store of some chains, with a few blocks evicted, and close it cleanly."""
    with open_store(root, DeviceKind.PSYNC) as store:
        for tenant, namespace in enumerate(world.TENANTS):
            space = store.open_namespace(namespace)
            for number in range(_CHAINS):
                hashes = list(world.chain(tenant, number))
                data = [world.content(tenant, h) for h in hashes]
                store.put(space, hashes, parents_of(hashes), data)
            _drop(store, space, world.chain(tenant, 1))
    tell(None)


def _drop(store: BlockStore, space: bytes, hashes: tuple[bytes, ...]) -> None:
    """Take the end of a chain out, as eviction does: headers and data stay behind."""
    hit = store.lookup(space, hashes, owner="soak", lease_s=60)
    state = store._state
    with state.lock:
        row = int(state.leases.find(hit.lease_id, state.clock()).rows[world.SHARED_BLOCKS])
        state.residency.drop(row, MissReason.EVICTED)
    store.release(hit.lease_id, owner="soak")


def _places(data: Path) -> dict[Spot, list[tuple[str, range]]]:
    """The bytes that mean something, by kind: (file, offsets)."""
    places: dict[Spot, list[tuple[str, range]]] = {spot: [] for spot in Spot}

    def whole(spot: Spot, path: Path) -> None:
        places[spot].append((str(path.relative_to(data)), range(path.stat().st_size)))

    whole(Spot.META, data / "META")
    whole(Spot.CLEAN, data / "CLEAN")
    whole(Spot.INDEX, data / "index" / "data.mdb")
    whole(Spot.SNAPSHOT, data / "index.snapshot")
    for folder in (NAMESPACES_NAME, COPIES_NAME):
        for path in (data / folder).iterdir():
            whole(Spot.NAMESPACE, path)
    with Fsck(data) as fsck:
        fsck.check()
        records = [BlockRecord.from_bytes(raw) for raw in fsck.state.records.values()]
        for segment in fsck.state.segments.values():
            geometry, name = segment.geometry, f"segments/{segment.name}"
            assert geometry is not None
            places[Spot.SUPERBLOCK].append((name, range(ALIGN_BYTES)))
            places[Spot.HEADERS].append((name, range(ALIGN_BYTES, geometry.data_offset)))
            for record in records:
                if record.segment == segment.number:
                    start = geometry.slot_offset(record.slot)
                    places[Spot.DATA].append((name, range(start, start + geometry.slot_bytes)))
    return places


def flipped(tell: Tell, root: Path, work: Path, flips: tuple[Flip, ...]) -> None:
    """Try flips one by one, on a copy, and tell of each."""
    for flip in flips:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(root, work, copy_function=partial(_copy, flip))
        with (data_of(work) / flip.name).open("r+b") as file:
            file.seek(flip.offset)
            (byte,) = file.read(1)
            file.seek(flip.offset)
            file.write(bytes([byte ^ flip.mask]))
        tell(_tried(work, flip))


def _copy(flip: Flip, source: str, target: str) -> None:
    """Segments that stay as they are are shared: nobody writes to them."""
    if "segment-" in source and not source.endswith(flip.name):
        os.link(source, target)
    else:
        shutil.copyfile(source, target)


@cache
def _content(tenant: int, block_hash: bytes) -> bytes:
    return world.content(tenant, block_hash)


def _tried(root: Path, flip: Flip) -> FlipRound:
    done = FlipRound(flip)
    try:
        with Fsck(data_of(root)) as fsck:
            report = fsck.check()
            done.found = bool(report.findings)
            if flip.number % _REPAIRED_EVERY == 0:
                left = FsckRepair(fsck).run()
                done.repaired = True
                done.bad = f"{left.problems} problems after a repair" if left.problems else ""
                done.found = done.found and not left.has(FsckCode.FREE_HEADER_DAMAGED)
    except InvalidRequest as error:
        done.found = error.reason == "newer_format"
    _serve(root, done)
    if not done.found:
        done.bad = f"not found; {done.bad}"
    if done.wrong:
        done.bad = f"{done.wrong} wrong blocks were served; {done.bad}"
    return done


def _serve(root: Path, done: FlipRound) -> None:
    """Open the store, if it opens, and read everything."""
    try:
        store = open_store(root, DeviceKind.PSYNC)
    except DualPathError as error:
        done.refused = True
        if done.repaired and error.reason != "newer_format":
            done.bad = f"it does not open after a repair: {error}"
        return
    with store:
        for tenant, namespace in enumerate(world.TENANTS):
            space = store.open_namespace(namespace)
            for number in range(_CHAINS):
                hashes = world.chain(tenant, number)
                found = store.get(space, hashes)
                done.lost += len(hashes) - len(found)
                done.wrong += sum(
                    block != _content(tenant, h) for h, block in zip(hashes, found, strict=False)
                )
