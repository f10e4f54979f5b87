"""What `dualpath bench cluster --json` measured, as far as a simulation of the same cluster needs.

Owns the reading and the checks: what the simulator has no counterpart of (faults, one NIC for both
networks, lone loads, rounds without hand-offs or with failed loads) is refused, with what to
measure instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dualpath.bench.testbed.topology import Topology
from dualpath.bench.testbed.workload import Context, Workload, generated
from dualpath.transfer.errors import InvalidRequest

COMPARED = ("direct", "paper", "split")
"""Policies of both. By turns the bench's loads go over all nodes, the scheduler's over the two of
their request; the two are not the same rule."""
FILE_BYTES_MAX = 16 << 20


@dataclass(frozen=True, slots=True)
class PolicyMeasurement:
    """Medians over rounds while there was a backlog, as `bench cluster` reports them."""

    bytes_per_s: float
    ratio_to_direct: float
    snic_balance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchMeasurement:
    """One topology. Rates in bytes a second of a link's direction; `workload` is what every round
    loaded."""

    prefill: int
    decode: int
    gpus: int
    snic_bytes_per_s: float
    cnic_bytes_per_s: float
    loads_in_flight: int
    cpu_bound: bool
    workload: Workload
    policies: Mapping[str, PolicyMeasurement]

    @property
    def label(self) -> str:
        """As `1P2D`."""
        return f"{self.prefill}P{self.decode}D"

    @property
    def engines(self) -> int:
        """Prefill engines: one a GPU."""
        return self.prefill * self.gpus

    @property
    def backlog(self) -> int:
        """Loads in flight at each engine that count as a backlog: `bench.cluster.report`."""
        links = self.prefill + self.decode
        return max(1, min(links, self.loads_in_flight) // self.engines)


def read_measurements(path: str) -> tuple[BenchMeasurement, ...]:
    """Every topology of a file. Raises InvalidRequest that names the file and what is wrong."""
    try:
        if Path(path).stat().st_size > FILE_BYTES_MAX:
            raise InvalidRequest(f"{path} is larger than {FILE_BYTES_MAX >> 20} MiB")
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidRequest(f"{path} is not what `dualpath bench cluster --json` writes")
    whole = _Fields(found, path)
    if found.get("converged"):
        raise InvalidRequest(
            f"{path}: one NIC a node serves both networks, which the simulator does not know; "
            "measure without --converged"
        )
    if found.get("handoff") != "with hand-off traffic":
        raise InvalidRequest(
            f"{path}: no prompt was handed off, which is always simulated; measure without "
            "--no-hand-off and --lone"
        )
    topologies = [found] if "topology" in found else _dicts(found)
    measured = [_topology(each, whole, path) for each in topologies if "topology" in each]
    if not measured:
        raise InvalidRequest(f"{path} has no topology that was measured")
    return tuple(measured)


def _dicts(found: Mapping[str, object]) -> list[dict[str, object]]:
    return [value for value in found.values() if isinstance(value, dict)]


def _topology(found: dict[str, object], whole: _Fields, path: str) -> BenchMeasurement:
    label = str(found["topology"])
    fields = _Fields(found, f"{path}: {label}")
    if "faults" in found:
        raise InvalidRequest(f"{fields.where}: measured with faults; measure without --faults")
    prefill, decode = Topology.parse(label)
    further = found.get("further_snics")
    more = sum(float(rate) for rate in further) if isinstance(further, list) else 0.0
    names = [name for name in COMPARED if isinstance(found.get(name), dict)]
    if "direct" not in names or len(names) < 2:
        raise InvalidRequest(
            f"{fields.where}: measured {', '.join(names) or 'no policy'}; the comparison takes "
            "direct and one of paper and split: --policies direct,paper,split"
        )
    policies = {name: fields.inner(name) for name in names}
    in_flight = round(fields.number("loads_in_flight", 1))
    return BenchMeasurement(
        prefill=prefill,
        decode=decode,
        gpus=round(whole.number("gpus", 1)),
        snic_bytes_per_s=fields.number("snic_bytes_per_s", 1) + more,
        cnic_bytes_per_s=fields.number("cnic_bytes_per_s", 1),
        loads_in_flight=in_flight,
        cpu_bound=bool(found.get("cpu_bound")),
        workload=_workload(policies, whole, in_flight, fields.where),
        policies={
            name: PolicyMeasurement(
                each.number("bytes_per_s", 1),
                each.number("ratio_to_direct"),
                each.number("snic_balance", 1),
            )
            for name, each in policies.items()
        },
    )


def _workload(
    policies: Mapping[str, _Fields], whole: _Fields, in_flight: int, where: str
) -> Workload:
    """The loads of a round, made again from the seed: they end with the last byte of a round."""
    rounds = round(whole.number("rounds", 1))
    block_bytes = round(whole.number("block_bytes", 1))
    counts = set()
    for name, each in policies.items():
        failed, corrupt = each.number("failed_loads"), each.number("corrupt_blocks")
        if failed or corrupt:
            raise InvalidRequest(
                f"{where}: {failed:.0f} loads failed and {corrupt:.0f} blocks were wrong under "
                f"{name}; its rates say nothing of the links"
            )
        counts.add((each.number("verified_blocks", 1) / rounds, each.number("loads", 1) / rounds))
    blocks, loads = counts.pop()
    workload = generated(
        whole.choice("context", {each.value: each for each in Context}),
        sessions=2 * in_flight,
        block_bytes=block_bytes,
        load_bytes_mean=round(whole.number("load_bytes_mean", 1)),
        budget_bytes=round(blocks * block_bytes),
        seed=round(whole.number("seed")),
    )
    if counts or workload.loads != loads or workload.load_bytes != blocks * block_bytes:
        raise InvalidRequest(
            f"{where}: {loads:g} loads of {blocks:g} blocks a round cannot be made again from the "
            "seed; measure with this version of dualpath"
        )
    return workload


class _Fields:
    """A JSON object, and where it stands, for errors."""

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self._values = values
        self.where = where

    def number(self, name: str, low: float = 0.0) -> float:
        value = self._values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < 1e18:
            raise InvalidRequest(
                f"{self.where}: `{name}` is {value!r}, not a number of at least {low:g}; give what "
                "`dualpath bench cluster --json` of this version writes"
            )
        return float(value)

    def choice(self, name: str, known: Mapping[str, Context]) -> Context:
        value = self._values.get(name)
        if not isinstance(value, str) or value not in known:
            raise InvalidRequest(f"{self.where}: `{name}` is {value!r}, none of {', '.join(known)}")
        return known[value]

    def inner(self, name: str) -> _Fields:
        value = self._values[name]
        assert isinstance(value, dict)
        return _Fields(value, f"{self.where} {name}")
