"""The independent check of loaded bytes: nothing wrong passes."""

import random

import pytest
from dualpath.bench.testbed.keyed_content import KeyedContent
from dualpath.kvstore.layout import KVLayout
from dualpath.transfer.errors import InvalidRequest
from hypothesis import given, settings
from hypothesis import strategies as st

LAYOUTS = [KVLayout(4, 64, 4096, "u8"), KVLayout(3, 64, 41984 // 8 + 3, "u8")]


def filled(layout: KVLayout, content: KeyedContent, keys: list[bytes]) -> bytearray:
    """Paged memory `[layers, pages, layer_bytes]`, key i on page i."""
    memory = bytearray(len(keys) * layout.block_bytes)
    for page, key in enumerate(keys):
        content.fill(
            key, memoryview(memory), page * layout.layer_bytes, len(keys) * layout.layer_bytes
        )
    return memory


@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_right_blocks_pass_and_one_flipped_bit_is_found_where_it_is(
    layout: KVLayout, data: st.DataObject
) -> None:
    content = KeyedContent(layout, 7)
    keys = [data.draw(st.binary(min_size=16, max_size=32), label="key") for _ in range(3)]
    memory = filled(layout, content, keys)
    stride = 3 * layout.layer_bytes
    for page, key in enumerate(keys):
        base = page * layout.layer_bytes
        assert content.verify(key, memoryview(memory), base, stride) is None
    layer = data.draw(st.integers(0, layout.layers - 1), label="layer")
    offset = data.draw(st.integers(0, layout.layer_bytes - 1), label="offset")
    page = data.draw(st.integers(0, 2), label="page")
    memory[layer * stride + page * layout.layer_bytes + offset] ^= 1 << data.draw(
        st.integers(0, 7), label="bit"
    )
    for other, key in enumerate(keys):
        base = other * layout.layer_bytes
        wrong = content.verify(key, memoryview(memory), base, stride)
        if other == page:
            assert wrong is not None
            assert (wrong.layer, wrong.offset_bytes, wrong.wrong_bytes) == (layer, offset, 1)
        else:
            assert wrong is None


@given(first=st.binary(min_size=16, max_size=32), second=st.binary(min_size=16, max_size=32))
@settings(max_examples=60, deadline=None)
def test_another_blocks_bytes_are_wrong(first: bytes, second: bytes) -> None:
    layout = LAYOUTS[0]
    content = KeyedContent(layout, 7)
    memory = filled(layout, content, [first])
    wrong = content.verify(second, memoryview(memory), 0, layout.layer_bytes)
    assert (wrong is None) == (first == second)


@given(a=st.integers(0, 3), b=st.integers(0, 3))
@settings(max_examples=16, deadline=None)
def test_layers_in_each_others_place_are_wrong(a: int, b: int) -> None:
    layout = LAYOUTS[0]
    content = KeyedContent(layout, 7)
    memory = filled(layout, content, [b"k" * 32])
    one, two = (
        slice(each * layout.layer_bytes, (each + 1) * layout.layer_bytes) for each in (a, b)
    )
    memory[one], memory[two] = memory[two], memory[one]
    wrong = content.verify(b"k" * 32, memoryview(memory), 0, layout.layer_bytes)
    assert (wrong is None) == (a == b)


@given(shift=st.integers(1, 4096))
@settings(max_examples=60, deadline=None)
def test_bytes_shifted_in_memory_are_wrong(shift: int) -> None:
    layout = LAYOUTS[0]
    content = KeyedContent(layout, 7)
    memory = filled(layout, content, [b"k" * 32])
    moved = memory[shift:] + memory[:shift]
    assert content.verify(b"k" * 32, memoryview(moved), 0, layout.layer_bytes) is not None


def test_content_depends_on_the_seed_and_is_the_same_for_every_instance() -> None:
    layout = LAYOUTS[0]
    one = filled(layout, KeyedContent(layout, 1), [b"k" * 32])
    assert one == filled(layout, KeyedContent(layout, 1), [b"k" * 32])
    assert one != filled(layout, KeyedContent(layout, 2), [b"k" * 32])


def test_content_does_not_repeat_between_pages_and_looks_random() -> None:
    layout = KVLayout(16, 64, 16384, "u8")
    memory = bytes(filled(layout, KeyedContent(layout, 1), [b"k" * 32]))
    pages = {memory[start : start + 4096] for start in range(0, len(memory), 4096)}
    assert len(pages) == len(memory) // 4096
    ones = sum(byte.bit_count() for byte in random.Random(1).sample(memory, 20_000))
    assert abs(ones / 160_000 - 0.5) < 0.01


def test_places_outside_of_the_memory_are_refused_with_their_numbers() -> None:
    layout = LAYOUTS[0]
    content = KeyedContent(layout, 1)
    memory = memoryview(bytearray(layout.block_bytes))
    for base, stride in ((1, 4096), (-1, 4096), (0, 4095), (0, 8192)):
        with pytest.raises(InvalidRequest, match=str(stride)):
            content.verify(b"k" * 32, memory, base, stride)
