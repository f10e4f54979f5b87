"""Layouts, namespaces and keyed content for the store's tests."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

import pytest
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace

Content = Callable[[bytes, int], bytes]


def _content(key: bytes, nbytes: int) -> bytes:
    return random.Random(hashlib.sha256(b"content" + key).digest()).randbytes(nbytes)


@pytest.fixture
def content() -> Content:
    """Bytes that only the key determines, so that a reader can tell whose they are."""
    return _content


@pytest.fixture
def namespace() -> Namespace:
    """Blocks of 300,000 bytes: two chunks, not a multiple of 4 KiB."""
    layout = KVLayout(layers=3, block_tokens=16, layer_bytes=100_000, dtype="bf16")
    return Namespace(model="test-model@1", layout=layout)
