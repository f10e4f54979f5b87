"""Where a turn's KV goes: storage to host memory, to the decode engine, and new blocks back.

Owns the host memory of nodes. A turn asks for all its memory when it is assigned: at the prefill
node for what that reads, at the decode node for the whole prompt. Each side reads as soon as its
own is there. Every budget serves in the order of assignment, so turns cannot wait for each other in
a circle: the oldest one lacks nothing that a younger one holds.
What moves with a forward batch belongs to `PrefillGroup` and `WholeLoadGroup`.
"""

from __future__ import annotations

from dualpath.bench.simulate.cluster import Cluster
from dualpath.bench.simulate.flow_network import FlowNetwork
from dualpath.bench.simulate.job import Job
from dualpath.bench.simulate.read_queue import ReadQueue
from dualpath.bench.simulate.route import Route
from dualpath.bench.simulate.simulated_model import SimulatedModel
from dualpath.bench.simulate.system import System
from dualpath.bench.simulate.virtual_clock import Handler, VirtualClock


class KvMoves:
    """`fetch` ends in `ready(job)`, `hand_over`, once the prompt's KV is at the decode node, in
    `landed(job)`; nobody waits for `store`."""

    def __init__(
        self,
        clock: VirtualClock,
        network: FlowNetwork,
        cluster: Cluster,
        model: SimulatedModel,
        system: System,
        reads_at_once: int,
        ready: Handler,
        landed: Handler,
    ) -> None:
        self._clock = clock
        self._network = network
        self._system = system
        self._token_bytes = model.kv_bytes_per_token
        self._block_tokens = model.block_tokens
        self._ready = ready
        self._landed = landed
        self.queues = {
            node.name: ReadQueue(clock, network, node, reads_at_once, self._side_ended)
            for node in cluster.nodes()
        }
        self._copies: dict[str, Route] = {}
        self._stores: dict[str, Route] = {}
        for place in (*cluster.prefill_engines, *cluster.decode_engines):
            self._copies[place.name] = network.route(place.copy_links)
        for place in cluster.decode_engines:
            links = (*place.copy_links, place.node.snic_out)
            self._stores[place.name] = network.route(links)
        self.bytes_stored = 0.0

    def fetch(self, job: Job) -> None:
        """Bring the hits of a job whose engines and read shares are known."""
        if not self._system.io:
            job.read_begin_s = job.read_end_s = self._clock.now
            self._ready(job)
            return
        by_prefill = round(job.bytes_by_prefill / self._token_bytes)
        job.tokens_by_prefill = by_prefill
        # What waits for memory waits to be read.
        self.queues[job.prefill.place.node.name].tokens += by_prefill
        self.queues[job.decode.place.node.name].tokens += job.hit - by_prefill
        job.sides_left = 2
        if job.bytes_by_prefill:
            job.prefill.place.node.staging.take(job.bytes_by_prefill, self._prefill_room, job)
        else:
            self._prefill_room(job)
        job.decode.place.node.staging.take(self._prompt_bytes(job), self._decode_room, job)

    def hand_over(self, job: Job) -> None:
        """The prefill is done: bring the prompt's KV into the decode engine's memory."""
        if not self._system.io:
            self._land(job)
            return
        if self._system.layerwise:
            self.loaded(job)
        self._copy_in(job)

    def loaded(self, job: Job) -> None:
        """What the prefill node has read of a job has left its memory."""
        if job.bytes_by_prefill:
            job.prefill.place.node.staging.give(job.bytes_by_prefill)

    def store(self, job: Job) -> None:
        """Write the full blocks that the turn has made, from the decode engine."""
        if not self._system.io:
            return
        blocks = (job.tokens + job.generate) // self._block_tokens - job.hit // self._block_tokens
        size = blocks * self._block_tokens * self._token_bytes
        self.bytes_stored += size
        self._network.start(self._stores[job.decode.place.name], size, _nobody)

    def _prompt_bytes(self, job: Job) -> float:
        return job.tokens * self._token_bytes

    def _prefill_room(self, job: Job) -> None:
        if job.bytes_by_prefill:
            queue = self.queues[job.prefill.place.node.name]
            queue.add(job, job.bytes_by_prefill, job.tokens_by_prefill)
        else:
            self._side_ended(job)

    def _decode_room(self, job: Job) -> None:
        if job.bytes_by_decode:
            queue = self.queues[job.decode.place.node.name]
            queue.add(job, job.bytes_by_decode, job.hit - job.tokens_by_prefill)
        else:
            self._side_ended(job)

    def _side_ended(self, job: Job) -> None:
        """What one side reads has been read, and its memory is there."""
        job.sides_left -= 1
        if job.sides_left:
            return
        job.read_end_s = self._clock.now
        if job.read_begin_s < 0:
            job.read_begin_s = job.read_end_s
        self._ready(job)

    def _copy_in(self, job: Job) -> None:
        route = self._copies[job.decode.place.name]
        self._network.start(route, self._prompt_bytes(job), self._land, job)

    def _land(self, job: Job) -> None:
        if self._system.io:
            job.decode.place.node.staging.give(self._prompt_bytes(job))
        job.decode_s = self._clock.now
        self._landed(job)


def _nobody(_: object) -> None:
    """What was stored is waited for by nobody."""
