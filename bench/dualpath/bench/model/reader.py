"""The second engine process: loads the prefix's KV by all paths, layer by layer, and continues.

The forward pass starts at once: before each layer it waits until that layer's KV has been verified,
while the later layers are still on their way. If the prefix turns out shorter than promised, the
pass is taken again with what is there, so the logits are right in any case.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from dualpath.bench.model import llama
from dualpath.bench.model.job import PROMPT_SEED, Job, report
from dualpath.bench.model.kv_memory import (
    BLOCK_TOKENS,
    KVMemory,
    hashes_of,
    layout_of,
    namespace_of,
)
from dualpath.client.blocking import BlockingKVClient, BlockingLoad


class LayerwisePass:
    """One forward pass over the new tokens, fed by a running load."""

    def __init__(self, model: Any, load: BlockingLoad, kv: KVMemory, blocks: int) -> None:
        self._load = load
        self._kv = kv
        self._blocks = blocks
        self.waited_s: list[float] = []
        self.cache = llama.new_cache(model)
        empty = torch.empty(
            (1, llama.KV_HEADS, blocks * BLOCK_TOKENS, llama.HEAD_DIM), dtype=model.dtype
        )
        for index in range(llama.LAYERS):
            self.cache.update(empty.clone(), empty.clone(), index)
        self._hooks = [
            layer.register_forward_pre_hook(lambda *_, index=index: self._fill(index))
            for index, layer in enumerate(model.model.layers)
        ]

    def _fill(self, index: int) -> None:
        begin = time.monotonic()
        self._load.wait_layer(index)
        self.waited_s.append(time.monotonic() - begin)
        keys, values = self._kv.layer(index, self._blocks)
        self.cache.layers[index].keys.copy_(keys)
        self.cache.layers[index].values.copy_(values)

    def close(self) -> None:
        """Take the hooks out of the model."""
        for hook in self._hooks:
            hook.remove()


def main() -> None:
    """Run the job given as argument."""
    job = Job.from_arguments()
    model = llama.load_model(job.checkpoint, job.dtype)
    prompt = llama.prompt_of(PROMPT_SEED, job.prefix_tokens + job.new_tokens)
    hashes = hashes_of(prompt[:, : job.prefix_tokens])
    with BlockingKVClient.connect(job.agent) as client:
        namespace = client.open_namespace(namespace_of(job.dtype, job.model_id))
        memory = client.allocate(len(hashes) * layout_of(job.dtype).block_bytes)
        kv = KVMemory(memory.view, job.dtype, len(hashes))
        begin = time.monotonic()
        load = client.load(
            namespace, hashes, memory, kv.places, deadline_s=job.deadline_s, policy="split"
        )
        logits, cache, waited_s = _continue(model, prompt, load, kv)
        ttft_s = time.monotonic() - begin
        result = load.result()
        del kv
        memory.close()
    tokens = llama.decode_greedily(model, logits, cache, job.decoded_tokens)
    reference = torch.load(job.reference)
    report(
        {
            "ttft_loaded_s": ttft_s,
            "load_s": result.elapsed_s,
            "layer_wait_s": waited_s,
            "loaded_blocks": result.blocks,
            "loaded_bytes": result.nbytes,
            "bytes_by_path": dict(result.shares),
            "events": dict(result.events),
            "miss": result.miss.value,
            "bit_equal": torch.equal(logits, reference["two_steps"]),
            "max_difference": float((logits - reference["full"]).abs().max()),
            "tokens_equal": tokens == reference["tokens"],
            "tokens": tokens,
        }
    )


def _continue(
    model: Any, prompt: Any, load: BlockingLoad, kv: KVMemory
) -> tuple[Any, Any, list[float]]:
    """(logits of the new tokens, cache, seconds waited before each layer)."""
    blocks = load.started().hit_blocks
    new_tokens = prompt.shape[1] - kv.blocks * BLOCK_TOKENS
    while blocks:
        run = LayerwisePass(model, load, kv, blocks)
        try:
            logits = llama.forward(model, prompt[:, blocks * BLOCK_TOKENS :], run.cache, new_tokens)
        finally:
            run.close()
        valid = load.result().blocks
        if valid >= blocks:
            return logits, run.cache, run.waited_s
        blocks = valid
    cache = llama.new_cache(model)
    return llama.forward(model, prompt, cache, new_tokens), cache, []


if __name__ == "__main__":
    main()
