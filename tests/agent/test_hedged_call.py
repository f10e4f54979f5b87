"""A call that goes unanswered is made again by another link, and no call is left running."""

from __future__ import annotations

import asyncio

import pytest
from dualpath.agent.hedged_call import hedged
from dualpath.transfer.errors import PeerLost, Unavailable

LONG_S = 1e6


async def answer(text: str) -> str:
    return text


async def never(running: list[str]) -> str:
    running.append("begun")
    try:
        return await asyncio.sleep(LONG_S, "late")
    finally:
        running.append("ended")


async def fails(error: Exception) -> str:
    raise error


def test_a_prompt_answer_needs_no_second_call() -> None:
    running: list[str] = []
    calls = [lambda: answer("first"), lambda: never(running)]
    assert asyncio.run(hedged(calls, LONG_S)) == "first"
    assert not running


def test_the_second_answers_for_a_silent_first_that_is_ended() -> None:
    running: list[str] = []
    calls = [lambda: never(running), lambda: answer("second")]
    assert asyncio.run(hedged(calls, 0.001)) == "second"
    assert running == ["begun", "ended"]


def test_a_refusal_is_an_answer() -> None:
    calls = [lambda: fails(PeerLost("gone")), lambda: answer("second")]
    with pytest.raises(PeerLost):
        asyncio.run(hedged(calls, LONG_S))


def test_the_first_failure_is_told_if_none_does_better() -> None:
    async def late() -> str:
        await asyncio.sleep(0.02)
        raise PeerLost("the first")

    with pytest.raises(PeerLost, match="the first"):
        asyncio.run(hedged([late, lambda: fails(Unavailable("the second"))], 0.001))
