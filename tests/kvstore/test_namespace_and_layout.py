"""Namespaces and layouts: identity and geometry."""

from __future__ import annotations

from dataclasses import replace

import pytest
from dualpath.kvstore.layout import (
    ALIGN_BYTES,
    CHUNK_BYTES_MAX,
    CHUNK_BYTES_MIN,
    CHUNKS_PER_BLOCK_MAX,
    KVLayout,
)
from dualpath.kvstore.namespace import Namespace
from dualpath.transfer.errors import InvalidRequest
from hypothesis import given
from hypothesis import strategies as st

LAYOUTS = st.builds(
    KVLayout,
    layers=st.integers(1, 64),
    block_tokens=st.integers(1, 256),
    layer_bytes=st.integers(1, 1 << 20),
    dtype=st.sampled_from(["bf16", "fp8"]),
)
WORDS = st.text(max_size=20)
NAMESPACES = st.builds(
    Namespace,
    model=st.text(min_size=1, max_size=20),
    layout=LAYOUTS,
    lora=WORDS,
    shard=WORDS,
    tenant=WORDS,
    salt=WORDS,
)


@given(LAYOUTS)
def test_chunks_tile_the_block_in_aligned_extents(layout: KVLayout) -> None:
    assert 1 <= layout.chunk_count <= CHUNKS_PER_BLOCK_MAX
    assert CHUNK_BYTES_MIN <= layout.chunk_bytes <= CHUNK_BYTES_MAX
    end = 0
    for chunk in range(layout.chunk_count):
        offset, nbytes = layout.chunk_extent(chunk)
        assert offset == end
        assert offset % ALIGN_BYTES == 0
        assert nbytes > 0
        end = offset + nbytes
    assert end == layout.block_bytes
    assert 0 <= layout.slot_bytes - layout.block_bytes < ALIGN_BYTES
    assert layout.slot_bytes % ALIGN_BYTES == 0


@given(LAYOUTS)
def test_layers_complete_in_order_and_all_with_the_last_chunk(layout: KVLayout) -> None:
    complete = [layout.layers_complete_after(chunk) for chunk in range(layout.chunk_count)]
    assert complete == sorted(complete)
    assert complete[-1] == layout.layers


@given(NAMESPACES, NAMESPACES)
def test_ids_are_equal_exactly_when_all_fields_are(a: Namespace, b: Namespace) -> None:
    assert (a.id == b.id) == (a == b)
    assert (a.differences(b) == ()) == (a == b)


@given(NAMESPACES)
def test_every_field_parts_namespaces(namespace: Namespace) -> None:
    for name in ("lora", "shard", "engine_format", "hash_root", "tenant", "salt", "model"):
        other = replace(namespace, **{name: getattr(namespace, name) + "x"})
        assert other.id != namespace.id
        assert namespace.differences(other) == (name,)


def test_the_id_of_a_known_namespace_never_changes() -> None:
    layout = KVLayout(layers=2, block_tokens=64, layer_bytes=41_984, dtype="fp8")
    assert Namespace(model="m@1", layout=layout).id.hex() == "f32e4a4c7dbb8af8bdbbe7ac3b49d7f3"


def test_bad_fields_are_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="model id"):
        Namespace(model="", layout=KVLayout(1, 1, 1, "x"))
    with pytest.raises(InvalidRequest, match="layers"):
        KVLayout(0, 1, 1, "x")
    with pytest.raises(InvalidRequest, match="fewer tokens"):
        KVLayout(64, 1, 2 << 20, "x")
    with pytest.raises(InvalidRequest, match=r"namespace\.salt"):
        Namespace(model="m", layout=KVLayout(1, 1, 1, "x"), salt="s" * 513)
    with pytest.raises(InvalidRequest, match="chunk 1 "):
        KVLayout(1, 1, 1, "x").chunk_extent(1)


@pytest.mark.parametrize("field", ["hash_algorithm", "model", "salt"])
def test_a_long_field_is_refused_by_name(namespace: Namespace, field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"namespace.{field} is longer than 512 chars"):
        replace(namespace, **{field: "x" * 513})  # type: ignore[arg-type]


@pytest.mark.parametrize("word", ["dtype", "attention", "scales"])
def test_a_long_word_of_a_layout_is_refused_by_name(namespace: Namespace, word: str) -> None:
    with pytest.raises(InvalidRequest, match=f"layout.{word} is longer than 512 chars"):
        replace(namespace.layout, **{word: "x" * 513})  # type: ignore[arg-type]
