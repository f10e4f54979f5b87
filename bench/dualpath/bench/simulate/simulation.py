"""A run: agents in a closed loop over a cluster, from their arrival to their last token.

A turn's way: the scheduler names its engines and who reads (`Leaders`); memory is taken for it;
its hits are read from storage (`ReadQueue`); a prefill engine computes the rest (`PrefillGroup`);
its KV lies at the decode node by then, is copied to the decode engine, and decoded
(`DecodeEngine`); full new blocks are written to storage; the agent's next turn follows after its
tool's time. `KvMoves` owns the parts in which KV moves.

The run is a function of its arguments: no clock but the virtual one, no randomness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from dualpath.bench.agents.trajectory import AgentArrival, TurnPrompt
from dualpath.bench.simulate.cluster import Cluster, ClusterSpec, EnginePlace
from dualpath.bench.simulate.conservation import check_conservation
from dualpath.bench.simulate.decode_engine import DecodeEngine
from dualpath.bench.simulate.engine_details import EngineDetails
from dualpath.bench.simulate.flow_network import FlowNetwork
from dualpath.bench.simulate.job import Job
from dualpath.bench.simulate.kv_moves import KvMoves
from dualpath.bench.simulate.leaders import Group, Leaders, Loaded
from dualpath.bench.simulate.prefill_group import PrefillEngine, PrefillGroup, StepRules
from dualpath.bench.simulate.read_queue import ReadQueue
from dualpath.bench.simulate.result import SimulationResult, attention_balance
from dualpath.bench.simulate.simulated_model import SimulatedModel
from dualpath.bench.simulate.system import System
from dualpath.bench.simulate.turn_records import TurnRecords
from dualpath.bench.simulate.virtual_clock import VirtualClock
from dualpath.bench.simulate.whole_load_group import WholeLoadGroup
from dualpath.scheduler.assignment import Assignment
from dualpath.scheduler.engine_spec import EngineSpec, NodeSpec, Role
from dualpath.scheduler.forward_batch import QuotaBatching
from dualpath.scheduler.request import Request
from dualpath.scheduler.scheduler import Scheduler
from dualpath.scheduler.settings import PolicySettings, SchedulerLimits
from dualpath.transfer.errors import InvalidRequest

FETCH_MAX = 256
EVENTS_A_LOOK = 20_000
"""Events between two looks at how far the run is."""
Told = Callable[[float, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSetup:
    """What is simulated. `arrivals` in any order."""

    cluster: ClusterSpec
    model: SimulatedModel
    system: System
    arrivals: Sequence[AgentArrival]
    details: EngineDetails = field(default_factory=EngineDetails)
    answers_awaited: bool = True
    """False: an agent's next turn follows the prefill of the one before, as loads are replayed."""


def simulate(setup: SimulationSetup, told: Told | None = None) -> SimulationResult:
    """Run to the end; `told(share done, text)` now and then. Raises InvalidRequest for a setup
    that cannot run, AssertionError when a conservation law is broken."""
    return _Simulation(setup).run(told)


def policy_settings(setup: SimulationSetup) -> PolicySettings:
    """alpha and beta as profiled: of the storage NIC, and of one prefill engine over the mean
    prompt of these agents, hits included, since that is what tok_e counts."""
    model = setup.model
    tokens = appended = 0
    known: dict[int, tuple[int, int]] = {}
    for arrival in setup.arrivals:
        # Agents share trajectories; what is the same object is counted once.
        trajectory = arrival.trajectory
        sums = known.get(id(trajectory))
        if sums is None:
            prompts = tuple(trajectory.prompts())
            sums = sum([one.tokens for one in prompts]), sum([one.append for one in prompts])
            known[id(trajectory)] = sums
        tokens += sums[0]
        appended += sums[1]
    prefix_factor = tokens / max(1, appended)
    return PolicySettings.profiled(
        read_tokens_per_s=setup.cluster.snic_bytes_per_s / model.kv_bytes_per_token,
        compute_tokens_per_s=prefix_factor * model.compute.prefill_tokens_per_s,
        alpha_s=setup.details.alpha_s,
        beta_s=setup.details.beta_s,
    )


class _Agent:
    """Where one agent stands."""

    __slots__ = ("number", "prompts")

    def __init__(self, prompts: Iterable[TurnPrompt]) -> None:
        self.prompts: Iterator[TurnPrompt] = iter(prompts)
        self.number = 0


