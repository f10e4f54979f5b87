"""Which transport the compute network of an agent uses: tcp, or rdma where it was asked for."""

from __future__ import annotations

from dualpath.agent.config import AgentConfig
from dualpath.agent.network import MakeTransport
from dualpath.transfer.rails import FIRST_RAIL, Rail
from dualpath.transfer.rdma.config import RdmaConfig
from dualpath.transfer.rdma.library import open_verbs
from dualpath.transfer.rdma.rdma_transport import RdmaTransport
from dualpath.transfer.tcp_transport import TcpConfig, TcpTransport
from dualpath.transfer.transport import OnPeerLost, Transport


def compute_transport(settings: AgentConfig) -> MakeTransport:
    """What makes it; that raises Unavailable (`no_rdma`), saying what is missing."""

    def tcp(name: str, on_peer_lost: OnPeerLost) -> Transport:
        return TcpTransport(
            name, on_peer_lost, tcp_config(settings, settings.compute_limit_bytes_per_s)
        )

    def rdma(name: str, on_peer_lost: OnPeerLost) -> Transport:
        config = RdmaConfig(
            device=settings.rdma_device,
            gid_index=settings.rdma_gid_index,
            service_levels=settings.service_levels,
            set_up=tcp_config(settings, 0.0),
        )
        return RdmaTransport(name, on_peer_lost, open_verbs(settings.rdma_library), config)

    return rdma if settings.compute_transport == "rdma" else tcp


def tcp_config(
    settings: AgentConfig, limit_bytes_per_s: float, rail: Rail = FIRST_RAIL
) -> TcpConfig:
    """Of a network whose bytes in each direction are limited so, by one of its links."""
    return TcpConfig(
        receive_bytes_per_s=limit_bytes_per_s,
        send_bytes_per_s=limit_bytes_per_s,
        congestion=settings.tcp_congestion,
        marks=settings.lane_marks,
        local_host=rail.host,
        local_device=rail.device,
        tls=settings.data_tls_files,
    )
