"""Agents that attach: what they do not read is bounded, and ends with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from dualpath.agent import attachments as module
from dualpath.agent.attachments import Attachment, Attachments
from dualpath.agent.holdings import Holdings
from dualpath.agent.relay_job import Requester
from dualpath.agent.slice_table import GRANT_CHUNKS_MAX
from dualpath.proto import first_message
from dualpath.proto.v1 import agent_pb2, common_pb2
from dualpath.transfer.errors import DeadlineExceeded, InvalidRequest, Overloaded

WAIT_S = 20.0
DAEMON = "127.0.0.1:7070"


class _Relay:
    """Refuses every grant."""

    def __init__(self) -> None:
        self.closed: list[Requester] = []
        self.holdings = Holdings(None, 1.0)

    def open(self, name: str, peer: str, rail: int, sharer: str) -> Requester:
        return Requester(name, peer, rail, sharer)

    def close(self, requester: Requester) -> None:
        self.closed.append(requester)

    def submit(self, *arguments: Any) -> None:
        raise Overloaded("too much waits", retry_after_s=0.1)


def _attached(loop: asyncio.AbstractEventLoop) -> tuple[Attachments, Attachment, _Relay]:
    transport = SimpleNamespace(name="tcp", address="127.0.0.1:1", invite=lambda peer: b"i" * 16)
    network = SimpleNamespace(transport=transport, watch=lambda *_: None, forget=lambda _: None)
    relay = _Relay()
    link = SimpleNamespace(address=DAEMON, peer_id="us", up=True)
    rails = SimpleNamespace(links=(link,), serving=lambda _: link)
    made = Attachments(
        "server", cast(Any, network), cast(Any, relay), cast(Any, {DAEMON: rails}), loop
    )
    made.attach(common_pb2.AttachRequest(name="peer", transports=["tcp"]), "peer")
    (attachment,) = made._by_session.values()
    return made, attachment, relay


def _grant(grant_id: int, chunks: int) -> agent_pb2.RelayRequest:
    grant = common_pb2.ChunkGrant(grant_id=grant_id, tag=range(chunks))
    return agent_pb2.RelayRequest(daemon=DAEMON, grant=grant)


def _run(body: Callable[[], Any]) -> None:
    async def main() -> None:
        await asyncio.wait_for(body(), WAIT_S)

    asyncio.run(main())


@pytest.mark.parametrize("chunks", [0, GRANT_CHUNKS_MAX])
def test_an_agent_that_does_not_read_its_refusals_is_ended(chunks: int) -> None:
    async def body() -> None:
        made, attachment, relay = _attached(asyncio.get_running_loop())
        sent = 0
        while not attachment.closed:
            sent += 1
            assert sent <= module.UNREAD_MAX + 1
            assert attachment.unread_tags <= module.UNREAD_TAGS_MAX
            made._handle(attachment, _grant(sent, chunks))
        assert sent * max(1, chunks) > min(module.UNREAD_MAX, module.UNREAD_TAGS_MAX)
        assert attachment.closed == "it does not read its reports"
        assert relay.closed == [attachment.requester]
        made._handle(attachment, _grant(sent + 1, chunks))
        assert not attachment.progress
        assert len(made) == 0

    _run(body)


def test_refusals_that_are_read_come_in_messages_that_grpc_takes() -> None:
    async def body() -> None:
        made, attachment, _ = _attached(asyncio.get_running_loop())
        for grant_id in range(1, 41):
            made._handle(attachment, _grant(grant_id, GRANT_CHUNKS_MAX))
        responses = made._responses(attachment)
        told = [progress.grant_id for each in responses for progress in each.progress]
        assert told == list(range(1, 41))
        assert max(each.ByteSize() for each in responses) < 1 << 20
        assert attachment.unread_tags == 0
        with pytest.raises(InvalidRequest, match=f"{GRANT_CHUNKS_MAX + 1} chunks"):
            made._handle(attachment, _grant(99, GRANT_CHUNKS_MAX + 1))
        made.close()

    _run(body)


def test_a_stream_without_a_first_message_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_message, "FIRST_MESSAGE_S_MAX", 0.01)

    async def silent() -> AsyncIterator[agent_pb2.RelayRequest]:
        await asyncio.Event().wait()
        yield agent_pb2.RelayRequest()

    async def body() -> None:
        made, *_ = _attached(asyncio.get_running_loop())
        with pytest.raises(DeadlineExceeded, match="no first message"):
            await anext(made.serve(silent()))
        made.close()

    _run(body)


def test_who_only_attaches_leaves_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ATTACHMENTS_MAX", 16)
    request = common_pb2.AttachRequest(name="peer", transports=["tcp"])

    async def body() -> None:
        made, first, _ = _attached(asyncio.get_running_loop())
        made._close(first, "over")
        for _ in range(8):
            made.attach(request, "bad")
        with pytest.raises(Overloaded, match="bad has 8") as refused:
            made.attach(request, "bad")
        assert refused.value.reason == "quota"
        for number in range(4):
            made.attach(request, f"good-{number}")
        # Those that opened no stream make way for others of the same sharer, but not at once.
        bad = [each for each in made._by_session.values() if each.sharer == "bad"]
        for each in bad[1:]:
            each.streaming = True
        monkeypatch.setattr(module, "UNPROVEN_S", 0.0)
        made.attach(request, "bad")
        assert bad[0].closed
        assert not any(each.closed for each in bad[1:])
        assert len(made) == 12
        made.close()
        assert len(made._shares) == 0

    _run(body)
