"""Namespace: everything in which two users must agree before they may share a block.

Two namespaces that differ in any field have different ids and never share. The id is the first
16 bytes of SHA-256 over a canonical JSON form, so it is the same in every process and language.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields

from dualpath.kvstore.layout import KVLayout
from dualpath.transfer.errors import InvalidRequest

NAMESPACE_ID_BYTES = 16
FIELD_CHARS_MAX = 512


@dataclass(frozen=True, slots=True)
class Namespace:
    """See DESIGN of identity in docs/architecture.md. All words are compared exactly.

    `model` names weights and revision; `shard` the logical shard (head and layer range, not a
    rank); `hash_algorithm` and `hash_root` the chain (`dualpath.kvstore.chain`); `salt` parts
    users of one tenant.
    """

    model: str
    layout: KVLayout
    lora: str = ""
    shard: str = ""
    engine_format: str = ""
    hash_algorithm: str = "sha256"
    hash_root: str = ""
    tenant: str = ""
    salt: str = ""

    def __post_init__(self) -> None:
        if not self.model:
            raise InvalidRequest("a namespace needs a model id; without one nothing is shared")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and len(value) > FIELD_CHARS_MAX:
                raise InvalidRequest(
                    f"namespace.{field.name} is longer than {FIELD_CHARS_MAX} chars"
                )

    @property
    def id(self) -> bytes:
        """16 bytes that name this namespace everywhere."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(b"dualpath-namespace-1\0" + text.encode()).digest()[
            :NAMESPACE_ID_BYTES
        ]

    def differences(self, other: Namespace) -> tuple[str, ...]:
        """Names of the fields in which `other` differs; the salt is not told apart by value."""
        mine, theirs = asdict(self), asdict(other)
        return tuple(sorted(name for name in mine if mine[name] != theirs[name]))
