"""Who may do what: tickets, tokens, sessions' owners, addresses beyond loopback."""

from __future__ import annotations

import pytest
from dualpath.kvstore.service.access_rules import AccessRules
from dualpath.kvstore.service.auth import Auth
from dualpath.kvstore.service.config import DaemonConfig
from dualpath.kvstore.service.lease_owners import LeaseOwners
from dualpath.kvstore.service.ticket import TicketMint
from dualpath.transfer.errors import InvalidRequest, LeaseExpired, PermissionDenied
from hypothesis import given
from hypothesis import strategies as st

TOKEN = "0123456789abcdef-token"


def _reason(mint: TicketMint, ticket: bytes, peer: str, now: float) -> str:
    with pytest.raises(PermissionDenied) as caught:
        mint.lease_of(ticket, peer, now=now)
    return caught.value.reason


def test_a_ticket_names_its_lease_to_its_holder_until_it_expires() -> None:
    mint = TicketMint()
    ticket = mint.issue(2**63 + 5, "relay-1", ttl_s=10, now=100.0)
    assert mint.lease_of(ticket, "relay-1", now=109.9) == 2**63 + 5
    assert _reason(mint, ticket, "relay-1", 110.0) == "ticket_expired"
    assert _reason(mint, ticket, "relay-2", 101.0) == "ticket_foreign"


def test_a_ticket_of_another_start_of_the_daemon_is_forged() -> None:
    ticket = TicketMint().issue(1, "relay", ttl_s=10, now=0.0)
    assert _reason(TicketMint(), ticket, "relay", 1.0) == "ticket_forged"


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_ticket_changed_in_any_byte_is_forged(position: int, change: int) -> None:
    mint = TicketMint(b"k" * 32)
    ticket = bytearray(mint.issue(7, "relay", ttl_s=10, now=0.0))
    ticket[position % len(ticket)] ^= change
    assert _reason(mint, bytes(ticket), "relay", 1.0) == "ticket_forged"


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_no_ticket(noise: bytes) -> None:
    assert _reason(TicketMint(b"k" * 32), noise, "relay", 1.0) == "ticket_forged"


@pytest.mark.parametrize(("peer", "ttl_s"), [("", 1.0), ("x" * 129, 1.0), ("p", 0.0), ("p", 601.0)])
def test_a_ticket_for_nobody_or_for_too_long_is_not_issued(peer: str, ttl_s: float) -> None:
    with pytest.raises(InvalidRequest):
        TicketMint().issue(1, peer, ttl_s=ttl_s, now=0.0)


@pytest.mark.parametrize(
    ("tokens", "header", "local", "principal"),
    [
        ((), "", False, "open"),
        ((), "", True, "uid:"),
        ((), "Bearer whatever", False, "open"),
        ((TOKEN,), f"Bearer {TOKEN}", False, "token:"),
        ((TOKEN,), f"Bearer {TOKEN}", True, "token:"),
        (("x" * 20, TOKEN), f"Bearer {TOKEN}", False, "token:"),
        ((TOKEN,), "", True, "uid:"),
        ((TOKEN,), "", False, None),
        ((TOKEN,), f"Basic {TOKEN}", False, None),
        ((TOKEN,), f"Bearer {TOKEN}x", False, None),
        ((TOKEN,), f"Bearer {TOKEN[:-1]}", True, None),
        ((TOKEN,), "Bearer ", False, None),
        ((TOKEN,), "Bearer \xff", False, None),
    ],
)
def test_the_caller_is_admitted_by_token_or_by_the_unix_socket(
    tokens: tuple[str, ...], header: str, local: bool, principal: str | None
) -> None:
    auth = Auth(lambda: AccessRules().with_tokens(tokens))
    if principal is None:
        with pytest.raises(PermissionDenied) as caught:
            auth.admit(header, local_socket=local)
        assert caught.value.reason == "token"
        return
    caller = auth.admit(header, local_socket=local)
    assert caller.principal.startswith(principal)
    assert caller.local_socket is local
    assert TOKEN not in caller.principal


@pytest.mark.parametrize(
    ("listen", "tokens", "insecure", "allowed"),
    [
        ("127.0.0.1:0", (), False, True),
        ("localhost:0", (), False, True),
        ("[::1]:0", (), False, True),
        ("10.1.2.3:0", (), False, False),
        ("storage.example:7070", (), False, False),
        ("10.1.2.3:0", (TOKEN,), False, True),
        ("10.1.2.3:0", (), True, True),
    ],
)
def test_beyond_loopback_a_daemon_needs_tokens_or_an_explicit_insecure(
    listen: str, tokens: tuple[str, ...], insecure: bool, allowed: bool
) -> None:
    if allowed:
        DaemonConfig(data="d", listen=listen, tokens=tokens, insecure=insecure)
        return
    with pytest.raises(InvalidRequest, match="Set one of them") as caught:
        DaemonConfig(data="d", listen=listen, tokens=tokens, insecure=insecure)
    assert caught.value.reason == "insecure"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("data", "", "data is empty"),
        ("listen", "7070", "host:port"),
        ("listen", "127.0.0.1:99999", "99999"),
        ("listen", "", "neither listen nor unix"),
        ("metrics_listen", "x", "metrics_listen"),
        ("unix", "/" + "u" * 100, "longer than"),
        ("tokens", ("short",), "fewer than 16"),
        ("tokens", ("ä" * 20,), "ASCII"),
        ("dram_bytes", 5, "dram_bytes"),
        ("readers", 0, "readers"),
        ("drain_s", -1.0, "drain_s"),
        ("send_limit_bytes_per_s", float("inf"), "send_limit"),
    ],
)
def test_a_configuration_error_names_field_and_value(field: str, value: object, said: str) -> None:
    fields: dict[str, object] = {"data": "d", field: value}
    with pytest.raises(InvalidRequest, match=said):
        DaemonConfig(**fields)  # type: ignore[arg-type]


def test_a_wildcard_data_address_needs_a_host_to_advertise() -> None:
    with pytest.raises(InvalidRequest, match="advertise_host"):
        DaemonConfig(data="d", listen="0.0.0.0:7070", insecure=True)
    config = DaemonConfig(data="d", listen="0.0.0.0:7070", insecure=True, advertise_host="10.0.0.5")
    assert config.dialled("0.0.0.0:4242") == "10.0.0.5:4242"
    assert DaemonConfig(data="d").dialled("127.0.0.1:5") == "127.0.0.1:5"


def test_a_lease_serves_its_owner_only_and_is_pruned_when_over() -> None:
    owners = LeaseOwners()
    owners.put(1, "a", 10.0)
    owners.put(2, "b", 10.0)
    owners.check(1, "a")
    with pytest.raises(PermissionDenied) as caught:
        owners.check(1, "b")
    assert caught.value.reason == "lease_foreign"
    owners.put(1, "a", 20.0)  # renewed
    owners.prune(15.0)
    owners.check(1, "a")
    with pytest.raises(LeaseExpired):
        owners.check(2, "b")
    owners.forget_owner("a")
    with pytest.raises(LeaseExpired):
        owners.check(1, "a")
    assert len(owners) == 0


def test_a_configuration_that_is_printed_shows_no_token() -> None:
    token = "a-token-that-nobody-may-see"
    assert token not in repr(DaemonConfig(data="d", tokens=(token,)))
