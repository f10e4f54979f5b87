"""What the paper does not say of its engines and cluster, and the simulator has to know.

Each is declared here, before any comparison, with why; `dualpath simulate` can change them, and
their sensitivity is shown with the reproduction. None is fitted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from dualpath.scheduler.forward_batch import PAPER_QUOTA_S
from dualpath.transfer.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDetails:
    """Raises InvalidRequest for values that are none.

    - `fetch_s`: interval of a leader's fetches. The paper says "at intervals".
    - `reads_at_once`: reads that a node runs together; the others wait in its read queue.
    - `quota_s`: attention time of a forward batch (the paper's 300 ms).
    - `alpha_s`, `beta_s`: the paper's 3 s and 5 s.
    - `window_s`: windows of the balance of storage NICs.
    - `lockstep`: engines that exchange experts step together.
    """

    fetch_s: float = 0.1
    reads_at_once: int = 8
    quota_s: float = PAPER_QUOTA_S
    alpha_s: float = 3.0
    beta_s: float = 5.0
    window_s: float = 1.0
    lockstep: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "lockstep" and not (math.isfinite(value) and value > 0):
                raise InvalidRequest(f"{field.name} is {value}; it must be above 0")
