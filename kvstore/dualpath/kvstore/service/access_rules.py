"""The access file: named tokens, which principal has which rights where, and limits.

Owns the format (TOML), its checks and the pure decisions. Rules only add: a principal has the
union of what all rules that match it give; without any rule everybody who was admitted may do
everything. Tokens are kept as digests only. Reads no file.

    [[token]]
    name = "prefill"                  # the principal is token:prefill
    token = "..."                     # or: sha256 = "its digest in hex"

    [[rule]]
    principal = ["token:prefill", "cert:prefill-*"]
    rights = ["read", "write"]
    tenant = "team-a"                 # patterns of * and ?; what is left out matches all
    model = "org/model@*"
    namespace = "00112233..."         # a namespace id in hex

    [[limit]]
    principal = "token:batch-*"
    calls = 64
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from dualpath.kvstore.namespace import NAMESPACE_ID_BYTES, Namespace
from dualpath.kvstore.service.principal import (
    ALL_RIGHTS,
    PRINCIPAL_BYTES_MAX,
    Rights,
    principal_of_digest,
    principal_of_token,
)
from dualpath.transfer.errors import InvalidRequest

TOKEN_CHARS_MIN = 16
ENTRIES_MAX = 4096
"""Most tokens, rules and limits of a file, each."""
_ANY = "*"
_SHA256_CHARS = 64
_NAMESPACE_ID = re.compile(f"[0-9a-f]{{{2 * NAMESPACE_ID_BYTES}}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one principal may hold at once; 0: no limit of its own.

    `calls` outstanding, `lookups_per_s` look-ups a second, `leases` and `reservations` live ones,
    `reserved_bytes` slots of its reservations, `queue_bytes` granted and not landed, `attachments`
    joined receivers, `streams` Read, Write and Events streams, `leased_bytes` blocks that its
    leases keep, each counted once.
    """

    calls: int = 0
    lookups_per_s: int = 0
    leases: int = 0
    reservations: int = 0
    reserved_bytes: int = 0
    queue_bytes: int = 0
    attachments: int = 0
    streams: int = 0
    leased_bytes: int = 0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if type(value) is not int or value < 0:
                raise InvalidRequest(f"{each.name}: {value!r}; a whole number from 0 on is valid")


@dataclass(frozen=True, slots=True)
class Rule:
    """Gives `rights` to principals that match one of the patterns, on matching namespaces."""

    principals: tuple[str, ...]
    rights: Rights
    tenant: str = _ANY
    model: str = _ANY
    namespace: str = _ANY

    def names(self, principal: str) -> bool:
        """Whether it is about this principal."""
        return any(fnmatchcase(principal, pattern) for pattern in self.principals)

    def covers(self, namespace: Namespace) -> bool:
        """Whether it is about this namespace."""
        return (
            fnmatchcase(namespace.tenant, self.tenant)
            and fnmatchcase(namespace.model, self.model)
            and (self.namespace == _ANY or self.namespace == namespace.id.hex())
        )

    @property
    def everywhere(self) -> bool:
        """Whether it is about every namespace."""
        return (self.tenant, self.model, self.namespace) == (_ANY, _ANY, _ANY)


@dataclass(frozen=True, slots=True)
class AccessRules:
    """What a file says. `tokens` maps the SHA-256 of a token to its principal."""

    tokens: Mapping[bytes, str] = field(default_factory=dict, repr=False)
    rules: tuple[Rule, ...] = ()
    limits: tuple[tuple[tuple[str, ...], Mapping[str, int]], ...] = ()

    def rights(self, principal: str, namespace: Namespace) -> Rights:
        """What a principal may do in a namespace."""
        if not self.rules:
            return ALL_RIGHTS
        found = Rights.NONE
        for rule in self.rules:
            if rule.names(principal) and rule.covers(namespace):
                found |= rule.rights
        return found

    def rights_everywhere(self, principal: str) -> Rights:
        """What a principal may do in every namespace, known or not."""
        if not self.rules:
            return ALL_RIGHTS
        found = Rights.NONE
        for rule in self.rules:
            if rule.everywhere and rule.names(principal):
                found |= rule.rights
        return found

    def limits_of(self, principal: str, defaults: Limits) -> Limits:
        """The defaults, changed by what the first matching entry says."""
        for patterns, changes in self.limits:
            if any(fnmatchcase(principal, pattern) for pattern in patterns):
                return replace(defaults, **changes)
        return defaults

    def with_tokens(self, tokens: Collection[str]) -> AccessRules:
        """These, and tokens without a name."""
        digests = [digest_of(token) for token in tokens]
        unnamed = {digest: principal_of_digest(digest) for digest in digests}
        return replace(self, tokens={**unnamed, **self.tokens})


def digest_of(token: str) -> bytes:
    """SHA-256 of a token: what is kept and compared."""
    return hashlib.sha256(token.encode()).digest()


