"""What `dualpath top` shows of two samples of daemons. Pure: samples in, values and lines out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dualpath.cli.sizes import format_bytes, format_rate
from dualpath.proto.v1 import store_pb2

ROWS_MAX = 8
"""Most principals and namespaces that are shown of a daemon."""
_NAME_CHARS = 32


@dataclass(frozen=True, slots=True)
class Sample:
    """Statistics of the daemon at `address` at `taken_s` (seconds, monotonic), or why not."""

    address: str
    taken_s: float
    stats: store_pb2.StatsResponse | None
    error: str = ""


def daemon_values(before: Sample, after: Sample) -> dict[str, Any]:
    """One daemon as plain values: what it holds, and its rates between the samples."""
    stats = after.stats
    if stats is None:
        return {"address": after.address, "error": after.error}
    # After a restart the counters begin anew: then there is nothing to compare with.
    old = before.stats
    if old is None or old.server_id != stats.server_id:
        old = stats
    seconds = max(1e-9, after.taken_s - before.taken_s)

    def rate(name: str) -> float:
        return max(0.0, float(getattr(stats, name) - getattr(old, name))) / seconds

    hits, misses = rate("hit_blocks"), rate("missed_blocks")
    return {
        "address": after.address,
        "state": stats.state,
        "version": stats.version,
        "uptime_s": stats.uptime_s,
        "troubles": dict(stats.troubles),
        "blocks": stats.blocks,
        "leases": stats.leases,
        "reservations": stats.reservations,
        "attachments": stats.attachments,
        "queue_bytes": stats.queue_bytes,
        "lookups_per_s": rate("lookups"),
        "hit_ratio": hits / (hits + misses) if hits + misses else None,
        "misses_per_s": _map_rates(old.misses, stats.misses, seconds),
        "delivered_bytes_per_s": rate("delivered_bytes"),
        "quota_refusals_per_s": rate("quota_refusals"),
        "events_per_s": rate("last_sequence"),
        "tiers": [_tier_values(old, tier, stats, seconds) for tier in stats.tier],
        "principals": _usage_values(old.principal, stats.principal, seconds, "calls_per_s"),
        "namespaces": _usage_values(old.namespace, stats.namespace, seconds, "lookups_per_s"),
    }


def _map_rates(old: Mapping[str, int], new: Mapping[str, int], seconds: float) -> dict[str, float]:
    rates = {name: (new[name] - old.get(name, 0)) / seconds for name in new}
    return {name: value for name, value in sorted(rates.items()) if value > 0}


def _tier_values(
    old: store_pb2.StatsResponse,
    tier: store_pb2.TierStats,
    stats: store_pb2.StatsResponse,
    seconds: float,
) -> dict[str, Any]:
    former = next((each for each in old.tier if each.tier == tier.tier), tier)
    found = stats.tier_hit_blocks.get(tier.tier, 0) - old.tier_hit_blocks.get(tier.tier, 0)
    return {
        "tier": tier.tier,
        "used_bytes": tier.used_bytes,
        "capacity_bytes": tier.capacity_bytes,
        "read_bytes_per_s": (tier.read_bytes - former.read_bytes) / seconds,
        "written_bytes_per_s": (tier.written_bytes - former.written_bytes) / seconds,
        "evicted_blocks_per_s": (tier.evicted_blocks - former.evicted_blocks) / seconds,
        "hit_blocks_per_s": found / seconds,
    }


def _usage_values(
    old: Sequence[store_pb2.UsageStats],
    new: Sequence[store_pb2.UsageStats],
    seconds: float,
    order: str,
) -> list[dict[str, Any]]:
    """The busiest first."""
    former = {usage.name: usage for usage in old}
    rows = []
    for usage in new:
        last = former.get(usage.name, usage)
        hits = usage.hit_blocks - last.hit_blocks
        misses = usage.missed_blocks - last.missed_blocks
        rows.append(
            {
                "name": usage.name,
                "model": usage.model,
                "tenant": usage.tenant,
                "calls_per_s": (usage.calls - last.calls) / seconds,
                "lookups_per_s": (usage.lookups - last.lookups) / seconds,
                "hit_ratio": hits / (hits + misses) if hits + misses else None,
                "sealed_blocks_per_s": (usage.sealed_blocks - last.sealed_blocks) / seconds,
                "delivered_bytes_per_s": (usage.delivered_bytes - last.delivered_bytes) / seconds,
                "refusals_per_s": (usage.refusals - last.refusals) / seconds,
                "calls_active": usage.calls_active,
                "leases": usage.leases,
                "reserved_bytes": usage.reserved_bytes,
                "queue_bytes": usage.queue_bytes,
            }
        )
    rows.sort(key=lambda row: (-float(str(row[order])), -int(str(row["leases"]))))
    return rows


def frame(before: Sequence[Sample], after: Sequence[Sample]) -> list[str]:
    """The lines of a screen, one part a daemon."""
    lines: list[str] = []
    for pair in zip(before, after, strict=True):
        values = daemon_values(*pair)
        lines += _daemon_lines(values)
        lines.append("")
    return lines[:-1]


def _daemon_lines(values: dict[str, Any]) -> Iterator[str]:
    if "error" in values:
        yield f"{values['address']}  no answer: {values['error']}"
        return
    yield (
        f"{values['address']}  {values['state']}  up {_duration(values['uptime_s'])}  "
        f"{values['blocks']} blocks  version {values['version']}"
    )
    for word, text in values["troubles"].items():
        yield f"  DEGRADED {word}: {text}"
    misses = ", ".join(f"{name} {rate:.0f}/s" for name, rate in values["misses_per_s"].items())
    yield (
        f"  look-ups {values['lookups_per_s']:.0f}/s, hits {_ratio(values['hit_ratio'])}"
        f"{'; ended by ' + misses if misses else ''}"
    )
    yield (
        f"  delivered {format_rate(values['delivered_bytes_per_s'])}, queue "
        f"{format_bytes(values['queue_bytes'])}, leases {values['leases']}, reservations "
        f"{values['reservations']}, attachments {values['attachments']}, over quota "
        f"{values['quota_refusals_per_s']:.0f}/s, events {values['events_per_s']:.0f}/s"
    )
    yield (
        f"  {'tier':6}{'used':>11}{'of':>11}{'read':>14}{'written':>14}{'hits/s':>9}"
        f"{'evicted/s':>11}"
    )
    for tier in values["tiers"]:
        yield (
            f"  {tier['tier']:6}{format_bytes(tier['used_bytes']):>11}"
            f"{format_bytes(tier['capacity_bytes']):>11}"
            f"{format_rate(tier['read_bytes_per_s']):>14}"
            f"{format_rate(tier['written_bytes_per_s']):>14}"
            f"{tier['hit_blocks_per_s']:>9.0f}{tier['evicted_blocks_per_s']:>11.0f}"
        )
    for title, key in (("principal", "principals"), ("namespace", "namespaces")):
        yield from _usage_lines(title, values[key])


def _usage_lines(title: str, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    yield (
        f"  {title:{_NAME_CHARS}}{'calls/s':>9}{'look-ups/s':>11}{'hits':>7}{'delivered':>14}"
        f"{'leases':>8}{'over/s':>8}"
    )
    for row in rows[:ROWS_MAX]:
        name = row["name"] if not row["model"] else f"{row['name'][:8]} {row['model']}"
        yield (
            f"  {_cut(name):{_NAME_CHARS}}{row['calls_per_s']:>9.0f}{row['lookups_per_s']:>11.0f}"
            f"{_ratio(row['hit_ratio']):>7}{format_rate(row['delivered_bytes_per_s']):>14}"
            f"{row['leases']:>8}{row['refusals_per_s']:>8.0f}"
        )
    if len(rows) > ROWS_MAX:
        yield f"  and {len(rows) - ROWS_MAX} more"


def _cut(name: str) -> str:
    return name if len(name) < _NAME_CHARS else name[: _NAME_CHARS - 2] + "~"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
