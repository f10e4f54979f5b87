"""The port of a model's compute: how long an engine takes for a batch.

A simulator and a planner ask; `Roofline` answers from a geometry and a calibration. All calls are
pure, deterministic, cheap (a few microseconds) and may come from any thread. Times are seconds of
one engine that does nothing else; an engine is `gpus_per_engine` GPUs of the model's geometry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Prompt = tuple[int, int]
"""(cached, new): tokens whose KV is there, and tokens that are computed behind them."""


class ComputeModel(Protocol):
    """See the module docstring."""

    @property
    def prefill_tokens_per_s(self) -> float:
        """New tokens a prefill engine computes a second, at the calibration's reference prompt."""

    @property
    def hbm_tokens(self) -> int:
        """Tokens whose KV one decode engine can hold."""

    def attention_s(self, prompts: Sequence[Prompt]) -> float:
        """Attention alone of one forward batch: what the compute quota limits. It grows with both
        numbers of a prompt, and that of a batch is the sum of its prompts'."""

    def prefill_s(self, prompts: Sequence[Prompt]) -> float:
        """One forward batch, attention included; 0 for an empty one."""

    def decode_step_s(self, sequences: int, context_tokens: int) -> float:
        """One step of a decode engine: a token for each of `sequences`, which hold
        `context_tokens` together; 0 for none."""
