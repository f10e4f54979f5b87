"""What an engine asks for: a load or a save, as values.

Owns the limits of a request and their check. Does not know whether it came over gRPC or from the
same process.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualpath.agent.holdings import REQUEST_CHARS_MAX
from dualpath.agent.outcome import LoadResult, LoadStarted
from dualpath.agent.places import Places
from dualpath.kvstore.store_api import BATCH_BLOCKS_MAX, HASH_BYTES_MAX, HASH_BYTES_MIN
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.placement import AssignedPolicy, PlacementPolicy, policy_named

LOAD_ID_CHARS_MAX = 128


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """A load of the longest stored prefix of `hashes` into `places` of region `region`.

    `deadline_s` is time left from now. Empty `policy`: the agent's. `paths` restricts the paths
    ("direct", "relay:NAME"); empty: all. `decode_peer` names the request's own decode agent, which
    keeps what it relays for a later hand-off if there is a `request`. `recompute_tokens_per_s` is
    how fast the engine would compute the KV itself (0: it does not say): what would come later than
    that is not loaded. `direct_share` is a scheduler's assignment in place of a policy: the part of
    the bytes that this node's storage links read; those of `decode_peer` read the rest.
    """

    load_id: str
    namespace_id: bytes
    hashes: tuple[bytes, ...]
    region: int
    places: Places
    deadline_s: float
    policy: str = ""
    decode_peer: str = ""
    paths: tuple[str, ...] = ()
    request: str = ""
    recompute_tokens_per_s: float = 0.0
    direct_share: float | None = None

    def __post_init__(self) -> None:
        if len(self.request) > REQUEST_CHARS_MAX:
            raise InvalidRequest(f"a request's name has at most {REQUEST_CHARS_MAX} characters")
        if not 1 <= len(self.load_id) <= LOAD_ID_CHARS_MAX:
            raise InvalidRequest(f"load_id has 1..{LOAD_ID_CHARS_MAX} characters")
        check_hashes(self.hashes)
        if len(self.places.base_bytes) != len(self.hashes):
            raise InvalidRequest(
                f"{len(self.hashes)} hashes, but places of {len(self.places.base_bytes)} blocks"
            )
        check_deadline(self.deadline_s)
        if not 0 <= self.recompute_tokens_per_s < float("inf"):
            raise InvalidRequest(
                "recompute_tokens_per_s is finite and not negative (0: load whatever it takes), "
                f"not {self.recompute_tokens_per_s}"
            )
        self._check_share()

    def _check_share(self) -> None:
        share = self.direct_share
        if share is None:
            return
        AssignedPolicy(share)  # raises what is wrong with it
        if self.policy:
            raise InvalidRequest(
                f"direct_share {share} takes the place of a policy; do not name {self.policy!r}"
            )
        if share < 1 and not self.decode_peer:
            raise InvalidRequest(
                f"direct_share {share} leaves a part to the decode node; name it as decode_peer"
            )

    def placement(self, default: str) -> PlacementPolicy:
        """By which paths it goes; `default` names the policy of those that say nothing. Raises
        InvalidRequest for a name that is none."""
        if self.direct_share is not None:
            return AssignedPolicy(self.direct_share)
        return policy_named(self.policy or default)


@dataclass(frozen=True, slots=True)
class SaveSpec:
    """A save of whole blocks; `parents[i]` is the hash before `hashes[i]` (b"": none)."""

    namespace_id: bytes
    hashes: tuple[bytes, ...]
    parents: tuple[bytes, ...]
    region: int
    places: Places
    durable: bool
    deadline_s: float

    def __post_init__(self) -> None:
        check_hashes(self.hashes)
        if not len(self.hashes) == len(self.parents) == len(self.places.base_bytes):
            raise InvalidRequest(
                f"a save needs one parent and one place a hash: {len(self.hashes)} hashes, "
                f"{len(self.parents)} parents, {len(self.places.base_bytes)} places"
            )
        check_hashes(tuple(parent for parent in self.parents if parent), least=0)
        check_deadline(self.deadline_s)


@dataclass(frozen=True, slots=True)
class LoadUpdate:
    """One step of a load as its engine sees it: the first has `started`, the last `result`.

    Layers [0, layers_ready) of blocks [0, blocks_valid) are verified and in place.
    """

    layers_ready: int = 0
    blocks_valid: int = 0
    started: LoadStarted | None = None
    result: LoadResult | None = None


def check_hashes(hashes: tuple[bytes, ...], *, least: int = 1) -> None:
    """Raise InvalidRequest for a batch or a hash of a size outside of the limits."""
    if not least <= len(hashes) <= BATCH_BLOCKS_MAX:
        raise InvalidRequest(f"a request has 1..{BATCH_BLOCKS_MAX} hashes, not {len(hashes)}")
    for index, value in enumerate(hashes):
        if not HASH_BYTES_MIN <= len(value) <= HASH_BYTES_MAX:
            raise InvalidRequest(
                f"hash {index} has {len(value)} bytes; chain hashes have "
                f"{HASH_BYTES_MIN}..{HASH_BYTES_MAX}"
            )


def check_deadline(deadline_s: float) -> None:
    """Raise InvalidRequest unless it is a positive, finite number of seconds."""
    if not 0 < deadline_s < float("inf"):
        raise InvalidRequest(f"deadline_s must be positive and finite, not {deadline_s}")
