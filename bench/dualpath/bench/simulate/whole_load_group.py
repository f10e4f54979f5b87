"""Prefill engines without layer-wise prefill: KV of a whole forward batch lies in GPU memory.

The paper says what layer-wise prefill takes away (arXiv 2602.21548, 2.1 and 7.5): memory that
limits the batch, and transfers that nothing hides. So a step here loads the hits of its batch from
host memory, then computes, then sends the KV of the prompts that are whole to their decode nodes;
one after the other, for all engines of the group. Reads from storage go on meanwhile, into host
memory. A prompt that is cut stays in GPU memory until it is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dualpath.bench.simulate.flow_network import FlowNetwork
from dualpath.bench.simulate.job import Job
from dualpath.bench.simulate.link import Link
from dualpath.bench.simulate.prefill_group import Parts, PrefillEngine, PrefillGroup, StepRules
from dualpath.bench.simulate.virtual_clock import Handler, VirtualClock
from dualpath.scheduler.forward_batch import PrefillWork


class WholeLoadGroup(PrefillGroup):
    """As PrefillGroup. `hbm_tokens`: KV that one engine holds; a longer prompt goes alone.
    `loaded(job)` is called when a job's hits have left host memory."""

    def __init__(
        self,
        clock: VirtualClock,
        network: FlowNetwork,
        engines: Sequence[PrefillEngine],
        rules: StepRules,
        prefilled: Handler,
        loaded: Handler,
        hbm_tokens: float,
    ) -> None:
        super().__init__(clock, network, engines, rules, prefilled)
        self._hbm_tokens = hbm_tokens
        self._loaded = loaded
        self._loads: list[Job] = []
        self._compute_s = 0.0
        self._computing = False
        self.hbm_peak_tokens = 0

    def _works(self, engine: PrefillEngine) -> Iterator[PrefillWork]:
        held = 0
        for job, work in zip(engine.ready, engine.works(), strict=False):
            held += job.tokens
            if held > self._hbm_tokens and held > job.tokens:
                return
            self.hbm_peak_tokens = max(self.hbm_peak_tokens, held)
            yield work

    def _start(self, chosen: Sequence[tuple[PrefillEngine, Parts]], compute_s: float) -> None:
        self._compute_s = compute_s
        self._left = 1
        for engine, parts in chosen:
            new = [job for job, _ in parts if not job.computed]
            self._loads += new
            self._copy(engine.place.copy_links, sum(job.bytes_by_prefill for job in new))
            self._take(engine, parts)
        self._part_ended(None)

    def _copy(self, links: tuple[Link, ...], size: float) -> None:
        if size:
            self._left += 1
            cap = min(link.capacity for link in links)
            self._network.start_capped(links, size, cap, self._part_ended)

    def _part_ended(self, _: object) -> None:
        self._left -= 1
        if self._left:
            return
        if self._compute_s:
            loads, self._loads = self._loads, []
            seconds, self._compute_s = self._compute_s, 0.0
            self._computing, self._left = True, 1
            self._clock.after(seconds, self._part_ended)
            for job in loads:
                self._loaded(job)
        elif self._computing:
            self._computing, self._left = False, 1
            token = self._rules.kv_bytes_per_token
            for job in self._whole:
                job.first_token_s = self._clock.now
                decode = job.decode.place
                links = (job.prefill.place.cnic_out, decode.cnic_in, decode.node.dram)
                self._copy(links, job.tokens * token)
            self._part_ended(None)
        else:
            self._end()