class _Simulation:
    """Wires the parts of one run together; see the module docstring."""

    def __init__(self, setup: SimulationSetup) -> None:
        self._setup = setup
        model, details = setup.model, setup.details
        prompts = _checked_prompts(setup)
        self._turns = sum([len(prompts[id(one.trajectory)]) for one in setup.arrivals])
        self._clock = VirtualClock()
        self._network = FlowNetwork(self._clock)
        self._cluster = Cluster(setup.cluster, model.gpus_per_engine, details.window_s)
        self._records = TurnRecords()
        self._jobs: dict[str, Job] = {}
        self._hit_bytes = 0.0
        self._scheduler = Scheduler(
            setup.system.make_policies(policy_settings(setup)),
            SchedulerLimits(fetch_max=FETCH_MAX, requests_max=self._turns + 1),
        )
        self._moves = KvMoves(
            self._clock,
            self._network,
            self._cluster,
            model,
            setup.system,
            details.reads_at_once,
            self._ready,
            self._landed,
        )
        self._make_engines()
        self._agents = [_Agent(prompts[id(one.trajectory)]) for one in setup.arrivals]
        for index, arrival in enumerate(setup.arrivals):
            self._clock.at(arrival.at_s, self._next_turn, index)

    def run(self, told: Told | None) -> SimulationResult:
        """To the end."""
        while not self._clock.run(events_max=EVENTS_A_LOOK):
            if told is not None:
                done = len(self._records)
                told(done / self._turns, f"{done} turns, {self._clock.now:.0f} s simulated")
        if len(self._records) < self._turns:
            raise InvalidRequest(
                f"{self._turns - len(self._records)} of {self._turns} turns wait for ever: "
                f"{self._scheduler.counts().waiting} for an engine"
            )
        end_s = self._clock.now
        io = self._setup.system.io
        check_conservation(
            cluster=self._cluster,
            network=self._network,
            records=self._records,
            turns=self._turns,
            hit_bytes=self._hit_bytes if io else 0.0,
            stored_bytes=self._moves.bytes_stored,
            end_s=end_s,
        )
        return self._result()

    def _make_engines(self) -> None:
        model, details, system = self._setup.model, self._setup.details, self._setup.system
        compute = model.compute
        rules = StepRules(
            compute,
            QuotaBatching(
                lambda cached, new: compute.attention_s(((cached, new),)), quota_s=details.quota_s
            ),
            model.layers,
            model.kv_bytes_per_token,
            system.io and system.layerwise,
        )
        prefills = [PrefillEngine(place) for place in self._cluster.prefill_engines]
        width = model.lockstep_engines if details.lockstep else 1
        self._groups = [
            self._group(prefills[at : at + width], rules) for at in range(0, len(prefills), width)
        ]
        decodes = [
            DecodeEngine(self._clock, place, compute, self._done)
            for place in self._cluster.decode_engines
        ]
        self._prefills = {engine.place.name: engine for engine in prefills}
        self._decodes = {engine.place.name: engine for engine in decodes}
        self._register(Role.PREFILL, [one.place for one in prefills], 0)
        self._register(Role.DECODE, [one.place for one in decodes], compute.hbm_tokens)
        found: dict[str, tuple[list[tuple[str, Loaded]], dict[str, ReadQueue]]] = {}
        loaded: list[tuple[EnginePlace, Loaded]] = [(one.place, one) for one in prefills]
        loaded += [(one.place, one) for one in decodes]
        for place, engine in loaded:
            engines, nodes = found.setdefault(place.group, ([], {}))
            engines.append((place.name, engine))
            nodes[place.node.name] = self._moves.queues[place.node.name]
        groups = [
            Group(name, engines, tuple(nodes.items())) for name, (engines, nodes) in found.items()
        ]
        self._leaders = Leaders(
            self._clock, self._scheduler, groups, details.fetch_s, FETCH_MAX, self._assigned
        )

    def _group(self, engines: Sequence[PrefillEngine], rules: StepRules) -> PrefillGroup:
        """Engines that step together, as the system moves KV."""
        system = self._setup.system
        if system.layerwise or not system.io:
            return PrefillGroup(self._clock, self._network, engines, rules, self._prefilled)
        return WholeLoadGroup(
            self._clock,
            self._network,
            engines,
            rules,
            self._prefilled,
            self._moves.loaded,
            self._setup.model.prefill_hbm_tokens,
        )

    def _register(self, role: Role, places: Sequence[EnginePlace], hbm_tokens: int) -> None:
        model, spec = self._setup.model, self._setup.cluster
        for place in places:
            self._scheduler.register(
                EngineSpec(place.name, role, place.group, place.node.name, hbm_tokens),
                # Without its bound on host memory: the paper's rules do not know it, and here turns
                # wait for that memory once they are assigned.
                NodeSpec(
                    place.node.name,
                    read_tokens_per_s=spec.snic_bytes_per_s / model.kv_bytes_per_token,
                ),
            )

    def _next_turn(self, index: int) -> None:
        """An agent's next turn, if it has one, after its tool's time."""
        agent = self._agents[index]
        prompt = next(agent.prompts, None)
        if prompt is None:
            return
        if prompt.tool_s and agent.number:
            self._clock.after(prompt.tool_s, self._submit, (index, prompt))
        else:
            self._submit((index, prompt))

    def _submit(self, turn: tuple[int, TurnPrompt]) -> None:
        index, prompt = turn
        agent = self._agents[index]
        agent.number += 1
        block = self._setup.model.block_tokens
        # Full blocks are stored; one token at least is computed, for the first one to come.
        hit = min(prompt.context, prompt.tokens - 1) // block * block
        job = Job(index, agent.number, hit, prompt.tokens - hit, prompt.generate, self._clock.now)
        self._jobs[job.id] = job
        self._scheduler.submit(
            Request(job.id, job.tokens, hit, prompt.generate, str(index)), self._clock.now
        )
        self._leaders.wake()

    def _assigned(self, assignment: Assignment) -> None:
        job = self._jobs[assignment.request.id]
        job.assigned_s = self._clock.now
        job.prefill = self._prefills[assignment.prefill]
        job.decode = self._decodes[assignment.decode]
        job.prefill.promise(job)
        job.decode.promise(job)
        if self._setup.system.io:
            size = job.hit * self._setup.model.kv_bytes_per_token
            self._hit_bytes += size
            job.bytes_by_prefill = size * assignment.read.prefill
            job.bytes_by_decode = size - job.bytes_by_prefill
        self._moves.fetch(job)

    def _ready(self, job: Job) -> None:
        job.prefill.group.add(job.prefill, job)

    def _prefilled(self, job: Job) -> None:
        self._moves.hand_over(job)
        if not self._setup.answers_awaited:
            self._next_turn(job.agent)

    def _landed(self, job: Job) -> None:
        self._scheduler.prefilled(job.id)
        job.decode.join(job)

    def _done(self, job: Job) -> None:
        job.done_s = self._clock.now
        self._scheduler.finished(job.id)
        self._moves.store(job)
        self._records.add(job)
        del self._jobs[job.id]
        if self._setup.answers_awaited:
            self._next_turn(job.agent)

    def _result(self) -> SimulationResult:
        cluster, groups, records = self._cluster, self._groups, self._records
        nodes = cluster.nodes()
        count = max([1, *(len(node.meter.windows) for node in nodes)])
        windows = np.zeros((len(nodes), count))
        for row, node in enumerate(nodes):
            windows[row, : len(node.meter.windows)] = node.meter.windows
        jct_s = float(records.column("done_s").max())
        engines = self._decodes.values()
        return SimulationResult(
            system=self._setup.system.name,
            jct_s=jct_s,
            records=records,
            snic_names=[node.name for node in nodes],
            snic_windows=windows,
            window_s=self._setup.details.window_s,
            bytes_read=sum(node.snic_in.carried for node in nodes),
            bytes_stored=self._moves.bytes_stored,
            attention_balance=attention_balance([group.attention_steps for group in groups], jct_s),
            prefill_busy=sum(group.busy_s for group in groups) / len(groups) / jct_s,
            prefill_compute=sum(group.compute_s for group in groups) / len(groups) / jct_s,
            decode_busy=sum(engine.busy_s for engine in engines) / len(engines) / jct_s,
            steps=sum(group.steps for group in groups),
            fetches=self._leaders.fetches,
            events=self._clock.events_run,
        )


