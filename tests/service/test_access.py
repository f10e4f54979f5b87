"""Rights: rules of a file, who they are about, and that a daemon asks them everywhere."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.service.access import Access
from dualpath.kvstore.service.access_rules import AccessRules, Limits, parse_access
from dualpath.kvstore.service.config import DaemonConfig
from dualpath.kvstore.service.principal import (
    ALL_RIGHTS,
    PRINCIPAL_BYTES_MAX,
    Rights,
    principal_of_certificate,
    principal_of_socket,
)
from dualpath.proto.status import error_of
from dualpath.proto.v1 import store_pb2
from dualpath.transfer.errors import InvalidRequest, PermissionDenied
from hypothesis import given
from hypothesis import strategies as st

LAYOUT = KVLayout(layers=1, block_tokens=4, layer_bytes=4096, dtype="u8")
TOKENS = {name: f"{name}-token-0123456789" for name in ("ops", "red", "blue")}
FILE = """
[[token]]
name = "ops"
token = "ops-token-0123456789"
[[token]]
name = "red"
sha256 = "{red}"
[[token]]
name = "blue"
token = "blue-token-0123456789"

[[rule]]
principal = "token:ops"
rights = ["read", "write", "admin"]
[[rule]]
principal = ["token:red", "cert:red-*"]
rights = ["read", "write"]
tenant = "red"
[[rule]]
principal = "token:blue"
rights = ["read"]
tenant = "red"
model = "shared/*"
[[rule]]
principal = "token:blue"
rights = ["write", "admin"]
namespace = "{blue}"

