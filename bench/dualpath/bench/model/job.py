"""What the two engine processes of the demo are told, as one JSON value on their command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

PROMPT_SEED = 7
MODEL_SEED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """`folder` holds checkpoint and reference; `agent` is the address of the node's agent."""

    folder: str
    agent: str
    dtype: str
    prefix_tokens: int
    new_tokens: int
    decoded_tokens: int
    deadline_s: float

    @property
    def checkpoint(self) -> Path:
        """Folder of the model."""
        return Path(self.folder) / "checkpoint"

    @property
    def reference(self) -> Path:
        """File with the first process's logits."""
        return Path(self.folder) / "reference.pt"

    @property
    def model_id(self) -> str:
        """The namespace's model."""
        return f"random-llama-{MODEL_SEED}"

    def to_text(self) -> str:
        """One argument."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_arguments() -> Job:
        """Of this process."""
        return Job(**json.loads(sys.argv[1]))


def report(result: Mapping[str, object]) -> None:
    """Tell the parent, as the last line of stdout."""
    print(json.dumps(dict(result)), flush=True)
