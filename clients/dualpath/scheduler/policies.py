"""The policies of one scheduler, and the named combinations of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dualpath.scheduler.aware_prefill_choice import AwarePrefillChoice
from dualpath.scheduler.decode_choice import (
    DecodeChoice,
    RoundRobinDecodeChoice,
    TwoLevelDecodeChoice,
)
from dualpath.scheduler.engine_spec import NodeSpec
from dualpath.scheduler.prefill_choice import (
    PaperPrefillChoice,
    PrefillChoice,
    RoundRobinPrefillChoice,
    check_beta,
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


def _any_node(node: NodeSpec) -> None:
    """Nothing has to be known of it."""


@dataclass(frozen=True, slots=True)
class Policies:
    """One of each. Round-robin ones remember whose turn it is: one scheduler, one object.

    `check` raises InvalidRequest if too little is known of a node to choose its prefill engines.
    """

    prefill: PrefillChoice
    decode: DecodeChoice
    read: ReadChoice
    check: Callable[[NodeSpec], None] = _any_node


def _of(settings: PolicySettings, prefill: PrefillChoice, read: ReadChoice) -> Policies:
    """With the paper's choice of decode engines."""
    check = partial(check_beta, settings)
    return Policies(prefill, TwoLevelDecodeChoice(settings), read, check)


def _paper(settings: PolicySettings) -> Policies:
    return _of(settings, PaperPrefillChoice(settings), ShorterQueueRead())


def _direct(settings: PolicySettings) -> Policies:
    return _of(settings, PaperPrefillChoice(settings), DirectRead())


def _round_robin(settings: PolicySettings) -> Policies:
    return Policies(RoundRobinPrefillChoice(), RoundRobinDecodeChoice(), RoundRobinRead())


def _split(settings: PolicySettings) -> Policies:
    return _of(settings, PaperPrefillChoice(settings), SplitRead())


def _aware(settings: PolicySettings) -> Policies:
    return _of(settings, AwarePrefillChoice(settings), SplitRead())


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
