"""Times of a model on its GPUs, by a roofline: FLOPs and bytes over the rates that engines reach.

Prefill of a forward batch: linear layers, or reading their weights where that takes longer; then
attention and the indexer; then an overhead a layer. Decode step: reading weights and KV, or
computing, whichever takes longer; then what is exposed of the exchange between experts; then the
overhead. All experts of a GPU are read in prefill; in decode those that the tokens of all GPUs in
the exchange hit, were they drawn evenly. Every engine of a side is taken to be as busy as this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dualpath.bench.models.calibration import Calibration
from dualpath.bench.models.compute_model import Prompt
from dualpath.bench.models.geometry import ModelGeometry
from dualpath.transfer.errors import InvalidRequest


class Roofline:
    """Implements ComputeModel. Raises InvalidRequest where the weights leave no room for KV.

    `prefill_expert_gpus` and `decode_expert_gpus` replace the geometry's, for another cluster.
    """

    def __init__(
        self,
        geometry: ModelGeometry,
        calibration: Calibration,
        *,
        prefill_expert_gpus: int | None = None,
        decode_expert_gpus: int | None = None,
    ) -> None:
        self.geometry = geometry
        self.calibration = calibration
        self._prefill_experts_over = prefill_expert_gpus or geometry.prefill_expert_gpus
        self._decode_experts_over = decode_expert_gpus or geometry.decode_expert_gpus
        gpus = geometry.gpus_per_engine
        fp8 = geometry.weight_bytes_per_parameter <= 1
        peak = calibration.fp8_flops_per_s if fp8 else calibration.bf16_flops_per_s
        linear = (
            calibration.moe_linear_efficiency
            if geometry.experts
            else calibration.dense_linear_efficiency
        )
        self._linear_flops_per_s = gpus * peak * linear
        self._linear_s_per_token = geometry.linear_flops(1) / self._linear_flops_per_s
        bf16 = gpus * calibration.bf16_flops_per_s
        self._attention_flops_per_s = bf16 * calibration.attention_efficiency
        self._decode_attention_flops_per_s = bf16 * calibration.decode_attention_efficiency
        self._indexer_flops_per_s = (
            gpus * calibration.fp8_flops_per_s * calibration.indexer_efficiency
        )
        self._hbm_bytes_per_s = gpus * calibration.hbm_bytes_per_s * calibration.hbm_efficiency
        self._overhead_s = geometry.layers * calibration.layer_overhead_s
        self._prefill_weights_s = (
            gpus * geometry.weight_bytes_per_gpu(self._prefill_experts_over) / self._hbm_bytes_per_s
        )
        self._prefill_hbm_tokens = self._room(self._prefill_experts_over, "prefill")
        self._decode_hbm_tokens = self._room(self._decode_experts_over, "decode")

    @property
    def hbm_tokens(self) -> int:
        """See ComputeModel."""
        return self._decode_hbm_tokens

    @property
    def prefill_hbm_tokens(self) -> int:
        """Tokens whose KV one prefill engine can hold."""
        return self._prefill_hbm_tokens

    @property
    def prefill_tokens_per_s(self) -> float:
        """See ComputeModel. The batch is so large that neither weights nor overhead count."""
        cached = round(self.calibration.reference_cached_tokens)
        new = max(1, round(self.calibration.reference_new_tokens))
        return new / self.prompt_s(cached, new)

    @property
    def overhead_s(self) -> float:
        """Of one forward batch or step, whatever is in it."""
        return self._overhead_s

    def linear_s(self, new: int) -> float:
        """Of all but attention, for `new` tokens in a large forward batch."""
        return new * self._linear_s_per_token

    def prompt_s(self, cached: int, new: int) -> float:
        """What one prompt adds to a large forward batch."""
        return self.linear_s(new) + self.attention_s(((cached, new),))

    def attention_s(self, prompts: Sequence[Prompt]) -> float:
        """See ComputeModel; the indexer's time is part of it."""
        attention = indexer = 0.0
        for cached, new in prompts:
            attention += self.geometry.attention_flops(cached, new)
            indexer += self.geometry.indexer_flops(cached, new)
        return attention / self._attention_flops_per_s + indexer / self._indexer_flops_per_s

    def prefill_s(self, prompts: Sequence[Prompt]) -> float:
        """See ComputeModel."""
        new = sum(prompt[1] for prompt in prompts)
        if not new:
            return 0.0
        linear = max(new * self._linear_s_per_token, self._prefill_weights_s)
        return linear + self.attention_s(prompts) + self._overhead_s

    def decode_step_s(self, sequences: int, context_tokens: int) -> float:
        """See ComputeModel."""
        if not sequences:
            return 0.0
        geometry, calibration = self.geometry, self.calibration
        context = context_tokens / sequences
        top = geometry.attended_tokens_max or math.inf
        attended = min(context, top)
        read = geometry.layers * (
            attended * geometry.kv_bytes_per_token_layer
            + context * geometry.indexer_bytes_per_token_layer
        )
        memory = (self._decode_weight_bytes(sequences) + sequences * read) / self._hbm_bytes_per_s
        compute = sequences * (
            self._linear_s_per_token
            + geometry.attention_flops_per_pair * attended / self._decode_attention_flops_per_s
            + geometry.indexer_flops_per_pair * context / self._indexer_flops_per_s
        )
        exchange = sequences * geometry.exchange_bytes_per_token / calibration.exchange_bytes_per_s
        return max(memory, compute) + exchange * calibration.exchange_exposed + self._overhead_s

    def _decode_weight_bytes(self, sequences: int) -> float:
        """What a step reads of the weights on this engine's GPUs."""
        geometry = self.geometry
        whole = geometry.weight_bytes_per_gpu(self._decode_experts_over) * geometry.gpus_per_engine
        if not geometry.experts:
            return whole
        experts = geometry.weight_bytes_per_parameter * geometry.expert_parameters
        experts *= geometry.gpus_per_engine / self._decode_experts_over
        drawn = sequences * self._decode_experts_over / geometry.gpus_per_engine
        missed = math.pow(1 - geometry.experts_per_token / geometry.experts, drawn)
        return whole - experts * missed

    def _room(self, expert_gpus: int, side: str) -> int:
        geometry, calibration = self.geometry, self.calibration
        usable = calibration.hbm_bytes * calibration.hbm_usable
        weights = geometry.weight_bytes_per_gpu(expert_gpus)
        tokens = int((usable - weights) * geometry.gpus_per_engine / geometry.kv_bytes_per_token)
        if tokens < 1:
            raise InvalidRequest(
                f"model {geometry.name!r} does not fit a {side} engine: {weights / 1e9:.1f} GB of "
                f"weights a GPU, {usable / 1e9:.1f} GB usable; spread its experts over more than "
                f"{expert_gpus} GPUs or its layers over more than {geometry.gpus_per_engine}"
            )
        return tokens
