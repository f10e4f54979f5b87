"""The geometry of a model: what its KV weighs, and how many FLOPs a prompt takes.

Counting. Linear layers: 2 FLOPs an active parameter and token. Attention: for each pair of a new
token and a token that it attends to, 2 FLOPs for each element of a score and of a value, in every
query head and layer; a token attends to itself and all before it, or, under sparse attention, to at
most `attended_tokens_max` of those, which an indexer chooses by scoring all. MLA is counted in its
absorbed form (scores over latent + RoPE, values over the latent), as kernels for cached prefixes
run it. Norms, activations and the router are left out.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from dualpath.transfer.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """One model as it is served. Raises InvalidRequest for numbers that no model has."""

    name: str
    layers: int
    heads: int
    """Query heads of a layer."""
    score_width: int
    """Elements multiplied for one score of one head: the head size, or latent + RoPE of MLA."""
    value_width: int
    """Elements weighted by one score of one head: the head size, or the latent of MLA."""
    kv_bytes_per_token_layer: int
    parameters: float
    active_parameters: float
    """Parameters that take part in one token."""
    weight_bytes_per_parameter: float
    gpus_per_engine: int = 1
    """GPUs that share each prompt's attention and KV by tensor parallelism; 1: data parallel."""
    expert_parameters: float = 0.0
    """Of `parameters`, those in routed experts, which are spread over `expert_gpus`."""
    experts: int = 0
    """Routed experts of a layer; 0: a dense model."""
    experts_per_token: int = 0
    prefill_expert_gpus: int = 1
    decode_expert_gpus: int = 1
    exchange_bytes_per_token: float = 0.0
    """What a decoded token sends to its experts and gets back, all layers together."""
    attended_tokens_max: int = 0
    """Top-k of sparse attention; 0: dense."""
    indexer_heads: int = 0
    indexer_width: int = 0
    indexer_bytes_per_token_layer: int = 0
    block_tokens: int = 64

    def __post_init__(self) -> None:
        counts = (
            *("layers", "heads", "score_width", "value_width", "kv_bytes_per_token_layer"),
            *("gpus_per_engine", "prefill_expert_gpus", "decode_expert_gpus", "block_tokens"),
        )
        for field in dataclasses.fields(self):
            if field.name == "name":
                continue
            value = getattr(self, field.name)
            low = 1 if field.name in counts else 0
            if not math.isfinite(value) or value < low:
                raise InvalidRequest(
                    f"model {self.name!r}: {field.name} is {value}; it must be at least {low}"
                )
        if not 0 < self.active_parameters <= self.parameters:
            raise InvalidRequest(
                f"model {self.name!r}: active_parameters {self.active_parameters:g} must lie above "
                f"0 and not above parameters {self.parameters:g}"
            )
        if self.expert_parameters > self.parameters:
            raise InvalidRequest(
                f"model {self.name!r}: expert_parameters {self.expert_parameters:g} are more than "
                f"all parameters, {self.parameters:g}"
            )
        if self.experts_per_token > self.experts or bool(self.experts) != bool(
            self.expert_parameters
        ):
            raise InvalidRequest(
                f"model {self.name!r}: experts {self.experts}, experts_per_token "
                f"{self.experts_per_token} and expert_parameters {self.expert_parameters:g} do not "
                "fit together; a dense model has none of them"
            )
        if not self.weight_bytes_per_parameter:
            raise InvalidRequest(f"model {self.name!r}: weight_bytes_per_parameter must not be 0")
        if self.attended_tokens_max and not self.indexer_heads * self.indexer_width:
            raise InvalidRequest(
                f"model {self.name!r}: attended_tokens_max without an indexer; set indexer_heads "
                "and indexer_width, or leave attention dense (0)"
            )

    @property
    def kv_bytes_per_token(self) -> int:
        """All layers, with the indexer's keys: what is stored and loaded of a token."""
        return self.layers * (self.kv_bytes_per_token_layer + self.indexer_bytes_per_token_layer)

    @property
    def attention_flops_per_pair(self) -> float:
        """All layers and heads, for one token attending to one."""
        return 2.0 * self.layers * self.heads * (self.score_width + self.value_width)

    @property
    def indexer_flops_per_pair(self) -> float:
        """All layers, for one token that the indexer scores for another."""
        return 2.0 * self.layers * self.indexer_heads * self.indexer_width

    def weight_bytes_per_gpu(self, expert_gpus: int) -> float:
        """Of one GPU's memory: its share of the experts, and by tensor parallelism of the rest."""
        shared = (self.parameters - self.expert_parameters) / self.gpus_per_engine
        return self.weight_bytes_per_parameter * (shared + self.expert_parameters / expert_gpus)

    def linear_flops(self, new: int) -> float:
        """Of everything but attention, for `new` tokens."""
        return 2.0 * self.active_parameters * new

    def attention_flops(self, cached: int, new: int) -> float:
        """Of attention proper, for `new` tokens behind `cached` ones."""
        return self.attention_flops_per_pair * self._attended(cached, new)

    def indexer_flops(self, cached: int, new: int) -> float:
        """Of choosing what to attend to; 0 without sparse attention."""
        return self.indexer_flops_per_pair * _pairs(cached, new)

    def prompt_flops(self, cached: int, new: int) -> float:
        """All of it."""
        return (
            self.linear_flops(new)
            + self.attention_flops(cached, new)
            + self.indexer_flops(cached, new)
        )

    def _attended(self, cached: int, new: int) -> float:
        top = self.attended_tokens_max
        if not top or cached + new <= top:
            return _pairs(cached, new)
        growing = max(0, top - cached)
        return _pairs(cached, growing) + float(top) * (new - growing)


def _pairs(cached: int, new: int) -> float:
    """New tokens times what each sees: all cached ones, those before it, itself."""
    return new * (cached + (new + 1) / 2)
