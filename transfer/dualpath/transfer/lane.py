"""Traffic classes (paper, section on traffic isolation; DESIGN: lanes)."""

from __future__ import annotations

import enum


class Lane(enum.IntEnum):
    """Lower value goes first. Model execution is the engine's own traffic and never ours."""

    LOAD_PREFILL = 1
    LOAD_DECODE = 2
    SAVE = 3
    BACKGROUND = 4


SAVE_FLOOR = 0.05
"""Share of a link that saves keep however many loads wait."""
