"""What was invalidated does not come back by headers that its blocks had left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from dualpath.kvstore import invalidation_cuts
from dualpath.kvstore.block_store import BlockStore, StoreConfig
from dualpath.kvstore.chain import chain_hashes, parents_of
from dualpath.kvstore.directory_format import INVALIDATED_NAME
from dualpath.kvstore.fsck import Fsck
from dualpath.kvstore.fsck_repair import FsckRepair
from dualpath.kvstore.fsck_report import FsckCode
from dualpath.kvstore.invalidation_cuts import InvalidationCuts
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.record import BlockRecord
from dualpath.kvstore.store_api import InvalidationScope, MissReason
from dualpath.kvstore.store_health import Trouble

Content = Callable[[bytes, int], bytes]
SIZE = 300_000
CONFIG = StoreConfig(disk_bytes=8 << 20, dram_bytes=4 << 20, segment_bytes=2 << 20)
A, B = b"a" * 16, b"b" * 16


def record(
    name: str, generation: int, *, parent: str = "", space: bytes = A, writer: str = "w"
) -> BlockRecord:
    spelled = parent.encode().ljust(16, b".") if parent else b""
    hashed = name.encode().ljust(16, b".")
    return BlockRecord(space, hashed, spelled, 4096, 0, 0, generation, (7,), writer, 0.0)


def names_left(cuts: InvalidationCuts, *records: BlockRecord) -> str:
    left = cuts.left({each.key: each for each in records})
    return "".join(sorted(each.hash.rstrip(b".").decode() for each in left.values()))


@pytest.fixture
def cuts(tmp_path: Path) -> InvalidationCuts:
    return InvalidationCuts(tmp_path)


def test_a_namespace_is_cut_up_to_a_generation(cuts: InvalidationCuts) -> None:
    cuts.add([InvalidationScope(A)], 5)
    assert names_left(cuts, record("p", 5), record("q", 6), record("r", 5, space=B)) == "qr"
    cuts.add([InvalidationScope(A)], 3)
    assert names_left(cuts, record("p", 5)) == "", "an earlier one changes nothing"


def test_a_writer_is_cut_in_one_namespace_or_in_all(cuts: InvalidationCuts) -> None:
    cuts.add([InvalidationScope(A, writer="x")], 5)
    cuts.add([InvalidationScope(writer="y")], 5)
    found = [
        record(f"{writer}{space[:1].decode()}", 5, space=space, writer=writer)
        for writer in "xyz"
        for space in (A, B)
    ]
    assert names_left(cuts, *found) == "xbzazb"


def test_a_prefix_is_cut_with_all_below_it_even_below_one_stored_again(
    cuts: InvalidationCuts,
) -> None:
    cuts.add([InvalidationScope(A, record("p", 0).hash)], 5)
    chain = (
        record("o", 1),
        record("p", 9, parent="o"),
        record("q", 3, parent="p"),
        record("r", 7, parent="q"),
        record("s", 4, parent="r"),
        record("t", 4, parent="o"),
    )
    assert names_left(cuts, *chain) == "oprt"
    missing = tuple(each for each in chain if each.hash[:1] != b"p")
    assert names_left(cuts, *missing) == "ort"


def test_blocks_that_hang_in_a_circle_end_no_walk(cuts: InvalidationCuts) -> None:
    cuts.add([InvalidationScope(A, record("p", 0).hash)], 5)
    assert names_left(cuts, record("p", 6, parent="q"), record("q", 6, parent="p")) == "pq"


def test_cuts_are_durable_and_their_number_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invalidation_cuts, "CUTS_MAX", 3)
    cuts = InvalidationCuts(tmp_path)
    for number in range(3):
        cuts.add([InvalidationScope(A, record(f"{number}", 0).hash)], 5)
    assert names_left(InvalidationCuts(tmp_path), record("0", 5), record("3", 5)) == "3"
    cuts.add([InvalidationScope(B, writer="x")], 4)
    again = InvalidationCuts(tmp_path)
    assert names_left(again, record("3", 5), record("4", 6), record("5", 5, space=B)) == "45"
    for number in range(4):
        cuts.add([InvalidationScope(bytes([number]) * 16)], 8)
    assert names_left(InvalidationCuts(tmp_path), record("8", 8), record("9", 9, space=B)) == "9"


class Rig:
    """A store in which a chain of five has been stored and has left again."""

    def __init__(self, root: Path, namespace: Namespace, content: Content) -> None:
        self.root, self.namespace, self.content = root, namespace, content
        self.hashes = chain_hashes(range(80), 16)
        self.store = BlockStore.open(root / "data", CONFIG)
        self.space = self.store.open_namespace(namespace)
        self.put(self.store)
        state = self.store._state
        with state.lock:
            for block in reversed(self.hashes):
                row = state.catalog.row_of(state.catalog.entry(self.space), block)
                state.residency.drop(row, MissReason.EVICTED)

    def put(self, store: BlockStore) -> None:
        space = store.open_namespace(self.namespace)
        data = [self.content(h, SIZE) for h in self.hashes]
        store.put(space, self.hashes, parents_of(self.hashes), data)

    def blocks_without_index(self) -> int:
        """Found by their headers."""
        copy = Path(shutil.copytree(self.root / "data", self.root / "copy"))
        (copy / "index" / "data.mdb").unlink()
        with BlockStore.open(copy, CONFIG) as store:
            assert store.recovered.rebuilt
            blocks = store.recovered.blocks
        shutil.rmtree(copy)
        return blocks


@pytest.fixture
def rig(tmp_path: Path, namespace: Namespace, content: Content) -> Rig:
    return Rig(tmp_path, namespace, content)


def test_evicted_blocks_of_what_was_invalidated_stay_away_without_the_index(rig: Rig) -> None:
    assert rig.blocks_without_index() == 5, "they were only evicted"
    assert rig.store.invalidate(InvalidationScope(rig.space, rig.hashes[3])).blocks == 0
    assert rig.blocks_without_index() == 3
    rig.store.invalidate(InvalidationScope(rig.space), dry_run=True)
    assert rig.blocks_without_index() == 3
    rig.store.invalidate(InvalidationScope(writer="embedded"))
    assert rig.blocks_without_index() == 0
    rig.put(rig.store)
    rig.store.close()
    assert rig.blocks_without_index() == 5, "stored again since"


def test_without_the_list_no_header_is_trusted(rig: Rig) -> None:
    rig.store.invalidate(InvalidationScope(rig.space))
    rig.put(rig.store)
    rig.store.close()
    path = rig.root / "data" / INVALIDATED_NAME
    raw = path.read_bytes()
    path.write_bytes(raw[:9] + bytes([raw[9] ^ 1]) + raw[10:])
    assert rig.blocks_without_index() == 0
    repaired = Path(shutil.copytree(rig.root / "data", rig.root / "repaired"))
    with Fsck(repaired) as fsck:
        assert fsck.check().counts[FsckCode.INVALIDATED_DAMAGED] == 1
        assert FsckRepair(fsck).run().problems == 0
    for directory in (rig.root / "data", repaired):
        with BlockStore.open(directory, CONFIG) as store:
            assert store.recovered.blocks == 5, "the index knows them"
            damaged = directory is not repaired
            assert (Trouble.RECOVERY in store.health().troubles) == damaged
        with BlockStore.open(directory, CONFIG) as store:
            assert Trouble.RECOVERY not in store.health().troubles
            assert store.recovered.blocks == 5