def _checked_prompts(setup: SimulationSetup) -> dict[int, tuple[TurnPrompt, ...]]:
    """The prompts of each trajectory, by the identity of the object, which `setup` keeps: agents
    share them. Raises InvalidRequest if one fits no engine."""
    most, model = setup.model.compute.hbm_tokens, setup.model
    staging = setup.cluster.staging_bytes / model.kv_bytes_per_token
    found: dict[int, tuple[TurnPrompt, ...]] = {}
    for number, arrival in enumerate(setup.arrivals):
        if id(arrival.trajectory) in found:
            continue
        prompts = found[id(arrival.trajectory)] = tuple(arrival.trajectory.prompts())
        for prompt in prompts:
            if prompt.tokens < 1:
                raise InvalidRequest(f"agent {number} has a turn with an empty prompt")
            tokens = prompt.tokens + prompt.generate
            for what, room, remedy in (
                ("a decode engine's memory", most, ""),
                ("a node's host memory", staging, "; give more --staging"),
            ):
                if tokens > room:
                    raise InvalidRequest(
                        f"agent {number} has a turn of {tokens} tokens; {what} holds {room:.0f} "
                        f"of {model.name}{remedy}"
                    )
    if not found:
        raise InvalidRequest("there are no agents: nothing to simulate")
    return found
