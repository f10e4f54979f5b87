"""What a person asks the simulator for, checked, and the setups that come of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dualpath.bench.agents.arrivals import offline, poisson, with_tool_latency
from dualpath.bench.agents.named_set import named_set
from dualpath.bench.agents.trace_set import trace_set
from dualpath.bench.agents.trajectory import AgentArrival
from dualpath.bench.models.calibration import read_calibration
from dualpath.bench.models.catalogue import find_model
from dualpath.bench.simulate.cluster import ClusterSpec
from dualpath.bench.simulate.engine_details import EngineDetails
from dualpath.bench.simulate.simulated_model import modelled
from dualpath.bench.simulate.simulation import SimulationSetup
from dualpath.bench.simulate.system import named_system
from dualpath.bench.slo import PAPER_SLO, Slo
from dualpath.bench.testbed.workload import Context
from dualpath.transfer.errors import InvalidRequest

AGENTS = 512
LENGTHS = tuple(context.value.upper() for context in Context)
RATES_MAX = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationRequest:
    """As the flags say; `aps` empty: offline. `setups` raises InvalidRequest with the reason.

    `trace`: a file whose conversations are the trajectories, in place of `max_len`; `recorded`:
    they arrive when they did. `tool_s` None: as the trace says, else nothing. `slo`: of the means;
    a system far past it is not run at higher rates.
    """

    model: str = "ds-v3.2"
    prefill: int = 2
    decode: int = 4
    agents: int = 0
    max_len: str = "64K"
    trace: str = ""
    recorded: bool = False
    systems: Sequence[str] = ("dualpath",)
    aps: Sequence[float] = ()
    duration_s: float = 1200.0
    tool_s: float | None = None
    snic_bytes_per_s: float = 50e9
    cnic_bytes_per_s: float = 50e9
    dram_bytes_per_s: float = 500e9
    staging_bytes: float = 80e9
    gpus_per_node: int = 8
    details: EngineDetails = field(default_factory=EngineDetails)
    slo: Slo = PAPER_SLO
    calibration: str = ""
    seed: int = 0

    def setups(self) -> Iterator[tuple[str, float, SimulationSetup]]:
        """Name of the system, agents a second (0: offline), what to simulate; all are checked
        before the first is simulated."""
        self._check()
        systems = [named_system(name) for name in dict.fromkeys(self.systems)]
        cluster = ClusterSpec(
            prefill_nodes=self.prefill,
            decode_nodes=self.decode,
            snic_bytes_per_s=self.snic_bytes_per_s,
            cnic_bytes_per_s=self.cnic_bytes_per_s,
            dram_bytes_per_s=self.dram_bytes_per_s,
            staging_bytes=self.staging_bytes,
            gpus_per_node=self.gpus_per_node,
        )
        calibration = read_calibration(Path(self.calibration) if self.calibration else None)
        model = modelled(find_model(self.model), calibration, cluster)
        agents = self._agents()
        for aps in sorted(self.aps) or (0.0,):
            arrivals = self._arrivals(agents, aps)
            for system in systems:
                yield (
                    system.name,
                    aps,
                    SimulationSetup(
                        cluster=cluster,
                        model=model,
                        system=system,
                        arrivals=arrivals,
                        details=self.details,
                    ),
                )

    def _check(self) -> None:
        if self.agents and (self.aps or self.recorded):
            by = "--aps" if self.aps else "the trace's times"
            raise InvalidRequest(f"agents arrive by {by}; leave --agents out")
        if self.recorded and (self.aps or not self.trace):
            raise InvalidRequest("--recorded takes the times of a --trace, not --online rates")
        if not self.systems:
            raise InvalidRequest("no system is named; give --system dualpath, or a list")
        if self.seed < 0:
            raise InvalidRequest(f"--seed {self.seed}: give 0 or more")
        for flag, nodes in (("prefill", self.prefill), ("decode", self.decode)):
            if nodes < 1:
                raise InvalidRequest(f"--{flag} {nodes}: a cluster has 1 node of each or more")

    def _agents(self) -> tuple[AgentArrival, ...]:
        """Whose trajectories are run; their times count when recorded."""
        if self.trace:
            return trace_set(self.trace)
        if self.max_len.upper() not in LENGTHS:
            raise InvalidRequest(f"--max-len {self.max_len}: give {', '.join(LENGTHS)}")
        sets = named_set(f"agent-{self.max_len.lower()}", seed=self.seed)
        return tuple(AgentArrival(0.0, trajectory) for trajectory in sets)

    def _arrivals(self, agents: Sequence[AgentArrival], aps: float) -> tuple[AgentArrival, ...]:
        trajectories = [agent.trajectory for agent in agents]
        if self.recorded:
            found = tuple(agents)
        elif aps:
            found = poisson(
                trajectories, agents_per_s=aps, duration_s=self.duration_s, seed=self.seed
            )
            if not found:
                raise InvalidRequest(f"nobody arrives in {self.duration_s:g} s at {aps:g} a second")
        else:
            found = offline(trajectories, agents=self.agents or AGENTS, seed=self.seed)
        if self.tool_s is not None:
            found = with_tool_latency(found, mean_s=self.tool_s, seed=self.seed)
        return found

    @property
    def title(self) -> str:
        """Of a picture."""
        work = Path(self.trace).name if self.trace else self.max_len
        return f"{self.model} {self.prefill}P{self.decode}D, {work}: simulated"

    def to_json(self) -> dict[str, object]:
        """What was asked for."""
        return dataclasses.asdict(self) | {"slo": self.slo.to_json()}


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