def check_tokens(tokens: Sequence[str]) -> None:
    """Raises InvalidRequest for tokens that are easy to guess or cannot travel."""
    short = [token for token in tokens if len(token) < TOKEN_CHARS_MIN]
    if short:
        raise InvalidRequest(
            f"{len(short)} of {len(tokens)} tokens have fewer than {TOKEN_CHARS_MIN} "
            "chars; make one with `python -c 'import secrets; print(secrets.token_hex())'`"
        )
    if not all(token.isascii() and token.isprintable() for token in tokens):
        raise InvalidRequest("tokens must be printable ASCII: they travel in gRPC metadata")


def parse_access(text: str, where: str) -> AccessRules:
    """The rules of a file named `where`. Raises InvalidRequest; never shows a token."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest(f"{where} is not TOML: {error}") from error
    _check_keys(content, ("token", "rule", "limit"), where)
    tokens: dict[bytes, str] = {}
    for index, entry in enumerate(_entries(content, "token", where)):
        digest, principal = _token(entry, f"{where}: token {index}")
        if digest in tokens:
            raise InvalidRequest(f"{where}: token {index} is the same as that of {tokens[digest]}")
        tokens[digest] = principal
    rules = tuple(
        _rule(entry, f"{where}: rule {index}")
        for index, entry in enumerate(_entries(content, "rule", where))
    )
    limits = tuple(
        _limit(entry, f"{where}: limit {index}")
        for index, entry in enumerate(_entries(content, "limit", where))
    )
    return AccessRules(tokens, rules, limits)


def _entries(content: Mapping[str, Any], table: str, where: str) -> list[dict[str, Any]]:
    entries = content.get(table, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InvalidRequest(f"{where}: write [[{table}]], once an entry")
    if len(entries) > ENTRIES_MAX:
        raise InvalidRequest(f"{where}: {len(entries)} entries [[{table}]], {ENTRIES_MAX} at most")
    return entries


def _token(entry: Mapping[str, Any], where: str) -> tuple[bytes, str]:
    _check_keys(entry, ("name", "token", "sha256"), where)
    principal = principal_of_token(_text(entry, "name", where))
    if ("token" in entry) == ("sha256" in entry):
        raise InvalidRequest(f"{where}: give either token or sha256")
    if "token" in entry:
        token = _text(entry, "token", where)
        try:
            check_tokens([token])
        except InvalidRequest as error:
            raise InvalidRequest(f"{where}: {error}") from error
        return digest_of(token), principal
    text = _text(entry, "sha256", where)
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(text) != _SHA256_CHARS or not digest:
        raise InvalidRequest(f"{where}: sha256 must be {_SHA256_CHARS} hexadecimal digits")
    return digest, principal


def _rule(entry: Mapping[str, Any], where: str) -> Rule:
    _check_keys(entry, ("principal", "rights", "tenant", "model", "namespace"), where)
    given = entry.get("rights")
    if not isinstance(given, list) or not given:
        raise InvalidRequest(f'{where}: rights must be a list such as ["read", "write"]')
    rights = Rights.NONE
    for word in given:
        if word not in ("read", "write", "admin"):
            raise InvalidRequest(f"{where}: right {word!r}; read, write and admin are valid")
        rights |= Rights[word.upper()]
    scope = {
        name: _text(entry, name, where)
        for name in ("tenant", "model", "namespace")
        if name in entry
    }
    namespace = scope.get("namespace", _ANY)
    if namespace != _ANY and not _NAMESPACE_ID.fullmatch(namespace):
        raise InvalidRequest(
            f"{where}: namespace {namespace!r} is no namespace id: give {2 * NAMESPACE_ID_BYTES} "
            "hexadecimal digits in lower case"
        )
    return Rule(_patterns(entry, where), rights, **scope)


def _limit(entry: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], Mapping[str, int]]:
    names = tuple(each.name for each in fields(Limits))
    _check_keys(entry, ("principal", *names), where)
    changes = {name: entry[name] for name in names if name in entry}
    try:
        Limits(**changes)
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {error}") from error
    return _patterns(entry, where), changes


def _patterns(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    given = entry.get("principal")
    patterns = [given] if isinstance(given, str) else given
    if (
        not isinstance(patterns, list)
        or not patterns
        or not all(
            isinstance(text, str) and 0 < len(text) <= PRINCIPAL_BYTES_MAX for text in patterns
        )
    ):
        raise InvalidRequest(
            f"{where}: principal must be a pattern such as token:NAME, or a list of them"
        )
    return tuple(patterns)


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        # What is there may be a secret: it is not shown.
        raise InvalidRequest(f"{where}: {key} must be a text that is not empty")
    return value


def _check_keys(entry: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in entry:
        if key not in known:
            raise InvalidRequest(f"{where}: unknown key {key!r}; known: {', '.join(known)}")
