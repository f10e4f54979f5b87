"""A request as the scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass

from dualpath.scheduler.checks import check_count, check_name
from dualpath.transfer.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Request:
    """One request: one turn of an agent.

    `tokens`: length of its prompt, of which the first `hit_tokens` are in storage;
    `new_output_bound`: tokens that its decode may add at most, for which memory is kept as well
    (0, the paper's rule: only the prompt counts). `session`: requests of one session share their
    prefix; "" for none.

    Raises InvalidRequest for counts that are none, and for more hits than tokens.
    """

    id: str
    tokens: int
    hit_tokens: int
    new_output_bound: int = 0
    session: str = ""

    def __post_init__(self) -> None:
        check_name("request", self.id)
        if 0 <= self.hit_tokens <= self.tokens > 0 <= self.new_output_bound:
            return
        check_count(f"hit_tokens of request '{self.id}'", self.hit_tokens)
        check_count(f"new_output_bound of request '{self.id}'", self.new_output_bound)
        raise InvalidRequest(
            f"request '{self.id}' has {self.tokens} tokens, {self.hit_tokens} of them hits; "
            f"give at least 1 token and no more hits than tokens"
        )

    @property
    def memory_tokens(self) -> int:
        """Tokens of KV that its decode engine must have room for."""
        return self.tokens + self.new_output_bound
