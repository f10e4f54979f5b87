"""Generated sessions for a replay without a trace: seeded, the same on every machine.

What they have of real ones: conversations that grow turn by turn, with pauses; system prompts that
many share; prompts that come once; conversations that are left for good in the middle.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from dualpath.bench.testbed.trace_formats import RUNS_BLOCK_TOKENS, TraceRequest

_CONVERSATIONS = 300
_LONERS = 900
_SPAN_S = 4 * 3600.0
_SYSTEM_PROMPTS = 4


def synthetic_requests(seed: int) -> Iterator[TraceRequest]:
    """Yield the requests in order of time; one scope."""
    chance = random.Random(seed)
    fresh = iter(range(1 << 40))
    systems = [[next(fresh) for _ in range(chance.randint(8, 40))] for _ in range(_SYSTEM_PROMPTS)]
    found: list[TraceRequest] = []
    for number in range(_CONVERSATIONS):
        prompt = list(chance.choice(systems))
        at_s = chance.uniform(0, _SPAN_S)
        for _ in range(min(60, 1 + int(chance.expovariate(1 / 10)))):
            prompt += [next(fresh) for _ in range(chance.randint(1, 24))]
            found.append(_request(f"conversation-{number}", at_s, prompt))
            at_s += chance.lognormvariate(3.5, 1.2)
    for number in range(_LONERS):
        prompt = list(chance.choice(systems)) if chance.random() < 0.5 else []
        prompt += [next(fresh) for _ in range(chance.randint(4, 120))]
        found.append(_request(f"loner-{number}", chance.uniform(0, _SPAN_S), prompt))
    yield from sorted(found, key=lambda request: (request.start_s, request.session))


def _request(session: str, start_s: float, blocks: list[int]) -> TraceRequest:
    return TraceRequest(
        scope="",
        session=session,
        start_s=start_s,
        block_tokens=RUNS_BLOCK_TOKENS,
        block_ids=tuple(blocks),
        input_tokens=len(blocks) * RUNS_BLOCK_TOKENS,
        output_tokens=RUNS_BLOCK_TOKENS,
    )
