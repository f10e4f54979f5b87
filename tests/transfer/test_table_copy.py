"""Parts of tables copied with one call: native and in Python alike."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from types import ModuleType

import pytest
import xxhash
from dualpath.transfer import table_copy, table_copy_twin
from dualpath.transfer.slice_table import SliceTable
from dualpath.transfer.stream_io import HASHED_BYTES_MIN
from dualpath.transfer.window import WindowTable
from hypothesis import given, settings
from hypothesis import strategies as st

try:
    from dualpath.transfer import _native
except ImportError:
    _native = None  # type: ignore[assignment]

GO = bytearray(1)


def _numbers(*values: int) -> array[int]:
    return array("Q", values)


STRIPE_BYTES = 64
QUIET = settings(max_examples=80, deadline=None)


@pytest.fixture(params=["native", "python"], scope="module")
def copier(request: pytest.FixtureRequest) -> ModuleType:
    if request.param == "python":
        return table_copy_twin
    if _native is None:
        pytest.skip("the native extension is not built")
    return _native


def _data(nbytes: int, salt: int = 0) -> bytes:
    return bytes((i * 131 + (i >> 8) * 17 + salt) & 0xFF for i in range(nbytes))


@st.composite
def tables(draw: st.DrawFn, sizes: list[int]) -> SliceTable:
    """Parts of these sizes that overlap nowhere, in slices of any length."""
    even = draw(st.booleans())
    length = draw(st.integers(1, 40)) * STRIPE_BYTES if even else draw(st.integers(1, 3_000))
    stride = length + draw(st.sampled_from([0, 1, 32, 64, 1_000]))
    skips = [draw(st.integers(0, 3)) * (STRIPE_BYTES if even else 1) for _ in sizes]
    count = max(-(-(skip + size) // length) for skip, size in zip(skips, sizes, strict=True))
    span = stride * count
    order = draw(st.permutations(range(len(sizes))))
    bases = [span * place + draw(st.integers(0, 1)) * 32 for place in order]
    return SliceTable(stride + 64 if count > 1 else stride, count, length, bases, skips, sizes)


def _bytes_of(memory: bytes | bytearray, table: SliceTable, part: int) -> bytes:
    return b"".join(memory[at : at + n] for at, n in table.part(part).pieces())


def _places(table: SliceTable) -> table_copy.Places:
    if table.solid:
        return 1, 1, table.bases, table.skips
    return table.stride, table.length, table.bases, table.skips


@QUIET
@given(st.data(), st.booleans())
def test_each_part_lands_whole_in_its_place_and_nothing_else_is_touched(
    copier: ModuleType, data: st.DataObject, hashed: bool
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9_000), min_size=1, max_size=6))
    if data.draw(st.booleans()):
        sizes = [-(-size // STRIPE_BYTES) * STRIPE_BYTES for size in sizes]
    to, from_ = data.draw(tables(sizes)), data.draw(tables(sizes))
    source = _data(from_.span()[1])
    target = bytearray(_data(to.span()[1] + 100, 99))
    expected = bytearray(target)
    for part in range(len(sizes)):
        moved, done = _bytes_of(source, from_, part), 0
        for at, nbytes in to.part(part).pieces():
            expected[at : at + nbytes] = moved[done : done + nbytes]
            done += nbytes
    digests = copier.copy_parts(to.sizes, target, _places(to), source, _places(from_), GO, hashed)
    assert target == expected
    assert len(digests) == len(sizes)
    for part, digest in enumerate(digests):
        right = xxhash.xxh3_64_intdigest(_bytes_of(source, from_, part))
        assert digest in ((0, right) if hashed else (0,))
        if hashed and sizes[part] >= HASHED_BYTES_MIN and to.solid and from_.solid:
            assert digest == right
    twin = table_copy_twin.copy_parts(
        to.sizes, target, _places(to), source, _places(from_), GO, hashed
    )
    assert twin == digests


@pytest.mark.parametrize("nbytes", [64, 240, 241, 1024, 1025, (256 << 10) + 5, (1 << 20) + 63])
def test_sizes_around_the_steps_of_the_hash_and_of_the_copy(
    copier: ModuleType, nbytes: int
) -> None:
    source, target = _data(nbytes), bytearray(nbytes)
    place = (1, 1, _numbers(0), _numbers(0))
    digests = copier.copy_parts(_numbers(nbytes), target, place, source, place, GO, True)
    assert target == source
    right = xxhash.xxh3_64_intdigest(source)
    assert digests == [right if nbytes >= HASHED_BYTES_MIN else 0]


def test_layers_of_a_chunk_are_hashed_over_their_slices(copier: ModuleType) -> None:
    slice_bytes, slices = 40 << 10, 25
    source, target = _data(slice_bytes * slices), bytearray(2 * slice_bytes * slices)
    digests = copier.copy_parts(
        _numbers(len(source)),
        target,
        (2 * slice_bytes, slice_bytes, _numbers(0), _numbers(0)),
        source,
        (1, 1, _numbers(0), _numbers(0)),
        GO,
        True,
    )
    assert digests == [xxhash.xxh3_64_intdigest(source)]


def test_an_interrupt_ends_a_copy_before_the_next_step(copier: ModuleType) -> None:
    target = bytearray(1 << 20)
    place = (1, 1, _numbers(0, 1 << 19), _numbers(0, 0))
    sizes = _numbers(1 << 19, 1 << 19)
    assert copier.copy_parts(sizes, target, place, bytes(1 << 20), place, b"\1", True) == []
    assert target == bytes(1 << 20)


@pytest.mark.parametrize(
    ("sizes", "places"),
    [
        ([], (1, 1, [], [])),
        ([1] * 2000, (1, 1, [0] * 2000, [0] * 2000)),
        ([0], (1, 1, [0], [0])),
        ([101], (1, 1, [0], [0])),
        ([1], (1, 1, [100], [0])),
        ([1], (1, 1, [(1 << 64) - 1], [0])),
        ([1], (1, 1, [0], [100])),
        ([10], (50, 10, [0], [25])),
        ([10], (5, 10, [0], [0])),
        ([10], (0, 0, [0], [0])),
        ([1, 1], (1, 1, [0], [0, 0])),
        ([(1 << 63) - 1], (1, 1, [(1 << 63) - 1], [(1 << 63) - 1])),
        ([1], ((1 << 63) - 1, 1, [1], [(1 << 62)])),
    ],
)
def test_parts_that_leave_their_memory_are_refused_by_name(
    copier: ModuleType, sizes: list[int], places: tuple[int, int, list[int], list[int]]
) -> None:
    memory, counts = bytearray(100), _numbers(*sizes)
    stride, length, bases, skips = places
    bad = (stride, length, _numbers(*bases), _numbers(*skips))
    good = (1, 1, _numbers(*[0] * len(sizes)), _numbers(*[0] * len(sizes)))
    with pytest.raises(ValueError, match=r"part|slices|bases"):
        copier.copy_parts(counts, memory, bad, bytes(1 << 12), good, GO, True)
    with pytest.raises(ValueError, match=r"part|slices|bases"):
        copier.copy_parts(counts, bytearray(1 << 12), good, memory, bad, GO, True)
    one = (1, 1, _numbers(0), _numbers(0))
    with pytest.raises(ValueError, match="interrupt"):
        copier.copy_parts(_numbers(1), memory, one, memory, one, b"", True)
    assert memory == bytes(100)


class _Landed:
    """A window on `nbytes` bytes with parts begun, but for those that are `unarmed`."""

    def __init__(self, table: SliceTable, nbytes: int, unarmed: Sequence[int] = ()) -> None:
        from dualpath.transfer.region import Region

        self.windows, self.region = WindowTable(), Region.anonymous(nbytes)
        self.window = self.windows.expose(self.region, 0, nbytes, lambda _: True)
        self.windows.arm_table(self.window, 0, table)
        self.windows.disarm(self.window, unarmed)
        landing = self.windows.begin_table("p", self.window.key, self.window.generation, 0, table)
        assert landing is not None
        self.landing = landing


def test_parts_that_are_fenced_are_passed_over_and_the_others_land() -> None:
    size = 4096
    table = SliceTable.contiguous([size * i for i in range(6)], [size] * 6)
    scene = _Landed(table, 6 * size, unarmed=[0])
    scene.windows.disarm(scene.window, [3])
    source, at, runs = memoryview(_data(6 * size)), 0, []
    while at < 6:
        last, digests = table_copy.land_some(scene.landing, source, table, at)
        assert len(digests) == last - at
        runs.append((at, last))
        at = last
    assert runs == [(0, 1), (1, 3), (3, 4), (4, 6)]
    for part in range(6):
        landed = bytes(scene.region.view[part * size : (part + 1) * size])
        sent = source[part * size : (part + 1) * size]
        assert landed == (bytes(size) if part in (0, 3) else sent)


def test_who_fences_while_parts_are_copied_waits_for_a_step_and_no_byte_follows() -> None:
    size, count = 1 << 20, 32
    table = SliceTable.contiguous([size * i for i in range(count)], [size] * count)
    scene = _Landed(table, size * count)
    source = memoryview(bytearray(b"\xff" * (size * count)))
    begun = threading.Event()

    def copy() -> None:
        at = 0
        while at < count:
            at, _ = table_copy.land_some(scene.landing, source, table, at)
            begun.set()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    assert begun.wait(20)
    scene.windows.revoke(scene.window)
    before = bytes(scene.region.view)
    thread.join(20)
    assert not thread.is_alive()
    assert scene.region.view == before
