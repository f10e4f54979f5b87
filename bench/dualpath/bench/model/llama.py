"""A small random Llama, made here: nothing is downloaded.

Initial weights are wide, and the query and key projections three times wider still, so that the
output depends on the whole prefix: a wrong or missing byte of KV shows in the logits.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Before transformers is imported: it asks the hub otherwise.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

LAYERS = 8
HIDDEN = 512
HEADS = 8
KV_HEADS = 4
HEAD_DIM = 64
VOCABULARY = 4096
POSITIONS_MAX = 1 << 15
_SHARPER = 3.0
_WARM_UP_TOKENS = 64


def make_checkpoint(folder: Path, seed: int) -> None:
    """Write config and weights of a new model into `folder`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=1408,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=POSITIONS_MAX,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(_SHARPER)
            layer.self_attn.k_proj.weight.mul_(_SHARPER)
    model.save_pretrained(folder)


def load_model(folder: Path, dtype: str) -> Any:
    """The model of a checkpoint, warmed up.

    On one thread: agents and daemon share the processor, and a team of threads of which one is
    preempted at every barrier is slower than one by far, and not by a steady factor.
    """
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=getattr(torch, dtype)
    ).eval()
    with torch.inference_mode():
        model(torch.zeros((1, _WARM_UP_TOKENS), dtype=torch.long))
    return model


def prompt_of(seed: int, tokens: int) -> Any:
    """Token ids `[1, tokens]`, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (1, tokens), generator=generator)


def new_cache(model: Any) -> Any:
    """An empty cache for `model`."""
    return DynamicCache(config=model.config)


def forward(model: Any, tokens: Any, cache: Any, keep: int) -> Any:
    """Logits `[keep, vocabulary]` of the last `keep` tokens; `cache` grows by all of them."""
    with torch.inference_mode():
        return model(tokens, past_key_values=cache, logits_to_keep=keep).logits[0]


def decode_greedily(model: Any, logits: Any, cache: Any, count: int) -> list[int]:
    """The next `count` tokens after a forward pass that ended with `logits`."""
    token = int(logits[-1].argmax())
    found = [token]
    while len(found) < count:
        logits = forward(model, torch.tensor([[token]]), cache, 1)
        token = int(logits[-1].argmax())
        found.append(token)
    return found
