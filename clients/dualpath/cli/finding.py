"""What `doctor` says about one thing of this machine: a value."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Status(enum.Enum):
    """Whether it is there."""

    OK = "ok"
    ABSENT = "absent"
    PARTIAL = "partial"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report. `cost` says what its absence costs, `remedy` how to get it; both
    are empty where nothing is missing. `required`: without it nothing runs."""

    name: str
    status: Status
    detail: str
    cost: str = ""
    remedy: str = ""
    required: bool = False

    @property
    def fatal(self) -> bool:
        """Required and not there."""
        return self.required and self.status is Status.ABSENT
