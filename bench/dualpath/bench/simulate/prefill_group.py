"""Prefill engines: forward batches, and the KV that moves while they compute.

Engines of a group that exchange experts step together (`lockstep`): each fills its own forward
batch by the compute quota (`dualpath.scheduler.forward_batch`), and the step lasts as long as the
slowest of them. Otherwise each engine is a group of its own.

Layer-wise overlap in closed form: the KV that a step loads into its engines, and what it sends to
decode nodes, are flows that take at most their bytes over the step's compute time, the rate at
which layers are consumed and made. Where links hold them up, the step ends when they do. What
cannot overlap, the first layer's load at full rate, is added: of L layers with load l and compute
c each, l + (L - 1) max(l, c) + c = L max(l, c) + min(l, c).
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dualpath.bench.models.compute_model import ComputeModel
from dualpath.bench.simulate.cluster import EnginePlace
from dualpath.bench.simulate.flow_network import FlowNetwork
from dualpath.bench.simulate.job import Job
from dualpath.bench.simulate.link import Link
from dualpath.bench.simulate.virtual_clock import Handler, VirtualClock
from dualpath.scheduler.forward_batch import PrefillWork, QuotaBatching

Parts = list[tuple[Job, int]]
"""Jobs of a forward batch, and how many of its new tokens each has in it."""


class PrefillEngine:
    """What waits at one engine, and what it has been given in all."""

    __slots__ = ("attention_s", "changed", "group", "place", "ready", "requests", "tokens")

    def __init__(self, place: EnginePlace) -> None:
        self.place = place
        self.group: PrefillGroup
        self.ready: deque[Job] = deque()
        self.requests = self.tokens = 0
        self.changed = True
        self.attention_s = 0.0

    def promise(self, job: Job) -> None:
        """The scheduler has chosen this engine."""
        self.requests += 1
        self.tokens += job.tokens
        self.changed = True

    def leave(self, job: Job) -> None:
        """A job needs this engine no more."""
        self.requests -= 1
        self.tokens -= job.tokens
        self.changed = True

    def works(self) -> Iterator[PrefillWork]:
        """What waits, in order."""
        for job in self.ready:
            yield PrefillWork(job.id, job.hit + job.computed, job.new - job.computed)


@dataclass(frozen=True, slots=True)
class StepRules:
    """What all groups share. `moves`: KV moves while a step computes (layer-wise prefill)."""

    model: ComputeModel
    batching: QuotaBatching
    layers: int
    kv_bytes_per_token: float
    moves: bool


class PrefillGroup:
    """`add` hands a job to one of its engines; `prefilled(job)` is called at the end of the step
    that computes the last of its tokens, when what it sends has arrived."""

    def __init__(
        self,
        clock: VirtualClock,
        network: FlowNetwork,
        engines: Sequence[PrefillEngine],
        rules: StepRules,
        prefilled: Handler,
    ) -> None:
        self._clock = clock
        self._network = network
        self._engines = engines
        self._rules = rules
        self._prefilled = prefilled
        self._running = False
        self._left = 0
        self._fill_s = 0.0
        self._whole: list[Job] = []
        self.steps = 0
        self.compute_s = 0.0
        self.busy_s = 0.0
        # Of each step: when it began, attention of the slowest engine, mean of all engines.
        self.attention_steps = array("d")
        self._begun_s = 0.0
        for engine in engines:
            engine.group = self

    def add(self, engine: PrefillEngine, job: Job) -> None:
        """A job whose hits have been read."""
        engine.ready.append(job)
        if not self._running:
            self._running = True
            # Others that become ready at this instant go into the same step.
            self._clock.at(self._clock.now, self._begin)

    def _begin(self, _: object) -> None:
        rules = self._rules
        chosen: list[tuple[PrefillEngine, Parts]] = []
        compute_s = most = total = 0.0
        for engine in self._engines:
            if not engine.ready:
                continue
            batch = rules.batching.fill(self._works(engine))
            works = batch.works
            seconds = rules.model.prefill_s([(work.cached, work.new) for work in works])
            compute_s = max(compute_s, seconds)
            most = max(most, batch.attention_s)
            total += batch.attention_s
            engine.attention_s += batch.attention_s
            parts = list(zip(engine.ready, [work.new for work in works], strict=False))
            chosen.append((engine, parts))
        if not chosen:
            self._running = False
            return
        self.steps += 1
        self.compute_s += compute_s
        self._begun_s = self._clock.now
        self.attention_steps.extend((self._begun_s, most, total / len(self._engines)))
        self._start(chosen, compute_s)

    def _works(self, engine: PrefillEngine) -> Iterator[PrefillWork]:
        """What may go into the engine's next batch, in order."""
        return engine.works()

    def _start(self, chosen: Sequence[tuple[PrefillEngine, Parts]], compute_s: float) -> None:
        """Compute, while KV moves."""
        self._left = 1
        self._fill_s = 0.0
        for engine, parts in chosen:
            if self._rules.moves:
                self._move(engine, parts, compute_s)
            self._take(engine, parts)
        self._clock.after(compute_s, self._part_ended)

    def _move(self, engine: PrefillEngine, parts: Parts, compute_s: float) -> None:
        """Start the flows of one engine's batch."""
        rules, place = self._rules, engine.place
        token = rules.kv_bytes_per_token
        direct = relayed = 0.0
        for job, new in parts:
            decode = job.decode.place
            # Each chunk of a prompt loads what lies before it once more: memory keeps one layer.
            before = job.computed * token
            back = new * token
            direct += job.bytes_by_prefill + before
            if not job.computed:
                back += job.bytes_by_prefill
            self._flow((place.cnic_out, decode.cnic_in, decode.node.dram), back, compute_s)
            if job.bytes_by_decode:
                relayed += job.bytes_by_decode
                links = (decode.node.dram, decode.cnic_out, place.cnic_in)
                self._flow(links, job.bytes_by_decode, compute_s)
        if direct:
            self._flow(place.copy_links, direct, compute_s)
        first_layer = (direct + relayed) / rules.layers / place.cnic_in.capacity
        self._fill_s = max(self._fill_s, min(first_layer, compute_s / rules.layers))

    def _flow(self, links: tuple[Link, ...], size: float, compute_s: float) -> None:
        self._left += 1
        self._network.start_capped(links, size, size / compute_s, self._part_ended)

    def _take(self, engine: PrefillEngine, parts: Parts) -> None:
        """The batch leaves the queue, but for the rest of a prompt that was cut."""
        now = self._clock.now
        for job, new in parts:
            if job.prefill_s < 0:
                job.prefill_s = now
            job.computed += new
            if job.computed == job.new:
                engine.ready.popleft()
                self._whole.append(job)

    def _part_ended(self, _: object) -> None:
        self._left -= 1
        if self._left:
            return
        if self._fill_s:
            fill_s, self._fill_s, self._left = self._fill_s, 0.0, 1
            self._clock.after(fill_s, self._part_ended)
            return
        self._end()

    def _end(self) -> None:
        """The step is over; the next one begins, and whole prompts go on."""
        now = self._clock.now
        self.busy_s += now - self._begun_s
        whole, self._whole = self._whole, []
        self._begin(None)
        for job in whole:
            job.prefill.leave(job)
            if job.first_token_s < 0:
                job.first_token_s = now
            self._prefilled(job)
