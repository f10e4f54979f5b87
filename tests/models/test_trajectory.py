"""Turns and the prompts that come of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from dualpath.bench.agents.trajectory import AgentArrival, Trajectory, Turn, TurnPrompt
from dualpath.transfer.errors import InvalidRequest
from hypothesis import given
from hypothesis import strategies as st

TURN = st.builds(Turn, st.integers(0, 5000), st.integers(0, 5000))


@given(st.lists(TURN, min_size=1, max_size=30), st.integers(0, 9000))
def test_a_turn_finds_all_that_the_turns_before_it_left(turns: list[Turn], first: int) -> None:
    trajectory = Trajectory(tuple(turns), first)
    prompts = list(trajectory.prompts())
    assert prompts[0].context == first
    for before, after in pairwise(prompts):
        assert after.context == before.tokens + before.generate
    total = first + sum(turn.append + turn.generate for turn in turns)
    assert trajectory.final_tokens == total
    assert list(trajectory.prompts()) == prompts


def test_a_turn_may_keep_less_and_never_more_than_there_is() -> None:
    turns = (Turn(100, 10), Turn(5, 1, kept=64, tool_s=2.0), Turn(7, 1, kept=4096))
    assert list(Trajectory(turns).prompts()) == [
        TurnPrompt(0, 100, 10),
        TurnPrompt(64, 5, 1, 2.0),
        TurnPrompt(70, 7, 1),
    ]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((-1, 0), "not -1 and 0"),
        ((0, 1 << 40), "tokens"),
        ((1, 1, -5), "not -5"),
        ((1, 1, None, -1.0), "not -1.0"),
        ((1, 1, None, float("inf")), "not inf"),
    ],
)
def test_a_turn_that_cannot_be_is_refused_by_its_value(
    arguments: tuple[int, ...], named: str
) -> None:
    with pytest.raises(InvalidRequest, match=named):
        Turn(*arguments)


def test_a_trajectory_needs_a_turn_and_an_arrival_a_time() -> None:
    with pytest.raises(InvalidRequest, match="not 0"):
        Trajectory(())
    with pytest.raises(InvalidRequest, match="not -3"):
        Trajectory((Turn(1, 1),), -3)
    with pytest.raises(InvalidRequest, match="not nan"):
        AgentArrival(float("nan"), Trajectory((Turn(1, 1),)))
