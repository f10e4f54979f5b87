"""A model whose times are constants: where closed forms say what a run must give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dualpath.bench.models.compute_model import Prompt
from dualpath.bench.simulate.simulated_model import SimulatedModel


@dataclass(frozen=True)
class ConstantRates:
    """Implements ComputeModel: prefill at so many tokens a second, of which half is attention;
    steps of one length."""

    prefill_tokens_per_s: float = 10_000.0
    step_s: float = 0.01
    hbm_tokens: int = 1_000_000

    def attention_s(self, prompts: Sequence[Prompt]) -> float:
        """See ComputeModel."""
        return self.prefill_s(prompts) / 2

    def prefill_s(self, prompts: Sequence[Prompt]) -> float:
        """See ComputeModel."""
        return sum(new for _, new in prompts) / self.prefill_tokens_per_s

    def decode_step_s(self, sequences: int, context_tokens: int) -> float:
        """See ComputeModel."""
        return self.step_s if sequences else 0.0


def constant_model(
    compute: ConstantRates | None = None,
    *,
    gpus_per_engine: int = 1,
    lockstep_engines: int = 1,
    prefill_hbm_tokens: float = 200_000,
    layers: int = 10,
) -> SimulatedModel:
    """50,000 bytes of KV a token, in blocks of 64."""
    return SimulatedModel(
        name="constant",
        layers=layers,
        kv_bytes_per_token=50_000,
        block_tokens=64,
        gpus_per_engine=gpus_per_engine,
        lockstep_engines=lockstep_engines,
        prefill_hbm_tokens=prefill_hbm_tokens,
        compute=compute or ConstantRates(),
    )
