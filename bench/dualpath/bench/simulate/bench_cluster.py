"""The scaled-down cluster of `dualpath bench cluster`, as the simulator runs it.

The same links, loads, loads in flight and engines of each load as were measured; the simulator's
engine, flow network and read sides are those of every other run. What the bench does not have costs
nothing here: compute, memory rates, bounds of memory. What differs: a worker's sessions are dealt
beforehand; a load is read whole before it goes on, where agents relay chunk by chunk; splitting
takes the two nodes of the request, where agents take all; and the next load of a worker waits for
the hand-off of the one before, where the bench's does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dualpath.bench.agents.drawn_turns import DrawnTurns
from dualpath.bench.agents.trajectory import AgentArrival, Turn
from dualpath.bench.models.compute_model import Prompt
from dualpath.bench.simulate.bench_measurement import BenchMeasurement
from dualpath.bench.simulate.cluster import ClusterSpec
from dualpath.bench.simulate.engine_details import EngineDetails
from dualpath.bench.simulate.simulated_model import SimulatedModel
from dualpath.bench.simulate.simulation import SimulationSetup
from dualpath.bench.simulate.system import System
from dualpath.scheduler.engine_table import EngineTable
from dualpath.scheduler.policies import Policies
from dualpath.scheduler.read_side import DirectRead, ReadChoice, ShorterQueueRead, SplitRead
from dualpath.scheduler.request import Request
from dualpath.scheduler.settings import PolicySettings

FETCH_S = 0.001
WINDOW_S = 0.1
"""The bench samples its links so often."""
NEW_TOKENS = 1
"""The bench hands a block on that was not loaded, and stores none: what is computed here fills no
block, and weighs nothing."""
_ENDLESS = 1e15
_LAYERS = 30
_READS: dict[str, Callable[[], ReadChoice]] = {
    "direct": DirectRead,
    "paper": ShorterQueueRead,
    "split": SplitRead,
}


@dataclass(frozen=True)
class NoCompute:
    """Implements ComputeModel: everything is computed in next to no time."""

    hbm_tokens: int = int(_ENDLESS)
    prefill_tokens_per_s: float = _ENDLESS

    def attention_s(self, prompts: Sequence[Prompt]) -> float:
        """See ComputeModel."""
        return 0.0

    def prefill_s(self, prompts: Sequence[Prompt]) -> float:
        """See ComputeModel: not 0, since KV moves at rates of bytes over this time."""
        return 1e-9 if prompts else 0.0

    def decode_step_s(self, sequences: int, context_tokens: int) -> float:
        """See ComputeModel."""
        return 1e-9 if sequences else 0.0


@dataclass(frozen=True)
class PlacedSystem(System):
    """A system whose requests have their engines: `places` are those of prefill and decode by the
    id of the request."""

    read: Callable[[], ReadChoice] = DirectRead
    places: Mapping[str, tuple[str, str]] | None = None

    def make_policies(self, settings: PolicySettings) -> Policies:
        """See System."""
        places = self.places or {}
        return Policies(_Placed(places, 0), _Placed(places, 1), self.read())


class _Placed:
    """Implements PrefillChoice and DecodeChoice."""

    by_turns = False

    def __init__(self, places: Mapping[str, tuple[str, str]], side: int) -> None:
        self._places, self._side = places, side

    def round(self, table: EngineTable, group: int, queue: Iterable[Request] = ()) -> _PlacedRound:
        """See PrefillChoice and DecodeChoice."""
        return _PlacedRound(table, self._places, self._side)


class _PlacedRound:
    def __init__(
        self, table: EngineTable, places: Mapping[str, tuple[str, str]], side: int
    ) -> None:
        self._table, self._places, self._side = table, places, side

    def choose(self, request: Request) -> int | None:
        return self._table.engine_index[self._places[request.id][self._side]]

    def placed(self, engine: int) -> None:
        """Nothing is kept."""


@dataclass(frozen=True, slots=True)
class BenchSetup:
    """`sessions[a]`: of each load of worker `a`, in order, the session that it belongs to."""

    setup: SimulationSetup
    sessions: tuple[tuple[int, ...], ...]


def bench_setup(measured: BenchMeasurement, policy: str) -> BenchSetup:
    """One round of a measured policy (`direct`, `paper`, `split`)."""
    workload = measured.workload
    workers = min(measured.loads_in_flight, len(workload.sessions))
    loads = [
        [load for session in workload.sessions[worker::workers] for load in session]
        for worker in range(workers)
    ]
    tokens = workload.block_tokens
    arrivals = []
    places = {}
    for worker, mine in enumerate(loads):
        turns = tuple(Turn(NEW_TOKENS, 1, len(load.hashes) * tokens) for load in mine)
        arrivals.append(AgentArrival(0.0, DrawnTurns(turns)))
        for number, load in enumerate(mine, start=1):
            places[f"{worker}/{number}"] = _engines(measured, load.session)
    setup = SimulationSetup(
        cluster=ClusterSpec(
            prefill_nodes=measured.prefill,
            decode_nodes=measured.decode,
            gpus_per_node=measured.gpus,
            snic_bytes_per_s=measured.snic_bytes_per_s,
            cnic_bytes_per_s=measured.cnic_bytes_per_s,
            dram_bytes_per_s=_ENDLESS,
            staging_bytes=_ENDLESS,
            group_nodes=max(measured.prefill, measured.decode),
        ),
        model=SimulatedModel(
            name="bench",
            layers=_LAYERS,
            kv_bytes_per_token=workload.block_bytes / tokens,
            block_tokens=tokens,
            gpus_per_engine=1,
            lockstep_engines=1,
            prefill_hbm_tokens=_ENDLESS,
            compute=NoCompute(),
        ),
        system=PlacedSystem(policy, "of the bench", True, True, "", _READS[policy], places),
        arrivals=tuple(arrivals),
        answers_awaited=False,
        details=EngineDetails(
            fetch_s=FETCH_S, reads_at_once=measured.loads_in_flight, window_s=WINDOW_S
        ),
    )
    return BenchSetup(setup, tuple(tuple(load.session for load in mine) for mine in loads))


def _engines(measured: BenchMeasurement, session: int) -> tuple[str, str]:
    """As `bench.testbed.replay` places a session: engines by rail, then by node; all decode nodes
    in turn, on the engine's rail."""
    turn, number = divmod(session, measured.engines)
    rail, node = divmod(number, measured.prefill)
    return f"prefill{node}/{rail}", f"decode{turn % measured.decode}/{rail}"
