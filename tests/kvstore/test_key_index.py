"""KeyIndex: the native index and its twin keep the same promises."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from dualpath.kvstore.key_index import DictKeyIndex, KeyIndex
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from numpy.typing import NDArray

try:
    from dualpath.kvstore._native import KeyIndex as NativeKeyIndex
except ImportError:
    NativeKeyIndex = None  # type: ignore[misc,assignment]


def native() -> KeyIndex:
    return NativeKeyIndex(bytes(range(16)))


MAKERS = [
    pytest.param(DictKeyIndex, id="dict"),
    pytest.param(
        native,
        id="native",
        marks=pytest.mark.skipif(NativeKeyIndex is None, reason="the extension is not built"),
    ),
]
Make = Callable[[], KeyIndex]


class Columns:
    """Columns as a block table has them, and an index over them."""

    def __init__(self, make: Make, rows: int = 0) -> None:
        self.namespaces = np.zeros(rows, np.int32)
        self.hashes = np.zeros((rows, 32), np.uint8)
        self.lengths = np.zeros(rows, np.uint8)
        self.parents = np.full(rows, -1, np.int32)
        self.index = make()
        self.bind()

    def bind(self) -> None:
        self.index.bind(self.namespaces, self.hashes, self.lengths, self.parents)

    def add(self, namespace: int, key: bytes, parent: int = -1) -> int:
        """A row that is not in the index yet."""
        row = len(self.lengths)
        self.namespaces = np.append(self.namespaces, np.int32(namespace))
        padded = np.frombuffer(key.ljust(32, b"\0"), np.uint8)
        self.hashes = np.vstack((self.hashes, padded[None]))
        self.lengths = np.append(self.lengths, np.uint8(len(key)))
        self.parents = np.append(self.parents, np.int32(parent))
        self.bind()
        return row

    def prefix(self, namespace: int, keys: list[bytes]) -> list[int]:
        out = np.full(len(keys), -7, np.int32)
        found = self.index.prefix(namespace, b"".join(keys), len(keys[0]) if keys else 32, out)
        return [int(row) for row in out[:found]]


def random_hashes(count: int, seed: int = 1) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 32), np.uint8)


def filled(make: Make, count: int) -> Columns:
    """One chain of `count` rows, in the index."""
    columns = Columns(make, count)
    columns.hashes[:] = random_hashes(count)
    columns.lengths[:] = 32
    columns.parents[:] = np.arange(-1, count - 1)
    columns.index.put_first(count)
    return columns


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_put_is_found_and_what_is_removed_is_not(make: Make) -> None:
    columns = filled(make, 5000)  # over several growths
    keys = [bytes(row) for row in columns.hashes]
    assert len(columns.index) == 5000
    assert [columns.index.get(0, key) for key in keys] == list(range(5000))
    assert columns.index.get(1, keys[0]) == -1, "another namespace"
    assert columns.index.get(0, keys[0][:31]) == -1, "another size"
    for row in range(0, 5000, 3):
        columns.index.remove(row)
    found = [columns.index.get(0, key) for key in keys]
    assert found == [-1 if row % 3 == 0 else row for row in range(5000)]
    assert len(columns.index) == 5000 - 1667
    assert columns.index.nbytes > 0


@pytest.mark.parametrize("make", MAKERS)
def test_the_prefix_ends_at_the_first_absent_key(make: Make) -> None:
    columns = filled(make, 300)
    keys = [bytes(row) for row in columns.hashes]
    absent = [bytes(row) for row in random_hashes(300, seed=2)]
    for present in (0, 1, 2, 3, 7, 8, 100, 299, 300):
        assert columns.prefix(0, keys[:present] + absent[present:]) == list(range(present))
    assert columns.prefix(0, keys[5:9]) == [5, 6, 7, 8], "it need not begin at a root"
    assert columns.prefix(0, []) == []


@pytest.mark.parametrize("make", MAKERS)
def test_unrelated_keys_are_no_chain(make: Make) -> None:
    columns = filled(make, 100)
    keys = [bytes(row) for row in columns.hashes]
    columns.add(0, b"x" * 32)
    columns.index.put(100)
    assert columns.prefix(0, [keys[0], b"x" * 32]) == [0]
    assert columns.prefix(0, [keys[0], keys[0]]) == [0]
    assert columns.prefix(0, [keys[0], keys[2]]) == [0]
    assert columns.prefix(0, [*keys[:40], b"x" * 32, *keys[40:]]) == list(range(40))
    assert columns.prefix(0, [*keys[:40], b"y" * 32, *keys[41:]]) == list(range(40))
    assert columns.prefix(0, [b"y" * 32, *keys[1:]]) == []


@pytest.mark.parametrize("make", MAKERS)
def test_parents_are_found_by_their_hashes(make: Make) -> None:
    columns = filled(make, 50)
    columns.namespaces[20:] = 0
    wanted = np.vstack((np.zeros((1, 32), np.uint8), columns.hashes[:-1]))
    lengths = np.array([0] + [32] * 49, np.uint8)
    out = np.zeros(50, np.int32)
    columns.index.find_parents(wanted, lengths, out)
    assert out.tolist() == list(range(-1, 49))


@pytest.mark.parametrize("make", MAKERS)
def test_a_bad_argument_raises(make: Make) -> None:
    columns = filled(make, 10)
    index = columns.index
    out = np.zeros(2, np.int32)
    for row in (-1, 10, 1 << 40):
        with pytest.raises((IndexError, OverflowError)):
            index.put(row)
        with pytest.raises((IndexError, OverflowError)):
            index.remove(row)
    with pytest.raises(KeyError, match="row 3 "):
        index.put(3)
    index.remove(3)
    with pytest.raises(KeyError, match="row 3 "):
        index.remove(3)
    for keys, size in ((bytes(96), 32), (bytes(33), 32), (bytes(64), 0), (bytes(66), 33)):
        with pytest.raises(ValueError, match="do not fit"):
            index.prefix(0, keys, size, out)
    with pytest.raises(ValueError, match="into an index of"):
        index.put_first(10)
    with pytest.raises(ValueError, match="rows"):
        index.bind(columns.namespaces[:5], columns.hashes, columns.lengths, columns.parents)
    with pytest.raises(ValueError, match="rows"):
        index.bind(
            columns.namespaces[:5], columns.hashes[:5], columns.lengths[:5], columns.parents[:5]
        )
    with pytest.raises(ValueError, match="rows"):
        index.bind(
            columns.namespaces,
            columns.hashes,
            columns.lengths,
            columns.parents,
            np.zeros(9, np.int32),
        )
    with pytest.raises(ValueError, match="same rows"):
        index.find_parents(columns.hashes[:4], columns.lengths[:3], out)
    assert index.get(0, b"") == -1
    assert index.get(0, bytes(100)) == -1


@pytest.mark.skipif(NativeKeyIndex is None, reason="the extension is not built")
def test_a_parent_outside_of_the_rows_ends_the_walk() -> None:
    columns = filled(native, 10)
    keys = [bytes(row) for row in columns.hashes]
    for wild in (-5, 10, 1 << 30, -(1 << 31)):
        columns.parents[5] = wild
        assert columns.prefix(0, keys) == list(range(5))
    with pytest.raises(ValueError, match="16 bytes"):
        NativeKeyIndex(b"short")


@pytest.mark.skipif(NativeKeyIndex is None, reason="the extension is not built")
def test_a_native_key_costs_at_most_twenty_bytes() -> None:
    for count in (1000, 5000, 20_000, 53_250):
        columns = filled(native, count)
        # Let a growth that is under way end.
        for _ in range(2 * count // 32):
            columns.index.remove(0)
            columns.index.put(0)
        assert columns.index.nbytes <= max(20 * count, 1 << 14)


KEYS = st.binary(min_size=16, max_size=17) | st.sampled_from([bytes(16), bytes(17), b"\1" * 32])


@pytest.mark.parametrize("make", MAKERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_prefix_is_what_walking_down_finds(make: Make, data: st.DataObject) -> None:
    columns = Columns(make)
    rows: dict[tuple[int, bytes], int] = {}
    for _ in range(data.draw(st.integers(1, 30))):
        name = (data.draw(st.integers(0, 1)), data.draw(KEYS))
        if name in rows:
            continue
        parent = data.draw(st.sampled_from([-1, *rows.values()]))
        rows[name] = columns.add(*name, parent)
        columns.index.put(rows[name])
    namespace, size = data.draw(st.integers(0, 1)), data.draw(st.sampled_from([16, 17, 32]))
    known = [key for space, key in rows if space == namespace and len(key) == size]
    choice = st.sampled_from(known) if known else st.binary(min_size=size, max_size=size)
    keys = data.draw(st.lists(choice | st.binary(min_size=size, max_size=size), max_size=12))
    if known:  # a real chain, with something behind
        row, chain = rows[(namespace, data.draw(st.sampled_from(known)))], []
        while row >= 0 and columns.lengths[row] == size and columns.namespaces[row] == namespace:
            chain.append(columns.hashes[row, :size].tobytes())
            row = int(columns.parents[row])
        keys = chain[::-1] + keys
    expected: list[int] = []
    for key in keys:
        row = rows.get((namespace, key), -1)
        if row < 0 or (expected and columns.parents[row] != expected[-1]):
            break
        expected.append(row)
    out = np.zeros(len(keys), np.int32)
    found = columns.index.prefix(namespace, b"".join(keys), size, out)
    assert out[:found].tolist() == expected


class IndexMachine(RuleBasedStateMachine):
    """Put and remove at random, through growths, against a set."""

    make: Make = DictKeyIndex

    @initialize()
    def start(self) -> None:
        self.columns = Columns(type(self).make, 4096)
        self.columns.hashes[:] = random_hashes(4096)
        self.columns.lengths[:] = 20
        self.present: set[int] = set()

    @rule(first=st.integers(0, 4095), count=st.integers(1, 700))
    def put(self, first: int, count: int) -> None:
        for row in range(first, min(first + count, 4096)):
            if row in self.present:
                with pytest.raises(KeyError):
                    self.columns.index.put(row)
            else:
                self.columns.index.put(row)
                self.present.add(row)

    @rule(first=st.integers(0, 4095), count=st.integers(1, 300), step=st.integers(1, 5))
    def remove(self, first: int, count: int, step: int) -> None:
        for row in range(first, min(first + count * step, 4096), step):
            if row in self.present:
                self.columns.index.remove(row)
                self.present.discard(row)
            else:
                with pytest.raises(KeyError):
                    self.columns.index.remove(row)

    @invariant()
    def all_are_found(self) -> None:
        index = self.columns.index
        assert len(index) == len(self.present)
        data = self.columns.hashes[:, :20].tobytes()
        rows = (index.get(0, data[start : start + 20]) for start in range(0, len(data), 20))
        assert {row for row in rows if row >= 0} == self.present


@pytest.mark.parametrize("make", MAKERS)
def test_any_order_of_changes_keeps_all_keys(make: Make) -> None:
    class Machine(IndexMachine):
        pass

    Machine.make = staticmethod(make)
    case = Machine.TestCase
    case.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
    case("runTest").runTest()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("run", [1, 3, 5, 16, 17, 40])
def test_a_prefix_is_found_however_its_rows_lie(make: Make, run: int) -> None:
    # Two chains that grew in turns, each row the parent of the next of its own chain.
    rows = 300
    columns = filled(make, rows)
    chains = [[row for row in range(rows) if row // run % 2 == which] for which in (0, 1)]
    for chain in chains:
        columns.parents[chain] = [-1, *chain[:-1]]
    leases, resident = np.zeros(rows, np.int32), np.zeros(rows, np.bool_)
    columns.index.bind(
        columns.namespaces, columns.hashes, columns.lengths, columns.parents, leases, resident
    )
    for chain in chains:
        keys = [bytes(columns.hashes[row]) for row in chain]
        assert columns.prefix(0, keys) == chain
        assert columns.prefix(0, keys[:7]) == chain[:7]
        assert columns.prefix(0, [*keys[:9], bytes(32), *keys[9:]]) == chain[:9]
    assert not leases.any()
