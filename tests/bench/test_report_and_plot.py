"""The answer of a demo: numbers, table, picture, from synthetic measurements."""

import io
import json
import math
from pathlib import Path

import pytest
from dualpath.bench.demo.config import DemoConfig, Destination
from dualpath.bench.demo.plot import draw_utilisation, smoothed
from dualpath.bench.demo.report import DemoReport, percentile
from dualpath.bench.demo.table import print_report
from dualpath.bench.table import plain_table
from dualpath.bench.testbed.engine import LoadOutcome
from dualpath.bench.testbed.link_meter import (
    LinkKind,
    LinkSample,
    LinkUse,
    link_uses,
    links_of,
    parse_devices,
)
from dualpath.bench.testbed.replay import PolicyRun
from dualpath.bench.testbed.shaping import LinkRates
from dualpath.bench.testbed.topology import Topology
from dualpath.bench.testbed.workload import PlannedLoad, Workload

MB = 1e6


def outcome(seconds: float, mib: int = 8, *, failure: str = "", corrupt: int = 0) -> LoadOutcome:
    blocks = mib * 4
    return LoadOutcome(
        session=0,
        turn=0,
        requested_blocks=blocks,
        verified_blocks=blocks - corrupt,
        corrupt_blocks=corrupt,
        nbytes=(blocks - corrupt) << 18,
        ended_s=0.0,
        elapsed_s=seconds,
        failure=failure,
        detail="",
        shares={"direct": mib << 20},
        events={"stalled": 1} if failure else {},
    )


def uses(share: dict[tuple[str, LinkKind], float], seconds: float) -> tuple[LinkUse, ...]:
    topology = Topology.of(1, 2)
    samples = []
    for step in range(int(seconds * 10) + 1):
        at = step / 10
        wave = 1 + 0.05 * math.sin(at * 7)
        counters = {
            (link.node, link.kind): int(
                share.get((link.node, link.kind), 0.0) * link.limit_bytes_per_s * at * wave
            )
            for link in links_of(topology, LinkRates(50e6, 400e6))
        }
        samples.append(LinkSample(100 + at, counters))
    return link_uses(links_of(topology, LinkRates(50e6, 400e6)), samples)


def report(unshaped: float = 600 * MB, **config: object) -> DemoReport:
    snic, into, out = LinkKind.SNIC_IN, LinkKind.CNIC_IN, LinkKind.CNIC_OUT
    direct = PolicyRun(
        "direct",
        10.0,
        tuple(outcome(1.2) for _ in range(60)),
        uses({("prefill-0", snic): 0.98, ("prefill-0", into): 0.12}, 10),
        0.5,
    )
    full = {(name, snic): 0.97 for name in ("prefill-0", "decode-0", "decode-1")}
    split = PolicyRun(
        "split",
        3.5,
        tuple(outcome(0.4) for _ in range(60)),
        uses(
            {
                **full,
                ("prefill-0", into): 0.37,
                ("decode-0", out): 0.12,
                ("decode-1", out): 0.12,
            },
            3.5,
        ),
        1.1,
    )
    workload = Workload("made up", 512, 1 << 18, ((PlannedLoad(0, 0, (b"x" * 32,)),),), ())
    return DemoReport(
        config=DemoConfig(prefill=1, decode=2, storage_bytes_per_s=50 * MB, **config),  # type: ignore[arg-type]
        topology="1P2D",
        shaping="kernel",
        shaping_reason="network namespaces with HTB",
        unshaped_bytes_per_s=unshaped,
        workload=workload,
        runs=(direct, split),
        machine={"cores": 2},
        versions={"python": "3"},
        seconds=20.0,
    )


def test_the_ratio_is_throughput_over_directs_and_load_times_are_compared_as_sums() -> None:
    split = report().policies["split"]
    assert split.ratio_to_direct == pytest.approx(10 / 3.5)
    assert split.load_time_ratio_to_direct == pytest.approx(0.4 / 1.2)
    assert report().policies["direct"].ratio_to_direct == 1


def test_without_a_direct_run_there_is_no_ratio() -> None:
    full = report()
    alone = full.__class__(
        **{name: getattr(full, name) for name in full.__slots__ if name != "runs"},
        runs=full.runs[1:],
    )
    assert alone.policies["split"].ratio_to_direct is None
    print_report(alone, io.StringIO())


def test_the_binding_links_are_named() -> None:
    policies = report().policies
    assert policies["direct"].bound_by(cpu_bound=False).startswith("prefill-0 SNIC in (")
    bound = policies["split"].bound_by(cpu_bound=False)
    assert all(f"{node} SNIC in" in bound for node in ("prefill-0", "decode-0", "decode-1"))
    assert policies["split"].storage_balance == pytest.approx(1.0, abs=0.01)


