"""What the simulator has to know of a model: geometry of its KV, its engines, its times."""

from __future__ import annotations

from dataclasses import dataclass

from dualpath.bench.models.calibration import Calibration
from dualpath.bench.models.compute_model import ComputeModel
from dualpath.bench.models.geometry import ModelGeometry
from dualpath.bench.models.roofline import Roofline
from dualpath.bench.simulate.cluster import ClusterSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedModel:
    """`prefill_hbm_tokens`: KV that a prefill engine holds, which bounds whole loads.
    `lockstep_engines`: prefill engines that step together; 1: each for itself."""

    name: str
    layers: int
    kv_bytes_per_token: float
    block_tokens: int
    gpus_per_engine: int
    lockstep_engines: int
    prefill_hbm_tokens: float
    compute: ComputeModel


def modelled(
    geometry: ModelGeometry, calibration: Calibration, cluster: ClusterSpec
) -> SimulatedModel:
    """By the roofline. The experts are spread over as many GPUs as the geometry says, in a cluster
    that has them; a smaller side's GPUs are taken for a part of a larger one."""
    compute = Roofline(geometry, calibration)
    engines = cluster.prefill_nodes * cluster.gpus_per_node // geometry.gpus_per_engine
    lockstep = max(1, geometry.prefill_expert_gpus // geometry.gpus_per_engine)
    return SimulatedModel(
        name=geometry.name,
        layers=geometry.layers,
        kv_bytes_per_token=geometry.kv_bytes_per_token,
        block_tokens=geometry.block_tokens,
        gpus_per_engine=geometry.gpus_per_engine,
        lockstep_engines=min(lockstep, max(1, engines)),
        prefill_hbm_tokens=compute.prefill_hbm_tokens,
        compute=compute,
    )
