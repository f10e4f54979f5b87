"""What one agent does, as values: turns that grow a context, and the prompts that come of them.

A turn appends tokens to what is there and has some generated; both stay in the context of the next
turn, unless that turn keeps less (a prompt that was rewritten or compacted).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dualpath.transfer.errors import InvalidRequest

TOKENS_MAX = 1 << 24
TURNS_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of an agent, in tokens.

    `append` come behind what is kept, `generate` are then decoded. `kept` is how much of the
    context before it the prompt repeats, None for all. `tool_s` passes between the end of the turn
    before and this request (a tool's or a person's time).
    """

    append: int
    generate: int
    kept: int | None = None
    tool_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.append <= TOKENS_MAX or not 0 <= self.generate <= TOKENS_MAX:
            raise InvalidRequest(
                f"a turn appends and generates 0..{TOKENS_MAX} tokens, "
                f"not {self.append} and {self.generate}"
            )
        if self.kept is not None and self.kept < 0:
            raise InvalidRequest(f"a turn keeps 0 tokens or more of its context, not {self.kept}")
        if not math.isfinite(self.tool_s) or self.tool_s < 0:
            raise InvalidRequest(f"the time before a turn is 0 s or more, not {self.tool_s}")


@dataclass(frozen=True, slots=True)
class TurnPrompt:
    """A turn where it stands: `context` tokens are stored, `append` have to be computed."""

    context: int
    append: int
    generate: int
    tool_s: float = 0.0

    @property
    def tokens(self) -> int:
        """Of the whole prompt."""
        return self.context + self.append


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The turns of one agent, in order. `first_context` tokens are stored before the first one:
    a system prompt and the descriptions of tools, or what an earlier conversation left."""

    turns: tuple[Turn, ...]
    first_context: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.turns) <= TURNS_MAX:
            raise InvalidRequest(f"a trajectory has 1..{TURNS_MAX} turns, not {len(self.turns)}")
        if not 0 <= self.first_context <= TOKENS_MAX:
            raise InvalidRequest(
                f"the first context has 0..{TOKENS_MAX} tokens, not {self.first_context}"
            )

    def prompts(self) -> Iterator[TurnPrompt]:
        """Each turn with the context that it finds. Pure; every call starts anew."""
        context = self.first_context
        for turn in self.turns:
            if turn.kept is not None:
                context = min(context, turn.kept)
            yield TurnPrompt(context, turn.append, turn.generate, turn.tool_s)
            context += turn.append + turn.generate

    @property
    def final_tokens(self) -> int:
        """What the context has grown to after the last turn."""
        last = list(self.prompts())[-1]
        return last.tokens + last.generate


@dataclass(frozen=True, slots=True)
class AgentArrival:
    """An agent that begins its trajectory `at_s` seconds after the start."""

    at_s: float
    trajectory: Trajectory

    def __post_init__(self) -> None:
        if not math.isfinite(self.at_s) or self.at_s < 0:
            raise InvalidRequest(f"an agent arrives at 0 s or later, not {self.at_s}")
