"""The systems that are compared, as traits: what each does differently.

The first four are the ablation of arXiv 2602.21548: each adds one thing to the one before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualpath.cli.config_file import nearest
from dualpath.scheduler.decode_choice import RoundRobinDecodeChoice
from dualpath.scheduler.policies import Policies, named_policies
from dualpath.scheduler.prefill_choice import RoundRobinPrefillChoice
from dualpath.scheduler.read_side import DirectRead
from dualpath.scheduler.settings import PolicySettings
from dualpath.transfer.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class System:
    """`layerwise`: a forward batch loads layer by layer while it computes; else a request's KV
    lies whole in GPU memory before it is computed, and goes to the decode node afterwards. `io`:
    False where KV costs nothing at all. `policies`: named combination of the scheduler's; "" for
    turns among engines and the direct path."""

    name: str
    help: str
    layerwise: bool
    io: bool
    policies: str

    def make_policies(self, settings: PolicySettings) -> Policies:
        """New ones: some remember whose turn it is."""
        if self.policies:
            return named_policies(self.policies, settings)
        return Policies(RoundRobinPrefillChoice(), RoundRobinDecodeChoice(), DirectRead())


SYSTEMS = {
    system.name: system
    for system in (
        System("basic", "direct path, whole loads first, no scheduler", False, True, ""),
        System("layerwise", "basic + layer-wise prefill", True, True, ""),
        System(
            "dualpath-unscheduled",
            "layerwise + both paths by turns",
            True,
            True,
            "round-robin",
        ),
        System("dualpath", "both paths under the paper's scheduler", True, True, "paper"),
        System("split", "dualpath, each load split over both paths", True, True, "split"),
        System("oracle", "no KV is loaded, moved or stored", True, False, "paper"),
    )
}


def named_system(name: str) -> System:
    """Raises InvalidRequest for a name that is none."""
    system = SYSTEMS.get(name)
    if system is None:
        raise InvalidRequest(
            f"'{name}' is no system{nearest(name, SYSTEMS)}; give one of {', '.join(SYSTEMS)}"
        )
    return system
