"""What a plan is asked for, checked: numbers that cannot be are refused, odd ones are told of."""

from __future__ import annotations

from dataclasses import dataclass, field

from dualpath.bench.plan.bottleneck_range import NodeRates
from dualpath.bench.slo import Slo
from dualpath.cli.sizes import format_rate
from dualpath.transfer.errors import InvalidRequest

GPUS_MAX = 100_000
NODES_MIN = 2
_NIC_LOW, _NIC_HIGH = 1e9 / 8, 1.6e12 / 8
_NODE_GPUS_HIGH = 16
_DRAM_LOW, _DRAM_HIGH = 20e9, 3e12


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """A cluster of `gpus` in nodes of one kind. Raises InvalidRequest with the remedy."""

    gpus: int
    rates: NodeRates
    slo: Slo = field(default_factory=Slo)

    def __post_init__(self) -> None:
        a_node = self.rates.gpus
        if not 1 <= self.gpus <= GPUS_MAX:
            raise InvalidRequest(f"--gpus {self.gpus}: a plan is for 1..{GPUS_MAX} GPUs")
        if self.gpus % a_node:
            low = self.gpus // a_node * a_node
            near = f"{low} or {low + a_node}" if low else f"{a_node}"
            raise InvalidRequest(
                f"--gpus {self.gpus} is not a multiple of the {a_node} of a node; give {near}, or "
                "--gpus-per-node"
            )
        if self.nodes < NODES_MIN:
            raise InvalidRequest(
                f"--gpus {self.gpus} is {self.nodes} node of {a_node}; prefill and decode need one "
                f"each: give at least {NODES_MIN * a_node}"
            )

    @property
    def nodes(self) -> int:
        """Of all."""
        return self.gpus // self.rates.gpus

    def warnings(self) -> tuple[str, ...]:
        """What is implausible of the numbers, each with the remedy."""
        rates, found = self.rates, []
        for name, value in (
            ("snic", rates.snic_bytes_per_s),
            ("cnic", rates.cnic_bytes_per_s),
        ):
            if not _NIC_LOW <= value <= _NIC_HIGH:
                found.append(
                    f"--{name} is {format_rate(value)} ({value * 8 / 1e9:.3g} Gb/s), which no one "
                    "NIC is; mind bits (400Gb) and bytes (50GB/s)"
                )
        if rates.cnic_bytes_per_s < rates.snic_bytes_per_s:
            found.append(
                f"the CNIC of a GPU ({format_rate(rates.cnic_bytes_per_s)}) is slower than the "
                f"SNIC of a node ({format_rate(rates.snic_bytes_per_s)}): a load into one GPU is "
                "bound by the CNIC whatever the paths; are the two swapped, or is --snic the sum "
                "of several?"
            )
        if rates.gpus > _NODE_GPUS_HIGH:
            found.append(
                f"--gpus-per-node is {rates.gpus}; servers have up to {_NODE_GPUS_HIGH}, each of "
                "which shares one SNIC here"
            )
        if not _DRAM_LOW <= rates.dram_bytes_per_s <= _DRAM_HIGH:
            found.append(
                f"--dram is {format_rate(rates.dram_bytes_per_s)} a node; servers have some "
                "hundred GB/s"
            )
        least = 3 * rates.snic_bytes_per_s
        if rates.dram_bytes_per_s < least:
            found.append(
                f"DRAM of {format_rate(rates.dram_bytes_per_s)} cannot carry a relay at the SNIC's "
                f"rate, which crosses it three times; give it {format_rate(least)} or more"
            )
        return tuple(found)
