"""What a prompt costs by the geometry of its model: closed forms, and refusals."""

from __future__ import annotations

import dataclasses

import pytest
from dualpath.bench.models.geometry import ModelGeometry
from dualpath.transfer.errors import InvalidRequest
from hypothesis import given
from hypothesis import strategies as st

DENSE = ModelGeometry(
    name="small",
    layers=2,
    heads=4,
    score_width=8,
    value_width=6,
    kv_bytes_per_token_layer=32,
    parameters=1e6,
    active_parameters=5e5,
    weight_bytes_per_parameter=2,
)
SPARSE = dataclasses.replace(
    DENSE,
    attended_tokens_max=16,
    indexer_heads=2,
    indexer_width=4,
    indexer_bytes_per_token_layer=5,
)
TOKENS = st.integers(0, 100)


def attended(cached: int, new: int, most: int) -> int:
    """Token by token."""
    return sum(min(most, cached + i + 1) for i in range(new))


@given(TOKENS, TOKENS)
def test_attention_counts_every_pair_of_a_token_and_what_it_sees(cached: int, new: int) -> None:
    pairs = attended(cached, new, 1 << 30)
    assert DENSE.attention_flops(cached, new) == pytest.approx(2 * 2 * 4 * 14 * pairs)
    assert DENSE.indexer_flops(cached, new) == 0


@given(TOKENS, TOKENS)
def test_sparse_attention_counts_at_most_its_top_and_the_indexer_everything(
    cached: int, new: int
) -> None:
    per_pair = SPARSE.attention_flops_per_pair
    assert SPARSE.attention_flops(cached, new) == pytest.approx(
        per_pair * attended(cached, new, 16)
    )
    every = attended(cached, new, 1 << 30)
    assert SPARSE.indexer_flops(cached, new) == pytest.approx(2 * 2 * 2 * 4 * every)


@given(TOKENS, TOKENS, TOKENS)
def test_a_prompt_cut_in_two_costs_the_same(cached: int, first: int, second: int) -> None:
    for model in (DENSE, SPARSE):
        whole = model.prompt_flops(cached, first + second)
        cut = model.prompt_flops(cached, first) + model.prompt_flops(cached + first, second)
        assert cut == pytest.approx(whole)


def test_the_indexers_keys_are_part_of_what_is_stored() -> None:
    assert DENSE.kv_bytes_per_token == 2 * 32
    assert SPARSE.kv_bytes_per_token == 2 * (32 + 5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"kv_bytes_per_token_layer": -1}, "kv_bytes_per_token_layer is -1"),
        ({"active_parameters": 2e6}, "active_parameters 2e"),
        ({"active_parameters": 0.0}, "active_parameters 0"),
        ({"expert_parameters": 2e6}, "expert_parameters"),
        ({"parameters": float("nan")}, "parameters is nan"),
        ({"weight_bytes_per_parameter": 0.0}, "weight_bytes_per_parameter"),
        ({"attended_tokens_max": 8}, "without an indexer"),
    ],
)
def test_numbers_that_no_model_has_are_refused_by_name(
    changes: dict[str, float], named: str
) -> None:
    with pytest.raises(InvalidRequest, match=named):
        dataclasses.replace(DENSE, **changes)  # type: ignore[arg-type]
