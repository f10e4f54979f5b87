"""What engines and nodes have to do: their last report, and what they were given since.

Owns the columns of `EngineTable` that change with work. The load of an engine is what its group
reported plus the work of assignments that the report did not know yet, plus that of requests for
which it was chosen while the other engine is not known. So a late report never hides work, and a
repeated one never counts any twice. The memory of a decode engine is the larger of this and of
what the requests that the scheduler gave it may need in all, their output included: whatever is
reported, no more is given than fits.
"""

from __future__ import annotations

from dualpath.scheduler.assignment import Assignment
from dualpath.scheduler.engine_table import EngineTable
from dualpath.scheduler.group_report import GroupReport
from dualpath.scheduler.request_entry import RequestEntry
from dualpath.transfer.errors import InvalidRequest


class LoadLedger:
    """See the module docstring. Indices are those of `table`."""

    def __init__(self, table: EngineTable) -> None:
        self._table = table
        self._choosing: list[list[int]] = []
        """An engine's requests, tokens and memory of requests that lack their other engine."""
        self.unseen: list[list[tuple[int, int, int]]] = []
        """An engine's assignments that no report has seen: number, tokens, memory."""
        self.unseen_reads: list[list[tuple[int, float]]] = []
        """A node's reads that no report has seen: number, tokens."""
        self._promised: list[int] = []
        """Tokens of memory that an engine's live requests may need."""

    def engine_added(self, index: int) -> None:
        """A new engine, or a new one by an index that was free."""
        while len(self.unseen) <= index:
            self._choosing.append([0, 0, 0])
            self.unseen.append([])
            self._promised.append(0)
        self._choosing[index] = [0, 0, 0]
        self.unseen[index] = []
        self._promised[index] = 0
        node = self._table.node_of[index]
        while len(self.unseen_reads) <= node:
            self.unseen_reads.append([])
        if len(self._table.node_engines[node]) == 1:
            self.unseen_reads[node] = []

    def chosen(self, index: int, tokens: int, memory: int, *, first: bool) -> None:
        """An engine gets a request; `first`: its other engine is not known yet."""
        table = self._table
        table.requests[index] += 1
        table.tokens[index] += tokens
        if memory:
            table.memory[index] += memory
            self._promised[index] += memory
        if first:
            choosing = self._choosing[index]
            choosing[0] += 1
            choosing[1] += tokens
            choosing[2] += memory

    def unchosen(self, index: int, tokens: int, memory: int) -> None:
        """An engine does not get the request after all; it was never told of it."""
        table = self._table
        table.requests[index] -= 1
        table.tokens[index] -= tokens
        table.memory[index] -= memory
        self._promised[index] -= memory
        self._told(index, tokens, memory)

    def assigned(self, assignment: Assignment, entry: RequestEntry, *, prefill_first: bool) -> None:
        """Both engines are known, one of them since before: their work and their nodes' reads wait
        for a report."""
        number, request, _, _, read = assignment
        prefill, decode = entry.prefill, entry.decode
        tokens = request.tokens
        memory = tokens + request.new_output_bound
        if prefill_first:
            self._told(prefill, tokens, 0)
        else:
            self._told(decode, tokens, memory)
        self.unseen[prefill].append((number, tokens, 0))
        self.unseen[decode].append((number, tokens, memory))
        share, other = read
        if share:
            self._will_read(prefill, number, share * request.hit_tokens)
        if other:
            self._will_read(decode, number, other * request.hit_tokens)

    def _will_read(self, index: int, number: int, tokens: float) -> None:
        node = self._table.node_of[index]
        self._table.read_queue[node] += tokens
        self.unseen_reads[node].append((number, tokens))

    def released(self, index: int, memory: int) -> None:
        """A request no longer needs the memory of a decode engine. What the engine has shows
        with its next report."""
        self._promised[index] -= memory

    def dropped(self, index: int, number: int) -> None:
        """An engine has an assignment no more. Where no report has seen it, none may ever tell that
        it has gone: it counts no longer."""
        unseen = self.unseen[index]
        if not unseen or unseen[0][0] > number:
            return
        for place, (known, tokens, memory) in enumerate(unseen):
            if known == number:
                del unseen[place]
                table = self._table
                table.requests[index] -= 1
                table.tokens[index] -= tokens
                table.memory[index] = max(table.memory[index] - memory, self._promised[index])
                return

    def read(self, node: int, number: int) -> None:
        """The reads of an assignment at a node are done, or will not be: the same."""
        reads = self.unseen_reads[node]
        if not reads or reads[0][0] > number:
            return
        for place, (known, tokens) in enumerate(reads):
            if known == number:
                del reads[place]
                queue = self._table.read_queue[node] - tokens
                self._table.read_queue[node] = queue if queue > 0 else 0
                return

    def check(self, report: GroupReport) -> None:
        """Raises InvalidRequest if it names engines or nodes that are not of its group."""
        table = self._table
        group = table.group(report.group)
        for engine in report.engines:
            index = table.engine_index.get(engine.engine)
            if index is None or table.group_of[index] != group:
                raise InvalidRequest(
                    f"engine '{engine.engine}' is not registered in group '{report.group}'; "
                    f"register it first"
                )
        for node in report.nodes:
            place = table.node_index.get(node.node)
            if place is None or table.group_of[table.node_engines[place][0]] != group:
                raise InvalidRequest(
                    f"node '{node.node}' has no engine in group '{report.group}'; "
                    f"register one first"
                )

    def report(self, report: GroupReport) -> None:
        """Take what a checked report says."""
        table, seen = self._table, report.seen
        for engine in report.engines:
            index = table.engine_index[engine.engine]
            requests, tokens, memory = self._choosing[index]
            unseen = self.unseen[index]
            if unseen:
                unseen = [] if seen is None else [one for one in unseen if one[0] > seen]
                self.unseen[index] = unseen
                for _, more_tokens, more_memory in unseen:
                    requests += 1
                    tokens += more_tokens
                    memory += more_memory
            table.requests[index] = engine.requests + requests
            table.tokens[index] = engine.tokens + tokens
            memory += max(engine.tokens, engine.reserved_tokens)
            table.memory[index] = max(memory, self._promised[index])
        for node in report.nodes:
            place = table.node_index[node.node]
            reads = self.unseen_reads[place]
            if reads:
                reads = [] if seen is None else [one for one in reads if one[0] > seen]
                self.unseen_reads[place] = reads
            table.read_queue[place] = node.read_queue_tokens + sum([one[1] for one in reads])

    def _told(self, index: int, tokens: int, memory: int) -> None:
        choosing = self._choosing[index]
        choosing[0] -= 1
        choosing[1] -= tokens
        choosing[2] -= memory
