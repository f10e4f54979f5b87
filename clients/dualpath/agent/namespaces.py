"""The namespaces that an agent's engines have opened.

Owns how many are known: the one that was used longest ago is forgotten for one more, as whoever
needs it again is told so and opens it again. Loads and saves that run hold what they need of it.
Belongs to the loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

from dualpath.kvstore.namespace import Namespace

NAMESPACES_MAX = 4096


class Namespaces(Mapping[bytes, Namespace]):
    """See the module docstring. By id; looking one up is using it."""

    def __init__(self, most: int = NAMESPACES_MAX) -> None:
        self._most = most
        self._by_id: OrderedDict[bytes, Namespace] = OrderedDict()

    def __getitem__(self, namespace_id: bytes) -> Namespace:
        namespace = self._by_id[namespace_id]
        self._by_id.move_to_end(namespace_id)
        return namespace

    def __contains__(self, namespace_id: object) -> bool:
        return namespace_id in self._by_id

    def __iter__(self) -> Iterator[bytes]:
        return iter(tuple(self._by_id))

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, namespace: Namespace) -> None:
        """It is used now."""
        self._by_id[namespace.id] = namespace
        self._by_id.move_to_end(namespace.id)
        if len(self._by_id) > self._most:
            self._by_id.popitem(last=False)

    def forget(self, namespace_id: bytes) -> None:
        """Unknown ones are ignored."""
        self._by_id.pop(namespace_id, None)