[[limit]]
principal = "token:blue"
calls = 3
"""


def _space(model: str, tenant: str) -> Namespace:
    return Namespace(model=model, layout=LAYOUT, tenant=tenant)


BLUE = _space("m", "blue")


def _text() -> str:
    red = hashlib.sha256(TOKENS["red"].encode()).hexdigest()
    return FILE.replace("{red}", red).replace("{blue}", BLUE.id.hex())


@pytest.mark.parametrize(
    ("principal", "namespace", "rights"),
    [
        ("token:ops", _space("x", "anybody"), ALL_RIGHTS),
        ("token:red", _space("x", "red"), Rights.READ | Rights.WRITE),
        ("token:red", _space("x", "blue"), Rights.NONE),
        ("cert:red-7", _space("x", "red"), Rights.READ | Rights.WRITE),
        ("cert:blue-7", _space("x", "red"), Rights.NONE),
        ("token:blue", _space("shared/m", "red"), Rights.READ),
        ("token:blue", _space("own/m", "red"), Rights.NONE),
        ("token:blue", BLUE, Rights.WRITE | Rights.ADMIN),
        ("open", _space("x", "red"), Rights.NONE),
        ("uid:0", BLUE, Rights.NONE),
    ],
)
def test_a_principal_has_what_the_rules_that_match_it_add_up_to(
    principal: str, namespace: Namespace, rights: Rights
) -> None:
    assert parse_access(_text(), "f").rights(principal, namespace) == rights


def test_rights_everywhere_come_only_from_rules_without_a_namespace() -> None:
    rules = parse_access(_text(), "f")
    assert rules.rights_everywhere("token:ops") == ALL_RIGHTS
    assert rules.rights_everywhere("token:blue") == Rights.NONE
    assert AccessRules().rights_everywhere("open") == ALL_RIGHTS


@given(principal=st.text(max_size=40), model=st.text(min_size=1, max_size=40))
def test_without_rules_everybody_may_do_everything(principal: str, model: str) -> None:
    assert AccessRules().rights(principal, _space(model, "t")) == ALL_RIGHTS


@given(st.text(alphabet="abc*?[]!-.", max_size=8), st.text(alphabet="abc", max_size=6))
def test_more_rules_never_take_rights_away(pattern: str, principal: str) -> None:
    less = parse_access('[[rule]]\nprincipal = "a*"\nrights = ["read"]\n', "f")
    text = f'[[rule]]\nprincipal = "a*"\nrights = ["read"]\n[[rule]]\nprincipal = "x{pattern}"\n'
    more = parse_access(text + 'rights = ["write"]\n', "f")
    space = _space("m", "t")
    assert less.rights(principal, space) in more.rights(principal, space)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("rule = 3", "rule"),
        ("[[rules]]\n", "rules"),
        ("[[rule]]\nrights = ['read']\n", "principal"),
        ("[[rule]]\nprincipal = ''\nrights = ['read']\n", "principal"),
        ("[[rule]]\nprincipal = 'p'\n", "rights"),
        ("[[rule]]\nprincipal = 'p'\nrights = ['execute']\n", "execute"),
        ("[[rule]]\nprincipal = 'p'\nrights = ['read']\nmodels = 'm'\n", "models"),
        ("[[token]]\nname = 'a'\n", "either token or sha256"),
        ("[[token]]\nname = 'a'\ntoken = 'short'\n", "fewer than 16"),
        ("[[token]]\nname = 'a'\nsha256 = 'zz'\n", "64 hexadecimal"),
        ("[[token]]\ntoken = 'secret-of-enough-chars'\n", "name"),
        ("[[limit]]\nprincipal = 'p'\ncalls = -1\n", "calls"),
        ("[[limit]]\nprincipal = 'p'\ncalls = true\n", "calls"),
        ("[[limit]]\nprincipal = 'p'\nspeed = 1\n", "speed"),
        ("not toml", "TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place_and_without_its_secrets(
    text: str, word: str
) -> None:
    with pytest.raises(InvalidRequest, match=word) as caught:
        parse_access(text, "access.toml")
    assert "access.toml" in str(caught.value)
    assert "secret-of-enough-chars" not in str(caught.value)


def test_two_tokens_of_the_same_value_are_refused() -> None:
    entry = "[[token]]\nname = '{}'\ntoken = 'the-same-token-twice'\n"
    with pytest.raises(InvalidRequest, match="token 1 is the same") as caught:
        parse_access(entry.format("a") + entry.format("b"), "f")
    assert "twice" not in str(caught.value)


def test_secrets_stand_in_no_representation() -> None:
    rules = parse_access(_text(), "f").with_tokens(["another-secret-token"])
    for token in (*TOKENS.values(), "another-secret-token"):
        assert token not in repr(rules)
        assert hashlib.sha256(token.encode()).hexdigest() not in repr(rules)
    config = DaemonConfig(data="d", tokens=(TOKENS["red"],))
    assert TOKENS["red"] not in repr(config)


def test_limits_are_the_defaults_unless_an_entry_names_the_principal() -> None:
    rules = parse_access(_text(), "f")
    defaults = Limits(calls=10, leases=20)
    assert rules.limits_of("token:red", defaults) == defaults
    assert rules.limits_of("token:blue", defaults) == Limits(calls=3, leases=20)


def test_decisions_are_made_anew_when_the_rules_change() -> None:
    spaces = {BLUE.id: BLUE}
    access = Access(parse_access(_text(), "f"), spaces.__getitem__)
    assert access.may("token:blue", BLUE.id, Rights.WRITE)
    assert not access.may("token:red", BLUE.id, Rights.WRITE)
    red = f'[[token]]\nname = "red"\ntoken = "{TOKENS["red"]}"\n'
    red += '[[rule]]\nprincipal = "token:red"\nrights = ["write"]'
    access.replace(parse_access(red, "f"))
    assert not access.may("token:blue", BLUE.id, Rights.WRITE)
    assert access.may("token:red", BLUE.id, Rights.WRITE)
    with pytest.raises(PermissionDenied, match="no right to admin") as caught:
        access.require("token:red", BLUE.id, Rights.ADMIN)
    assert caught.value.reason == "rights"


@given(st.text(max_size=300))
def test_a_certificates_name_makes_a_principal_that_a_record_can_hold(name: str) -> None:
    principal = principal_of_certificate(name)
    assert principal.startswith("cert:")
    assert principal.isprintable()
    assert len(principal.encode()) <= PRINCIPAL_BYTES_MAX


def test_long_names_of_certificates_stay_different() -> None:
    assert principal_of_certificate("x" * 200) != principal_of_certificate("x" * 199)


def test_a_unix_socket_tells_its_peers_user() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        assert principal_of_socket(ours) == f"uid:{os.geteuid()}"


async def _denied(call: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    error = error_of(caught.value)
    assert isinstance(error, PermissionDenied), error
    return error.reason


def test_a_daemon_asks_for_the_right_of_every_call(in_lab: Any, tmp_path: Path) -> None:
    file = tmp_path / "access.toml"
    file.write_text(_text())

    async def body(lab: Any) -> None:
        running = await lab.daemon(access_file=str(file))
        ops, red, blue = (lab.client(running, TOKENS[name]) for name in ("ops", "red", "blue"))
        shared = await ops.namespace(model="shared/m", tenant="red")
        assert await red.namespace(model="shared/m", tenant="red") == shared
        assert await blue.namespace(model="shared/m", tenant="red") == shared
        assert await _denied(blue.namespace(model="own/m", tenant="red")) == "rights"
        await red.attach()
        hashes = lab.chain(3)
        await red.save(shared, hashes)
        assert (await blue.lookup(shared, hashes)).blocks == 3
        await blue.attach()
        assert await _denied(blue.reserve(shared, lab.chain(1, "new"))) == "rights"
        frame = store_pb2.WriteFrame(namespace_id=shared, hash=lab.chain(1, "new")[0])
        writing = blue.stub.Write(iter([frame]), timeout=20, metadata=blue.metadata)
        assert await _denied(writing) == "rights"
        own = await ops.namespace(model="own/m", tenant="red")
        assert await _denied(blue.lookup(own, hashes)) == "rights"
        reading = blue.stub.Read(
            store_pb2.ReadRequest(namespace_id=own, hash=hashes), metadata=blue.metadata
        )
        assert await _denied(reading.read()) == "rights"
        for client in (red, blue):
            request = store_pb2.InvalidateRequest(namespace_id=shared)
            assert await _denied(client.call("Invalidate", request)) == "rights"
            everywhere = store_pb2.InvalidateRequest(writer="token:red")
            assert await _denied(client.call("Invalidate", everywhere)) == "rights"
            drain = client.stub.Drain(
                store_pb2.DrainRequest(deadline_ms=1), metadata=client.metadata
            )
            assert await _denied(drain.read()) == "rights"
            assert not (await client.stats()).principal
        assert {"token:ops", "token:red", "token:blue"} <= {
            usage.name for usage in (await ops.stats()).principal
        }

    in_lab(body)


def test_blocks_record_the_principal_that_wrote_them(in_lab: Any, tmp_path: Path) -> None:
    file = tmp_path / "access.toml"
    file.write_text(_text())

    async def body(lab: Any) -> None:
        running = await lab.daemon(access_file=str(file))
        red = await lab.client(running, TOKENS["red"]).attach()
        space = await red.namespace(tenant="red")
        await red.save(space, lab.chain(2))
        ops = lab.client(running, TOKENS["ops"])
        for writer, blocks in (("token:blue", 0), ("token:red", 2)):
            request = store_pb2.InvalidateRequest(writer=writer)
            assert (await ops.call("Invalidate", request)).blocks == blocks

    in_lab(body)


def test_a_changed_file_counts_from_the_next_call_and_a_revoked_token_loses_its_session(
    in_lab: Any, tmp_path: Path
) -> None:
    file = tmp_path / "access.toml"
    file.write_text(_text())

    async def body(lab: Any) -> None:
        running = await lab.daemon(access_file=str(file))
        blue = await lab.client(running, TOKENS["blue"]).attach()
        red = await lab.client(running, TOKENS["red"]).attach()
        space = await red.namespace(tenant="red")
        without = _text().replace('name = "blue"', 'name = "violet"')
        without = without.replace("blue-token-0123456789", "violet-token-9876543210")
        file.write_text(without.replace('tenant = "red"\n[[rule]]', 'tenant = "redder"\n[[rule]]'))

        async def revoked() -> bool:
            try:
                await blue.stats()
            except grpc.RpcError as error:
                return error_of(error).reason == "token"
            return False

        await lab.until(revoked, "the old token is refused")
        assert await _denied(red.lookup(space, lab.chain(1))) == "rights"

        async def dropped() -> bool:
            return bool((await red.stats()).attachments == 1)

        await lab.until(dropped, "the session of the revoked token is ended")
        # A file that cannot be used changes nothing, and is shown.
        file.write_text("[[rule]]\n")

        async def shown() -> bool:
            return "access_file" in (await red.stats()).troubles

        await lab.until(shown, "the trouble is shown")
        assert await _denied(red.lookup(space, lab.chain(1))) == "rights"

    in_lab(body)


def test_a_file_without_tokens_does_not_guard_an_address_beyond_loopback(
    in_lab: Any, tmp_path: Path
) -> None:
    file = tmp_path / "access.toml"
    file.write_text('[[rule]]\nprincipal = "open"\nrights = ["read"]\n')

    async def body(lab: Any) -> None:
        with pytest.raises(InvalidRequest, match="reachable from other machines"):
            await lab.daemon(access_file=str(file), listen="0.0.0.0:0", advertise_host="127.0.0.1")

    in_lab(body)


@pytest.mark.parametrize("namespace", ["zz", "00" * 15, "AB" * 16, "00" * 17])
def test_a_rule_for_what_is_no_namespace_id_is_refused(namespace: str) -> None:
    text = _text().replace(BLUE.id.hex(), namespace)
    with pytest.raises(InvalidRequest, match=f"rule 3: namespace '{namespace}' is no namespace id"):
        parse_access(text, "f")


def test_a_rule_for_any_namespace_may_say_so() -> None:
    rules = parse_access(_text().replace(BLUE.id.hex(), "*"), "f")
    assert rules.rights_everywhere("token:blue") == Rights.WRITE | Rights.ADMIN


def test_an_access_file_that_is_not_there_is_a_mistake_in_the_settings(
    in_lab: Any, tmp_path: Path
) -> None:
    async def body(lab: Any) -> None:
        with pytest.raises(InvalidRequest, match=r"access_file: cannot read .*gone\.toml: No such"):
            await lab.daemon(access_file=str(tmp_path / "gone.toml"))

    in_lab(body)
