"""What is told about an engine and about its node when they register.

Values only. A group is all prefill or all decode engines, and a node lies in one group
(arXiv 2602.21548, "Scheduler"); `EngineTable` keeps both true.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from dualpath.scheduler.checks import check_count, check_name, check_positive


class Role(enum.Enum):
    """What an engine does."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One engine. `hbm_tokens`: tokens of KV that its memory holds, 0 for a prefill engine whose
    memory bounds nothing here.

    Raises InvalidRequest for an empty name, a negative count, or a decode engine without memory.
    """

    name: str
    role: Role
    group: str
    node: str
    hbm_tokens: int

    def __post_init__(self) -> None:
        for what, value in (("engine", self.name), ("group", self.group), ("node", self.node)):
            check_name(what, value)
        check_count(f"hbm_tokens of engine '{self.name}'", self.hbm_tokens)
        if self.role is Role.DECODE:
            check_positive(f"hbm_tokens of decode engine '{self.name}'", self.hbm_tokens)


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One node, if more is known of it than its name.

    - `read_tokens_per_s`: what its storage links read; only the ratio between nodes counts.
    - `compute_tokens_per_s`: tokens of prompts, hits included, that one of its prefill engines
      works off a second, as profiled; 0: not known. Of it comes beta, where that is not set.
    - `staging_tokens`: tokens of KV for which its host memory has buffers; 0: not bounded here.
      A request is admitted to a node only if its tokens fit beside those of others there: the whole
      prompt at its decode engine, the hits at its prefill engine, until it has been prefilled; once
      both engines are known, of the hits only what the prefill node reads.

    Raises InvalidRequest for rates and counts that are none.
    """

    name: str
    read_tokens_per_s: float = 1.0
    staging_tokens: int = 0
    compute_tokens_per_s: float = 0.0

    def __post_init__(self) -> None:
        check_name("node", self.name)
        check_positive(f"read_tokens_per_s of node '{self.name}'", self.read_tokens_per_s)
        check_count(f"staging_tokens of node '{self.name}'", self.staging_tokens)
        check_count(f"compute_tokens_per_s of node '{self.name}'", self.compute_tokens_per_s)
