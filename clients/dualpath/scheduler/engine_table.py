"""Engines, nodes and groups in columns: what the policies look at.

Owns the numbers, not the decisions. Columns are lists indexed by small integers, since a decision
has microseconds. The index of an engine, node or group that has left is used again.

What a column of an engine holds is what its group last reported plus what has been given to it
since (see `Scheduler`): `tokens` is the paper's tok_e, `requests` its seq_e, `memory` the tokens
of KV for which room is kept. A node's `read_queue` is read_q, `staging` the tokens that its host
memory keeps for requests that do not decode yet, of `staging_max`.
"""

from __future__ import annotations

import math

from dualpath.scheduler.engine_spec import EngineSpec, NodeSpec, Role
from dualpath.scheduler.settings import SchedulerLimits
from dualpath.transfer.errors import InvalidRequest, Overloaded

FULL_RETRY_S = 5.0
"""After this an engine that was refused for want of room should ask again."""


class EngineTable:
    """See the module docstring. Lists are public and read-only outside of the scheduler."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self.engine_index: dict[str, int] = {}
        self.node_index: dict[str, int] = {}
        self.group_index: dict[str, int] = {}
        self._free_engines: list[int] = []
        self._free_nodes: list[int] = []
        self._free_groups: list[int] = []
        # Engines.
        self.spec: list[EngineSpec] = []
        self.node_of: list[int] = []
        self.group_of: list[int] = []
        self.tokens: list[int] = []
        self.requests: list[int] = []
        self.memory: list[int] = []
        self.hbm: list[int] = []
        self.taking: list[bool] = []
        # Nodes.
        self.node_spec: list[NodeSpec] = []
        self.node_engines: list[list[int]] = []
        self.read_queue: list[float] = []
        self.read_rate: list[float] = []
        self.compute_rate: list[float] = []
        self.staging: list[int] = []
        self.staging_max: list[float] = []
        # Groups.
        self.group_name: list[str] = []
        self.role: list[Role] = []
        self.members: list[list[int]] = []
        self._engines_in: list[int] = []

    def add(self, spec: EngineSpec) -> int:
        """Take an engine in; its index. The same one again changes nothing.

        Raises InvalidRequest if it is known otherwise, if its group has another role or its node
        lies in another group; Overloaded at the limits.
        """
        known = self.engine_index.get(spec.name)
        if known is not None:
            if self.spec[known] != spec:
                raise InvalidRequest(
                    f"engine '{spec.name}' is registered as {self.spec[known]}, now as {spec}; "
                    f"let it leave first, or use another name"
                )
            return known
        self._check_place(spec)
        group = self._group(spec)
        node = self._node(spec.node)
        if self._free_engines:
            index = self._free_engines.pop()
            self.spec[index] = spec
            self.node_of[index], self.group_of[index] = node, group
            self.tokens[index] = self.requests[index] = self.memory[index] = 0
            self.hbm[index], self.taking[index] = spec.hbm_tokens, True
        else:
            index = len(self.spec)
            self.spec.append(spec)
            self.node_of.append(node)
            self.group_of.append(group)
            for column in (self.tokens, self.requests, self.memory):
                column.append(0)
            self.hbm.append(spec.hbm_tokens)
            self.taking.append(True)
        self.engine_index[spec.name] = index
        self.node_engines[node].append(index)
        self.members[group].append(index)
        self._engines_in[group] += 1
        return index

    def describe(self, spec: NodeSpec) -> None:
        """What is known of a node with engines. Raises InvalidRequest if it has none."""
        index = self.node_index.get(spec.name)
        if index is None:
            raise InvalidRequest(f"node '{spec.name}' has no engine; register one first")
        self.node_spec[index] = spec
        self.read_rate[index] = spec.read_tokens_per_s
        self.compute_rate[index] = spec.compute_tokens_per_s
        self.staging_max[index] = spec.staging_tokens or math.inf

    def node_named(self, name: str) -> NodeSpec:
        """What is known of a node; of one that is not, its name."""
        index = self.node_index.get(name)
        return NodeSpec(name) if index is None else self.node_spec[index]

    def has_room(self, engine: int, tokens: int) -> bool:
        """Whether the host memory of an engine's node has buffers for so many tokens more. One
        request alone is always let in: its chunks go through what there is."""
        node = self.node_of[engine]
        staging = self.staging[node]
        return not staging or staging + tokens <= self.staging_max[node]

    def withdraw(self, index: int) -> None:
        """Choose an engine no more; what it has it keeps."""
        self.taking[index] = False
        members = self.members[self.group_of[index]]
        if index in members:
            members.remove(index)

    def remove(self, index: int) -> None:
        """Forget an engine, and its node and group with the last of theirs."""
        self.withdraw(index)
        spec = self.spec[index]
        del self.engine_index[spec.name]
        node, group = self.node_of[index], self.group_of[index]
        self.node_engines[node].remove(index)
        self._engines_in[group] -= 1
        self._free_engines.append(index)
        if not self.node_engines[node]:
            del self.node_index[spec.node]
            self._free_nodes.append(node)
        if not self._engines_in[group]:
            del self.group_index[spec.group]
            self._free_groups.append(group)

    def group(self, name: str) -> int:
        """Index of a group. Raises InvalidRequest if it is not registered."""
        index = self.group_index.get(name)
        if index is None:
            raise InvalidRequest(f"group '{name}' has no engine here; register its engines first")
        return index

    def _check_place(self, spec: EngineSpec) -> None:
        group, node = self.group_index.get(spec.group), self.node_index.get(spec.node)
        if group is not None and self.role[group] is not spec.role:
            raise InvalidRequest(
                f"group '{spec.group}' has {self.role[group].value} engines, '{spec.name}' is a "
                f"{spec.role.value} engine; a group has one role"
            )
        if node is not None:
            other = self.spec[self.node_engines[node][0]].group
            if other != spec.group:
                raise InvalidRequest(
                    f"node '{spec.node}' lies in group '{other}', '{spec.name}' names group "
                    f"'{spec.group}'; a node lies in one group"
                )
        limits = self._limits
        for what, count, new, most in (
            ("engines", len(self.engine_index), True, limits.engines_max),
            ("nodes", len(self.node_index), node is None, limits.nodes_max),
            ("groups", len(self.group_index), group is None, limits.groups_max),
        ):
            if new and count >= most:
                raise Overloaded(
                    f"{count} {what} are registered, the most that {what}_max allows; raise it",
                    retry_after_s=FULL_RETRY_S,
                )

    def _group(self, spec: EngineSpec) -> int:
        index = self.group_index.get(spec.group)
        if index is not None:
            return index
        if self._free_groups:
            index = self._free_groups.pop()
            self.group_name[index], self.role[index] = spec.group, spec.role
        else:
            index = len(self.group_name)
            self.group_name.append(spec.group)
            self.role.append(spec.role)
            self.members.append([])
            self._engines_in.append(0)
        self.group_index[spec.group] = index
        return index

    def _node(self, name: str) -> int:
        index = self.node_index.get(name)
        if index is not None:
            return index
        spec = NodeSpec(name)
        if self._free_nodes:
            index = self._free_nodes.pop()
            self.node_spec[index] = spec
            self.read_queue[index], self.staging[index] = 0, 0
            self.read_rate[index] = spec.read_tokens_per_s
            self.compute_rate[index] = spec.compute_tokens_per_s
            self.staging_max[index] = math.inf
        else:
            index = len(self.node_spec)
            self.node_spec.append(spec)
            self.node_engines.append([])
            self.read_queue.append(0)
            self.read_rate.append(spec.read_tokens_per_s)
            self.compute_rate.append(spec.compute_tokens_per_s)
            self.staging.append(0)
            self.staging_max.append(math.inf)
        self.node_index[name] = index
        return index
