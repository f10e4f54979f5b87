"""Whoever connects to the gRPC port and says nothing is hung up on, and takes few descriptors."""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
from typing import Any

import pytest
from dualpath.kvstore.descriptor_limit import DESCRIPTORS_MAX
from dualpath.proto import channel

RAISE = """
import resource, sys
from dualpath.kvstore.descriptor_limit import raise_descriptor_limit
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), hard))
print(raise_descriptor_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize("said", [b"", b"PRI * HTTP/2"], ids=["nothing", "half a greeting"])
def test_a_caller_that_does_not_finish_its_greeting_is_hung_up_on(
    in_lab: Any, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    assert channel.HANDSHAKE_S < 30  # gRPC's own is two minutes
    monkeypatch.setattr(channel, "HANDSHAKE_S", 0.5)

    async def body(lab: Any) -> None:
        running = await lab.daemon()
        host, _, port = running.where["listen"].rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(said)
        # What the server says of itself may come first; then the end.
        await asyncio.wait_for(reader.read(), lab.wait_s)
        writer.close()
        client = lab.client(running)
        await client.namespace()

    in_lab(body)


def test_a_process_asks_for_as_many_descriptors_as_it_may_have() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    child = subprocess.run(
        [sys.executable, "-c", RAISE, "200"], capture_output=True, text=True, check=True
    )
    assert list(map(int, child.stdout.split())) == [most, most, hard]
