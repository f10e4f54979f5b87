"""What every compute model promises, held to by the roofline of each model in the catalogue."""

from __future__ import annotations

import dataclasses

import pytest
from dualpath.bench.models.calibration import committed_calibration
from dualpath.bench.models.catalogue import find_model, model_names
from dualpath.bench.models.compute_model import ComputeModel
from dualpath.bench.models.roofline import Roofline
from dualpath.transfer.errors import InvalidRequest
from hypothesis import given
from hypothesis import strategies as st

MODELS: dict[str, ComputeModel] = {
    name: Roofline(find_model(name), committed_calibration()) for name in model_names()
}
NAMES = st.sampled_from(sorted(MODELS))
PROMPT = st.tuples(st.integers(0, 1 << 17), st.integers(0, 1 << 14))


@given(NAMES, st.lists(PROMPT, max_size=6))
def test_attention_of_a_batch_is_the_sum_of_its_prompts(
    name: str, prompts: list[tuple[int, int]]
) -> None:
    model = MODELS[name]
    each = sum(model.attention_s([prompt]) for prompt in prompts)
    assert model.attention_s(prompts) == pytest.approx(each)


@given(NAMES, PROMPT, st.integers(0, 1000), st.integers(0, 1000))
def test_attention_grows_with_what_is_cached_and_what_is_new(
    name: str, prompt: tuple[int, int], cached: int, new: int
) -> None:
    model = MODELS[name]
    larger = (prompt[0] + cached, prompt[1] + new)
    assert model.attention_s([larger]) >= model.attention_s([prompt])


@given(NAMES, st.lists(PROMPT, min_size=1, max_size=6))
def test_a_forward_batch_takes_more_than_its_attention_and_less_than_its_parts(
    name: str, prompts: list[tuple[int, int]]
) -> None:
    model = MODELS[name]
    if sum(new for _, new in prompts):
        assert model.prefill_s(prompts) > model.attention_s(prompts)
    assert model.prefill_s(prompts) <= sum(model.prefill_s([each]) for each in prompts) * 1.000001


@given(NAMES, st.integers(1, 200), st.integers(1, 1 << 16), st.integers(0, 50))
def test_a_step_takes_longer_for_more_sequences_and_each_gets_its_token_sooner_alone(
    name: str, sequences: int, context: int, more: int
) -> None:
    model = MODELS[name]
    few = model.decode_step_s(sequences, sequences * context)
    many = model.decode_step_s(sequences + more, (sequences + more) * context)
    assert 0 < few <= many * 1.000001
    assert many / (sequences + more) <= few / sequences * 1.000001


@pytest.mark.parametrize("name", model_names())
def test_nothing_to_do_takes_no_time_and_there_is_room_for_a_long_prompt(name: str) -> None:
    model = MODELS[name]
    assert model.prefill_s(()) == model.attention_s(()) == model.decode_step_s(0, 0) == 0
    assert model.prefill_s([(100, 0)]) == 0
    assert model.hbm_tokens > 64 << 10
    assert model.prefill_tokens_per_s > 0


def test_a_long_batch_is_bound_by_flops_and_a_short_one_by_reading_weights() -> None:
    geometry = dataclasses.replace(find_model("qwen2.5-32b"), gpus_per_engine=1, layers=1)
    inputs = dataclasses.replace(
        committed_calibration(), layer_overhead_s=0, dense_linear_efficiency=0.5
    )
    model = Roofline(geometry, inputs)
    weights_s = 65e9 / (3.35e12 * 0.85)
    assert model.prefill_s([(0, 1)]) == pytest.approx(weights_s, rel=1e-3)
    flops_s = 2 * 31.8e9 * 100_000 / (9.89e14 * 0.5)
    attention_s = model.attention_s([(0, 100_000)])
    assert model.prefill_s([(0, 100_000)]) == pytest.approx(flops_s + attention_s)
    assert model.decode_step_s(1, 0) == pytest.approx(weights_s, rel=1e-3)


def test_a_model_that_does_not_fit_is_refused_with_the_numbers() -> None:
    inputs = committed_calibration()
    with pytest.raises(InvalidRequest, match=r"prefill engine: 99\.7 GB .* 72\.0 GB usable"):
        Roofline(find_model("ds-v3.2"), inputs, prefill_expert_gpus=8)
    small = dataclasses.replace(inputs, hbm_bytes=40e9)
    with pytest.raises(InvalidRequest, match="decode engine"):
        Roofline(find_model("ds-v3.2"), small, prefill_expert_gpus=64)
