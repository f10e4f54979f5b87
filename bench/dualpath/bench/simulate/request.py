"""What a person asks the simulator for, checked, and the setups that come of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dualpath.bench.agents.arrivals import offline, poisson, with_tool_latency
from dualpath.bench.agents.named_set import named_set
from dualpath.bench.agents.trajectory import AgentArrival
from dualpath.bench.models.calibration import read_calibration
from dualpath.bench.models.catalogue import find_model
from dualpath.bench.simulate.cluster import ClusterSpec
from dualpath.bench.simulate.engine_details import EngineDetails
from dualpath.bench.simulate.simulated_model import modelled
from dualpath.bench.simulate.simulation import SimulationSetup
from dualpath.bench.simulate.system import named_system
from dualpath.transfer.errors import InvalidRequest

AGENTS = 512
RATES_MAX = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationRequest:
    """As the flags say; `aps` empty: offline. `setups` raises InvalidRequest with the reason."""

    model: str = "ds-v3.2"
    prefill: int = 2
    decode: int = 4
    agents: int = 0
    max_len: str = "64K"
    systems: Sequence[str] = ("dualpath",)
    aps: Sequence[float] = ()
    duration_s: float = 1200.0
    tool_s: float = 0.0
    snic_bytes_per_s: float = 50e9
    cnic_bytes_per_s: float = 50e9
    dram_bytes_per_s: float = 500e9
    staging_bytes: float = 80e9
    calibration: str = ""
    seed: int = 0

    def setups(self) -> Iterator[tuple[str, float, SimulationSetup]]:
        """Name of the system, agents a second (0: offline), what to simulate; all are checked
        before the first is simulated."""
        if self.agents and self.aps:
            raise InvalidRequest("agents arrive by --aps when online; leave --agents out")
        if not self.systems:
            raise InvalidRequest("no system is named")
        systems = [named_system(name) for name in self.systems]
        cluster = ClusterSpec(
            prefill_nodes=self.prefill,
            decode_nodes=self.decode,
            snic_bytes_per_s=self.snic_bytes_per_s,
            cnic_bytes_per_s=self.cnic_bytes_per_s,
            dram_bytes_per_s=self.dram_bytes_per_s,
            staging_bytes=self.staging_bytes,
        )
        calibration = read_calibration(Path(self.calibration) if self.calibration else None)
        model = modelled(find_model(self.model), calibration, cluster)
        for aps in self.aps or (0.0,):
            arrivals = self._arrivals(aps)
            for system in systems:
                yield (
                    system.name,
                    aps,
                    SimulationSetup(
                        cluster=cluster,
                        model=model,
                        system=system,
                        arrivals=arrivals,
                        details=EngineDetails(),
                    ),
                )

    def _arrivals(self, aps: float) -> tuple[AgentArrival, ...]:
        trajectories = named_set(f"agent-{self.max_len.lower()}", seed=self.seed)
        if aps:
            found = poisson(
                trajectories, agents_per_s=aps, duration_s=self.duration_s, seed=self.seed
            )
            if not found:
                raise InvalidRequest(f"nobody arrives in {self.duration_s:g} s at {aps:g} a second")
        else:
            found = offline(trajectories, agents=self.agents or AGENTS, seed=self.seed)
        if self.tool_s:
            found = with_tool_latency(found, mean_s=self.tool_s, seed=self.seed)
        return found

    def to_json(self) -> dict[str, object]:
        """What was asked for."""
        return dataclasses.asdict(self)


def rates(text: str) -> tuple[float, ...]:
    """`0.1:1.0:0.1` (first, last, step) or `0.1,0.2`. Raises InvalidRequest."""
    try:
        if ":" in text:
            first, last, step = (float(part) for part in text.split(":"))
            if not (0 < first <= last < math.inf and 0 < step < math.inf):
                raise InvalidRequest(f"--aps {text}: give FIRST:LAST:STEP, above 0 and growing")
            count = math.floor((last - first) / step + 1e-9) + 1
            if count > RATES_MAX:
                raise InvalidRequest(f"--aps {text}: {count} rates; at most {RATES_MAX}")
            return tuple(round(first + index * step, 9) for index in range(count))
        found = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise InvalidRequest(f"--aps {text!r}: {error}; give FIRST:LAST:STEP or a list") from error
    if not found or not all(0 < rate < math.inf for rate in found):
        raise InvalidRequest(f"--aps {text!r}: rates must be above 0")
    return found
