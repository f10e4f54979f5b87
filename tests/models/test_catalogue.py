"""Models by name or file, and calibration inputs with their sources."""

from __future__ import annotations

from pathlib import Path

import pytest
from dualpath.bench.models.calibration import (
    CALIBRATION,
    calibration_inputs,
    committed_calibration,
    read_calibration,
)
from dualpath.bench.models.catalogue import CATALOGUE, find_model, model_names
from dualpath.transfer.errors import InvalidRequest

MODEL = """
layers = 2
heads = 4
score_width = 8
value_width = 8
kv_bytes_per_token_layer = 64
parameters = 2e9
active_parameters = 1e9
weight_bytes_per_parameter = 2
"""


def test_the_models_of_the_evaluation_are_there_with_their_published_geometry() -> None:
    assert {"ds-v3.2", "ds-27b", "qwen2.5-32b"} <= set(model_names())
    deepseek, small = find_model("ds-v3.2"), find_model("ds-27b")
    assert (deepseek.layers, small.layers) == (61, 30)
    assert deepseek.kv_bytes_per_token == 61 * (656 + 132)
    assert small.kv_bytes_per_token == 30 * (656 + 68)
    assert (deepseek.attended_tokens_max, small.attended_tokens_max) == (2048, 1024)
    assert find_model("qwen2.5-32b").kv_bytes_per_token == 64 * 2 * 8 * 128 * 2


def test_the_27b_model_has_the_parameters_of_its_published_shape() -> None:
    """arXiv 2602.21548, appendix A.2; MLA widths of DeepSeek-V3, a vocabulary of 129,280."""
    small, hidden, layers = find_model("ds-27b"), 2560, 30
    queries, latent, output = hidden * 32 * (128 + 64), hidden * 576, 32 * 128 * hidden
    attention = queries + latent + 512 * 32 * 256 + output
    indexer = hidden * (32 * 64 + 64 + 32)
    expert = 3 * hidden * 1536
    shared = 29 * (2 * expert + 72 * hidden) + 3 * hidden * 12288
    vocabulary = 129_280 * hidden
    common = layers * (attention + indexer) + shared
    experts = 29 * 72 * expert
    assert small.expert_parameters == pytest.approx(experts, rel=1e-3)
    assert small.parameters == pytest.approx(common + experts + 2 * vocabulary, rel=2e-3)
    active = common + 29 * 6 * expert + vocabulary
    assert small.active_parameters == pytest.approx(active, rel=2e-3)


def test_every_model_of_the_catalogue_cites_where_its_numbers_come_from() -> None:
    text = CATALOGUE.read_text(encoding="utf-8")
    for name in model_names():
        (line,) = [at for at in text.splitlines() if at in (f"[{name}]", f'["{name}"]')]
        below = text.split(f"\n{line}\n")[1].splitlines()
        assert below[0].startswith("# "), name


def test_an_unknown_model_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InvalidRequest, match=r"'ds-v3\.1' is not a model .*did you mean 'ds-v3"):
        find_model("ds-v3.1")


def test_a_file_of_ones_own_is_taken_and_named_by_table(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(f"[one]\n{MODEL}")
    assert find_model(str(file)).name == "one"
    file.write_text(f"[one]\n{MODEL}\n[two]\n{MODEL}")
    assert find_model(f"{file}:two").kv_bytes_per_token == 128
    with pytest.raises(InvalidRequest, match="has 2 models; name one"):
        find_model(str(file))
    with pytest.raises(InvalidRequest, match="'three' is not a model of"):
        find_model(f"{file}:three")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[one]\nlayerz = 3\n", "unknown setting 'layerz'; did you mean 'layers'"),
        ("[one]\nlayers = 3\n", "heads is not set"),
        (f"[one]\n{MODEL}".replace("= 2\n", "= 2.5\n", 1), "2.5 is not a whole number"),
        (f"[one]\n{MODEL}".replace("heads = 4", "heads = -4"), "heads is -4"),
        ("[one", "is not TOML"),
        ("", "has 0 models"),
    ],
)
def test_a_file_that_describes_no_model_is_refused_with_the_reason(
    tmp_path: Path, text: str, named: str
) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(InvalidRequest) as refused:
        find_model(str(file))
    assert named in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot read"):
        find_model(str(tmp_path / "none.toml"))


def test_every_calibration_input_has_a_source_and_efficiencies_are_no_datasheets() -> None:
    for each in calibration_inputs(CALIBRATION):
        assert len(each.source) > 10, each.name
        if each.name.endswith("_efficiency"):
            assert each.kind != "datasheet", each.name


def test_inputs_of_another_file_replace_the_committed_ones_and_no_others(tmp_path: Path) -> None:
    file = tmp_path / "h200.toml"
    file.write_text('[hbm_bytes]\nvalue = 141e9\nkind = "datasheet"\nsource = "NVIDIA H200"\n')
    mine, committed = read_calibration(file), committed_calibration()
    assert mine.hbm_bytes == 141e9
    assert mine.hbm_bytes_per_s == committed.hbm_bytes_per_s


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("hbm_byte = 3\n", "unknown input 'hbm_byte'"),
        ("hbm_bytes = 3\n", "must have value, kind and source"),
        ('[hbm_bytes]\nvalue = 3\nkind = "guessed"\nsource = "x"\n', "kind 'guessed'"),
        ('[hbm_bytes]\nvalue = "3"\nkind = "declared"\nsource = "x"\n', "is not a number"),
        ('[hbm_bytes]\nvalue = 3\nkind = "declared"\nsource = " "\n', "where the value comes from"),
        ('[hbm_bytes]\nvalue = -3\nkind = "declared"\nsource = "x"\n', "hbm_bytes is -3"),
        ('[hbm_bytes]\nvalue = 0\nkind = "declared"\nsource = "x"\n', "must not be 0"),
        ('[hbm_usable]\nvalue = 1.5\nkind = "declared"\nsource = "x"\n', "share of at most 1"),
    ],
)
def test_an_input_that_cannot_be_is_refused_with_the_reason(
    tmp_path: Path, text: str, named: str
) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(InvalidRequest) as refused:
        read_calibration(file)
    assert named in str(refused.value)
