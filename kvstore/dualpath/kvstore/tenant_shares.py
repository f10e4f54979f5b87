"""Who may take how much of a tier, and who gives when it is full. Pure.

A tenant with a quota is a *bucket* of its own; all others are bucket 0 together. Two rules:

1. No bucket holds more than its quota: at its quota it makes room among its own blocks.
2. When the tier is full, the bucket gives whose use is largest beside its share, but never one
   that is fuller by less than the taker. A share is the quota, scaled down if the quotas exceed the
   tier; bucket 0's is what they leave. So nobody is pushed below his share by one who is above his.

Bytes are those of slots, reserved blocks included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

REST = 0
"""The bucket of tenants without a quota."""


class TenantShares:
    """See the module docstring. `quotas` are bytes by tenant."""

    def __init__(self, quotas: Mapping[str, int]) -> None:
        self._bucket = {tenant: REST + 1 + at for at, tenant in enumerate(sorted(quotas))}
        self._quota = [0, *(quotas[tenant] for tenant in sorted(quotas))]
        self.used_bytes = [0] * len(self._quota)

    def bucket(self, tenant: str) -> int:
        """The tenant's bucket."""
        return self._bucket.get(tenant, REST)

    def buckets(self) -> Sequence[int]:
        """All of them."""
        return range(len(self._quota))

    def tenants(self) -> Mapping[str, int]:
        """The bucket of each tenant that has a quota."""
        return self._bucket

    def quota_bytes(self, bucket: int) -> int:
        """The most that it may hold; 0 for REST, which has no bound of its own."""
        return self._quota[bucket]

    def over_quota(self, bucket: int, nbytes: int) -> bool:
        """Whether it must give up some of its own before it may take `nbytes` more."""
        return bucket != REST and self.used_bytes[bucket] + nbytes > self._quota[bucket]

    def take(self, bucket: int, nbytes: int) -> None:
        """It holds more."""
        self.used_bytes[bucket] += nbytes

    def give(self, bucket: int, nbytes: int) -> None:
        """It holds less."""
        self.used_bytes[bucket] -= nbytes
        assert self.used_bytes[bucket] >= 0, bucket

    def share_bytes(self, bucket: int, capacity_bytes: int) -> float:
        """What nobody above his own share may take from it."""
        total = sum(self._quota)
        if bucket == REST:
            return max(0, capacity_bytes - total)
        return self._quota[bucket] * min(1.0, capacity_bytes / total)

    def givers(self, taker: int, nbytes: int, capacity_bytes: int) -> list[int]:
        """Buckets that may give when `taker` wants `nbytes` of a full tier, the fullest first;
        the taker is one of them."""
        if len(self._quota) == 1:
            return [REST]
        fullness = {
            bucket: _ratio(
                self.used_bytes[bucket] + (nbytes if bucket == taker else 0),
                self.share_bytes(bucket, capacity_bytes),
            )
            for bucket in self.buckets()
        }
        able = [b for b in self.buckets() if b == taker or fullness[b] > fullness[taker]]
        # Of equals the taker gives himself.
        return sorted(able, key=lambda bucket: (-fullness[bucket], bucket != taker))


def _ratio(used: int, share: float) -> float:
    if not used:
        return 0.0
    return used / share if share > 0 else float("inf")
