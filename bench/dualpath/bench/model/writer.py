"""The first engine process: prefills a long prompt, saves its KV, and leaves reference logits.

Two references: a full prefill of prefix and new tokens in one pass, and the same two steps that the
second process will take, but with the KV that never left this process.
"""

from __future__ import annotations

import time

import torch
from dualpath.bench.model import llama
from dualpath.bench.model.job import MODEL_SEED, PROMPT_SEED, Job, report
from dualpath.bench.model.kv_memory import KVMemory, hashes_of, layout_of, namespace_of
from dualpath.client.blocking import BlockingKVClient
from dualpath.kvstore.chain import parents_of


def main() -> None:
    """Run the job given as argument."""
    job = Job.from_arguments()
    llama.make_checkpoint(job.checkpoint, MODEL_SEED)
    model = llama.load_model(job.checkpoint, job.dtype)
    prompt = llama.prompt_of(PROMPT_SEED, job.prefix_tokens + job.new_tokens)

    begin = time.monotonic()
    full_cache = llama.new_cache(model)
    full = llama.forward(model, prompt, full_cache, job.new_tokens)
    full_s = time.monotonic() - begin
    full_tokens = llama.decode_greedily(model, full, full_cache, job.decoded_tokens)

    cache = llama.new_cache(model)
    prefix = prompt[:, : job.prefix_tokens]
    llama.forward(model, prefix, cache, 1)
    saved = _save(job, cache, prefix)
    two_steps = llama.forward(model, prompt[:, job.prefix_tokens :], cache, job.new_tokens)
    without = llama.forward(
        model, prompt[:, job.prefix_tokens :], llama.new_cache(model), job.new_tokens
    )
    torch.save({"full": full, "two_steps": two_steps, "tokens": full_tokens}, job.reference)
    report(
        {
            "ttft_full_s": full_s,
            "difference_without_prefix": float((full - without).abs().max()),
            **saved,
        }
    )


def _save(job: Job, cache: object, prefix: torch.Tensor) -> dict[str, object]:
    """Store the prefix's KV. Raises RuntimeError unless all of it is sealed."""
    hashes = hashes_of(prefix)
    nbytes = len(hashes) * layout_of(job.dtype).block_bytes
    with BlockingKVClient.connect(job.agent) as client:
        namespace = client.open_namespace(namespace_of(job.dtype, job.model_id))
        memory = client.allocate(nbytes)
        kv = KVMemory(memory.view, job.dtype, len(hashes))
        kv.write_from(cache)
        begin = time.monotonic()
        result = client.save(
            namespace, hashes, parents_of(hashes), memory, kv.places, deadline_s=job.deadline_s
        )
        elapsed_s = time.monotonic() - begin
        if result.present_blocks != len(hashes):
            raise RuntimeError(f"not all blocks were stored: {result.reason}: {result.detail}")
        del kv
        memory.close()
    return {"saved_blocks": len(hashes), "saved_bytes": nbytes, "save_s": elapsed_s}


if __name__ == "__main__":
    main()
