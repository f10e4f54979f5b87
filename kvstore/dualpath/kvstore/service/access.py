"""What principals may do in which namespaces, and how much: the rules in force, quick answers.

Owns the rules and a bounded memory of decisions, forgotten when the rules change. The check of a
call that was decided before costs one look-up in a dict. A principal whose token is gone may do
nothing any more, whatever the rules say: what it has open asks here again, too. Thread-safe:
everything is replaced, not changed.
"""

from __future__ import annotations

from collections.abc import Callable

from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.service.access_rules import AccessRules, Limits
from dualpath.kvstore.service.principal import OPEN, Rights, is_of_token
from dualpath.transfer.errors import PermissionDenied

DECISIONS_MAX = 1 << 16
_NO_LIMITS = Limits()


class Access:
    """See the module docstring. `namespace_of` finds the namespace of an id, and raises
    InvalidRequest if the id was never opened; `limits` are those of a principal that no entry
    names."""

    def __init__(
        self,
        rules: AccessRules,
        namespace_of: Callable[[bytes], Namespace],
        limits: Limits = _NO_LIMITS,
    ) -> None:
        self._rules = rules
        self._default_limits = limits
        self._limits: dict[str, Limits] = {}
        self._namespace_of = namespace_of
        self._decided: dict[tuple[str, bytes], Rights] = {}
        self._tokens = frozenset(rules.tokens.values())

    @property
    def rules(self) -> AccessRules:
        """The rules in force."""
        return self._rules

    def replace(self, rules: AccessRules) -> None:
        """From now on these rules hold, also for connections that are open."""
        self._rules = rules
        self._tokens = frozenset(rules.tokens.values())
        self._decided = {}
        self._limits = {}

    def admits(self, principal: str) -> bool:
        """Whether it could still come in: its token is there, or nobody needs one."""
        if is_of_token(principal):
            return principal in self._tokens
        return principal != OPEN or not self._tokens

    def require_admitted(self, principal: str) -> None:
        """Raises PermissionDenied, reason `token`, unless it could still come in."""
        if not self.admits(principal):
            raise PermissionDenied(
                f"{principal} is not admitted any more: its token was taken away, or tokens are "
                "asked for now",
                reason="token",
            )

    def limits_of(self, principal: str) -> Limits:
        """What it may hold."""
        known = self._limits
        found = known.get(principal)
        if found is None:
            found = self._rules.limits_of(principal, self._default_limits)
            if len(known) >= DECISIONS_MAX:
                known.clear()
            known[principal] = found
        return found

    def may(self, principal: str, namespace_id: bytes, right: Rights) -> bool:
        """Whether it may. Raises InvalidRequest for a namespace that was never opened."""
        if not self._rules.rules:
            return self.admits(principal)
        decided = self._decided
        found = decided.get((principal, namespace_id))
        if found is None:
            found = Rights.NONE
            if self.admits(principal):
                found = self._rules.rights(principal, self._namespace_of(namespace_id))
            if len(decided) >= DECISIONS_MAX:
                decided.clear()
            decided[principal, namespace_id] = found
        return right in found

    def require(self, principal: str, namespace_id: bytes, right: Rights) -> None:
        """Raises PermissionDenied, reason `rights`, unless it may."""
        if not self.may(principal, namespace_id, right):
            self.require_admitted(principal)
            raise _denied(principal, right, f"namespace {namespace_id.hex()}")

    def require_any(self, principal: str, namespace: Namespace) -> None:
        """Raises PermissionDenied unless the principal has some right in this namespace, which
        nobody may have opened yet."""
        self.require_admitted(principal)
        if not self._rules.rights(principal, namespace):
            raise PermissionDenied(
                f"{principal} has no right in namespace {namespace.id.hex()} (tenant "
                f"{namespace.tenant!r}, model {namespace.model!r}): ask for a rule in the access "
                "file of the daemon",
                reason="rights",
            )

    def may_everywhere(self, principal: str, right: Rights) -> bool:
        """Whether it has the right in all namespaces."""
        return self.admits(principal) and right in self._rules.rights_everywhere(principal)

    def require_everywhere(self, principal: str, right: Rights) -> None:
        """Raises PermissionDenied, reason `rights`, unless it has it in all namespaces."""
        if not self.may_everywhere(principal, right):
            self.require_admitted(principal)
            raise _denied(principal, right, "all namespaces")


def _denied(principal: str, right: Rights, where: str) -> PermissionDenied:
    word = (right.name or "").lower()
    return PermissionDenied(
        f"{principal} has no right to {word} in {where}: ask for a rule in the access file of the "
        "daemon",
        reason="rights",
    )
