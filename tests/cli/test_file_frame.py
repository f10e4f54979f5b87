"""The head of a stored file."""

from __future__ import annotations

import hashlib
import io

import pytest
from dualpath.cli.file_frame import FileFrame
from dualpath.transfer.errors import Corrupt
from hypothesis import given
from hypothesis import strategies as st


@given(st.binary(max_size=100))
def test_a_head_names_length_and_digest(content: bytes) -> None:
    frame = FileFrame.of(io.BytesIO(content))
    assert frame == FileFrame(len(content), hashlib.sha256(content).digest())
    assert FileFrame.from_head(frame.head() + b"rest") == frame
    assert len(frame.head()) == FileFrame.HEAD_BYTES


def test_a_block_without_a_head_is_corrupt() -> None:
    with pytest.raises(Corrupt, match="head"):
        FileFrame.from_head(bytes(FileFrame.HEAD_BYTES))
