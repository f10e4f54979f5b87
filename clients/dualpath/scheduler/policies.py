"""The policies of one scheduler, and the named combinations of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dualpath.scheduler.aware_prefill_choice import AwarePrefillChoice
from dualpath.scheduler.decode_choice import (
    DecodeChoice,
    RoundRobinDecodeChoice,
    TwoLevelDecodeChoice,
)
from dualpath.scheduler.prefill_choice import (
    PaperPrefillChoice,
    PrefillChoice,
    RoundRobinPrefillChoice,
)
from dualpath.scheduler.read_side import (
    DirectRead,
    ReadChoice,
    RoundRobinRead,
    ShorterQueueRead,
    SplitRead,
)
from dualpath.scheduler.settings import PolicySettings
from dualpath.transfer.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Policies:
    """One of each. Round-robin ones remember whose turn it is: one scheduler, one object."""

    prefill: PrefillChoice
    decode: DecodeChoice
    read: ReadChoice


def _paper(settings: PolicySettings) -> Policies:
    return Policies(
        PaperPrefillChoice(settings), TwoLevelDecodeChoice(settings), ShorterQueueRead()
    )


def _direct(settings: PolicySettings) -> Policies:
    return Policies(PaperPrefillChoice(settings), TwoLevelDecodeChoice(settings), DirectRead())


def _round_robin(settings: PolicySettings) -> Policies:
    return Policies(RoundRobinPrefillChoice(), RoundRobinDecodeChoice(), RoundRobinRead())


def _split(settings: PolicySettings) -> Policies:
    return Policies(PaperPrefillChoice(settings), TwoLevelDecodeChoice(settings), SplitRead())


def _aware(settings: PolicySettings) -> Policies:
    return Policies(AwarePrefillChoice(settings), TwoLevelDecodeChoice(settings), SplitRead())


POLICIES: dict[str, Callable[[PolicySettings], Policies]] = {
    "paper": _paper,
    "direct": _direct,
    "round-robin": _round_robin,
    "split": _split,
    "aware": _aware,
}
"""`paper`: its three rules; `direct`: its choice of engines, the direct path only; `round-robin`:
turns everywhere, no scheduler; `split`: the paper's choice of engines, shares of both sides;
`aware`: as `split`, but prefill engines by the time until they could begin and by what their node
has kept."""


def named_policies(name: str, settings: PolicySettings) -> Policies:
    """Raises InvalidRequest for a name that is none."""
    make = POLICIES.get(name)
    if make is None:
        raise InvalidRequest(f"'{name}' is no policy; give one of {', '.join(POLICIES)}")
    return make(settings)
