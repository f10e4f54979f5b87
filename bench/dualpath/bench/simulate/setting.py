"""One simulated run as plain values: what differs between the runs of figures and tables.

A `Setting` can be sent to another process and names its run; `setup` makes of it what is simulated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from dualpath.bench.agents.arrivals import offline, poisson, with_tool_latency
from dualpath.bench.agents.named_set import named_set
from dualpath.bench.agents.replayed_set import scaled
from dualpath.bench.agents.trajectory import AgentArrival, Trajectory
from dualpath.bench.models.calibration import read_calibration
from dualpath.bench.models.catalogue import find_model
from dualpath.bench.models.compute_model import ComputeModel, Prompt
from dualpath.bench.simulate.cluster import ClusterSpec
from dualpath.bench.simulate.engine_details import EngineDetails
from dualpath.bench.simulate.simulated_model import modelled
from dualpath.bench.simulate.simulation import SimulationSetup
from dualpath.bench.simulate.system import named_system
from dualpath.bench.testbed.workload import PAPER_TABLE, Context
from dualpath.transfer.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Offline with `agents`, online with `aps` agents a second for `duration_s`. `append` and
    `generate` are factors; `prefill_speed` and `prefill_hbm` scale the model's; rates are bytes a
    second. `setup` raises InvalidRequest with the reason."""

    model: str = "ds-v3.2"
    prefill: int = 2
    decode: int = 4
    system: str = "dualpath"
    agents: int = 1024
    aps: float = 0.0
    duration_s: float = 0.0
    length: str = "64k"
    append: float = 1.0
    generate: float = 1.0
    tool_s: float = 0.0
    snic: float = 50e9
    cnic: float = 50e9
    staging: float = 80e9
    prefill_speed: float = 1.0
    prefill_hbm: float = 1.0
    calibration: str = ""
    seed: int = 0
    details: EngineDetails = field(default_factory=EngineDetails)

    def replaced(self, **changes: object) -> Setting:
        """The same run but for some values."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """Of the run: model, nodes, load, system, and every value that is not the default."""
        load = f"{self.aps:.3g}/s" if self.aps else f"{self.agents}"
        parts = [f"{self.model} {self.prefill}P{self.decode}D {self.length} {load} {self.system}"]
        shown = ("model", "prefill", "decode", "system", "agents", "aps", "length", "duration_s")
        hidden = (*shown, "calibration", "seed", "details")
        parts += _changed(self, Setting(), hidden)
        parts += _changed(self.details, EngineDetails(), ())
        return " ".join(parts)

    def setup(self) -> SimulationSetup:
        """What is simulated."""
        cluster = ClusterSpec(
            prefill_nodes=self.prefill,
            decode_nodes=self.decode,
            snic_bytes_per_s=self.snic,
            cnic_bytes_per_s=self.cnic,
            staging_bytes=self.staging,
        )
        calibration = read_calibration(Path(self.calibration) if self.calibration else None)
        model = modelled(find_model(self.model), calibration, cluster)
        model = dataclasses.replace(
            model, prefill_hbm_tokens=model.prefill_hbm_tokens * self.prefill_hbm
        )
        if self.prefill_speed != 1:
            compute = ScaledPrefill(model.compute, self.prefill_speed)
            model = dataclasses.replace(model, compute=compute)
        return SimulationSetup(
            cluster=cluster,
            model=model,
            system=named_system(self.system),
            arrivals=self._arrivals(),
            details=self.details,
        )

    def _arrivals(self) -> Sequence[AgentArrival]:
        trajectories = _set(self.length, self.seed)
        if self.append != 1 or self.generate != 1:
            length_max = PAPER_TABLE[Context(self.length.partition("-")[0])].length_max
            trajectories = scaled(
                trajectories, append=self.append, generate=self.generate, length_max=length_max
            )
        if self.aps:
            found = poisson(
                trajectories, agents_per_s=self.aps, duration_s=self.duration_s, seed=self.seed
            )
            if not found:
                raise InvalidRequest(f"nobody arrives in {self.duration_s:g} s at {self.aps:g}/s")
        else:
            found = offline(trajectories, agents=self.agents, seed=self.seed)
        if self.tool_s:
            found = with_tool_latency(found, mean_s=self.tool_s, seed=self.seed)
        return found


class ScaledPrefill:
    """A ComputeModel whose prefill is so many times as fast; decode and memory stay."""

    def __init__(self, model: ComputeModel, speed: float) -> None:
        if not speed > 0:
            raise InvalidRequest(f"prefill {speed} times as fast; it must be above 0")
        self._model = model
        self._speed = speed

    @property
    def prefill_tokens_per_s(self) -> float:
        """See ComputeModel."""
        return self._model.prefill_tokens_per_s * self._speed

    @property
    def hbm_tokens(self) -> int:
        """See ComputeModel."""
        return self._model.hbm_tokens

    def attention_s(self, prompts: Sequence[Prompt]) -> float:
        """See ComputeModel."""
        return self._model.attention_s(prompts) / self._speed

    def prefill_s(self, prompts: Sequence[Prompt]) -> float:
        """See ComputeModel."""
        return self._model.prefill_s(prompts) / self._speed

    def decode_step_s(self, sequences: int, context_tokens: int) -> float:
        """See ComputeModel."""
        return self._model.decode_step_s(sequences, context_tokens)


@lru_cache(maxsize=8)
def _set(length: str, seed: int) -> tuple[Trajectory, ...]:
    return named_set(f"agent-{length}", seed=seed)


def _changed(values: object, usual: object, hidden: Sequence[str]) -> list[str]:
    """`name=value` of the fields that are not as usual."""
    found = []
    for each in dataclasses.fields(values):  # type: ignore[arg-type]
        value = getattr(values, each.name)
        if each.name not in hidden and value != getattr(usual, each.name):
            found.append(f"{each.name}={value:g}")
    return found