def test_a_shaped_sum_above_two_fifths_of_the_unshaped_rate_is_cpu_bound() -> None:
    assert not report(unshaped=376 * MB).cpu_bound
    slow = report(unshaped=374 * MB)
    assert slow.cpu_bound
    assert slow.ok
    assert any("CPU BOUND" in line for line in slow.verdict)
    assert slow.to_json()["cpu_bound"] is True
    claims = [policy.bound_by(cpu_bound=True) for policy in slow.policies.values()]
    assert all(claim.startswith("not claimed") for claim in claims)


@pytest.mark.parametrize(
    ("destination", "ratio", "expected"),
    [
        (Destination.GPU, 8.0, 150),
        (Destination.GPU, 1.0, 50),
        (Destination.HOST, 1.0, 100),
        (Destination.HOST, 0.5, 75),
    ],
)
def test_the_sum_of_links_counts_what_every_byte_has_to_cross(
    destination: Destination, ratio: float, expected: float
) -> None:
    config = DemoConfig(
        prefill=1,
        decode=2,
        destination=destination,
        compute_ratio=ratio,
        storage_bytes_per_s=50 * MB,
    )
    assert config.links_sum_bytes_per_s == pytest.approx(expected * MB)


def test_the_report_says_when_the_compute_link_makes_a_second_path_useless() -> None:
    verdict = report(compute_ratio=1.0).verdict
    assert any("a second path gains nothing" in line for line in verdict)
    assert not any("gains nothing" in line for line in report().verdict)
    assert not any("gains nothing" in line for line in report(compute_ratio=1.1).verdict)
    into_host = report(compute_ratio=1.0, destination=Destination.HOST).verdict
    assert not any("gains nothing" in line for line in into_host)


def test_a_failed_or_corrupt_load_fails_the_report_and_is_counted_by_reason() -> None:
    good = report()
    bad_run = PolicyRun(
        "direct",
        1.0,
        (outcome(1, failure="deadline"), outcome(1, failure="corrupt", corrupt=2)),
        good.runs[0].links,
        0.1,
    )
    bad = good.__class__(
        **{name: getattr(good, name) for name in good.__slots__ if name != "runs"},
        runs=(bad_run,),
    )
    assert not bad.ok
    assert bad.corrupt_blocks == 2
    assert bad.policies["direct"].failures == {"deadline": 1, "corrupt": 1}
    out = io.StringIO()
    print_report(bad, out)
    assert "FAILED" in out.getvalue()
    assert "failed: deadline 1, corrupt 1" in out.getvalue()


def test_the_json_form_has_the_promised_keys_and_survives_a_round_trip() -> None:
    value = json.loads(json.dumps(report().to_json()))
    assert value["shaping"] == "kernel"
    assert value["verified_blocks"] == 120 * 32
    assert value["corrupt_blocks"] == 0
    assert value["policies"]["split"]["ratio_to_direct"] == pytest.approx(2.857, abs=0.01)
    assert value["policies"]["split"]["links"]["prefill-0 SNIC in"]["utilisation"] > 0.9
    assert {"p50", "p99", "max"} <= set(value["policies"]["direct"]["load_ms"])


def test_the_table_has_every_policy_and_link() -> None:
    out = io.StringIO()
    print_report(report(), out)
    text = out.getvalue()
    for word in ("direct", "split", "decode-1 SNIC in", "2.86", "1P2D", "all right"):
        assert word in text


def test_a_plain_table_lines_its_columns_up() -> None:
    lines = plain_table(("name", "n"), [("a", "1"), ("bb", "22")]).splitlines()
    assert lines == ["name   n", "----  --", "a      1", "bb    22"]


def test_the_picture_is_a_png_of_some_size(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "links.png"
    draw_utilisation(report(), str(path))
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 10_000


def test_smoothing_keeps_the_mean_and_never_looks_ahead() -> None:
    series = [(0.1 * index, float(index % 2)) for index in range(40)]
    times, values = smoothed(series, 0.4)
    assert times == [at for at, _ in series]
    assert all(0.2 < value < 0.8 for value in values[4:])
    assert values[0] == 0


def test_utilisation_counts_between_the_first_and_the_last_sample() -> None:
    use = next(each for each in uses({("decode-1", LinkKind.SNIC_IN): 0.5}, 2) if each.nbytes)
    assert use.link.name == "decode-1 SNIC in"
    assert use.utilisation == pytest.approx(0.5, rel=0.1)
    assert link_uses([use.link], [])[0].nbytes == 0


def test_device_counters_are_read_by_name() -> None:
    text = "head\nhead\n  lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\ncnicin:7 0 0 0 0 0 0 0 5 0\n"
    assert parse_devices(text) == {"lo": (1, 9), "cnicin": (7, 5)}


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([], 0.99) == 0
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile(list(range(1, 101)), 0.99) == 99
