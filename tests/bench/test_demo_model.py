"""The demo with a real model: what it accepts, what it skips, what it calls wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from dualpath.bench.model import command as module
from dualpath.bench.model.demonstration import ModelDemoConfig, _judged
from dualpath.cli.main import main
from dualpath.transfer.errors import InvalidRequest

FOUND = {
    "saved_blocks": 4,
    "loaded_blocks": 4,
    "miss": "none",
    "bit_equal": True,
    "max_difference": 0.0,
    "difference_without_prefix": 7.0,
    "tokens_equal": True,
    "ttft_full_s": 2.0,
    "ttft_loaded_s": 0.5,
}
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
    reason="extra `model` is not installed",
)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "float8"}, "float8"),
        ({"prefix_tokens": 100}, "multiple of 64"),
        ({"prefix_tokens": 0}, "multiple of 64"),
        ({"new_tokens": 0}, "new-tokens"),
        ({"timeout_s": 0.0}, "timeout-s"),
    ],
)
def test_a_wrong_setting_is_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        ModelDemoConfig(**wrong)  # type: ignore[arg-type]


def test_equal_logits_are_ok() -> None:
    result = _judged(ModelDemoConfig(), FOUND)
    assert result["ok"]
    assert result["ttft_ratio"] == 0.25


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"loaded_blocks": 3, "miss": "corrupt"}, "3 of 4 blocks .* corrupt"),
        ({"bit_equal": False}, "never left"),
        ({"max_difference": 0.5}, "full prefill's by 0.5"),
        ({"max_difference": float("nan")}, "by nan"),
        ({"difference_without_prefix": 0.0}, "prove nothing"),
        ({"tokens_equal": False}, "decoded tokens"),
    ],
)
def test_anything_else_is_a_problem(changed: dict[str, object], problem: str) -> None:
    result = _judged(ModelDemoConfig(), {**FOUND, **changed})
    assert not result["ok"]
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError("\n".join(result["problems"]))


def test_without_torch_it_says_so_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _name: None)
    assert main(["demo-model"]) == 0
    assert capsys.readouterr().out.startswith("skipped: torch and transformers")


@needs_torch
def test_kv_written_as_blocks_comes_back_as_it_was() -> None:
    import torch
    from dualpath.bench.model import llama
    from dualpath.bench.model.kv_memory import BLOCK_TOKENS, KVMemory, layout_of

    class Layer:
        def __init__(self) -> None:
            shape = (1, llama.KV_HEADS, 3 * BLOCK_TOKENS + 5, llama.HEAD_DIM)
            self.keys, self.values = torch.randn(shape), torch.randn(shape)

    class Cache:
        layers = tuple(Layer() for _ in range(llama.LAYERS))

    buffer = bytearray(3 * layout_of("float32").block_bytes)
    kv = KVMemory(memoryview(buffer), "float32", 3)
    kv.write_from(Cache())
    for index, layer in enumerate(Cache.layers):
        keys, values = kv.layer(index, 2)
        assert torch.equal(keys, layer.keys[:, :, : 2 * BLOCK_TOKENS])
        assert torch.equal(values, layer.values[:, :, : 2 * BLOCK_TOKENS])


@needs_torch
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_logits_are_equal_after_a_split_load(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert main(["demo-model", "--prefix-tokens", "1024", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["bit_equal"]
    assert set(result["bytes_by_path"]) == {"direct", "relay:decode-1"}
