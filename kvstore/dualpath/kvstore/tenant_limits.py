"""What one tenant may hold: a value of the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dualpath.transfer.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """Quotas of a tenant; see `tenant_shares`.

    `tenant` is that of its namespaces. `disk_bytes` and `dram_bytes` are the most that its blocks
    may take on SSD and in DRAM, 0 for no quota. Its blocks leave when nobody has used them for
    `ttl_s` seconds, 0 for the store's `ttl_s`.
    """

    tenant: str
    disk_bytes: int = 0
    dram_bytes: int = 0
    ttl_s: float = 0

    def __post_init__(self) -> None:
        if not self.tenant:
            raise InvalidRequest("tenants: a tenant has no name; give `tenant`")
        for name in ("disk_bytes", "dram_bytes", "ttl_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidRequest(
                    f"tenants: {name} of {self.tenant!r} must not be negative, not "
                    f"{getattr(self, name)}"
                )


def check_tenants(tenants: Sequence[TenantLimits]) -> None:
    """Raises InvalidRequest if one is named twice."""
    names = [each.tenant for each in tenants]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequest(f"tenants: {name!r} is named {names.count(name)} times")
