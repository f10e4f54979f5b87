"""What `dualpath demo` accepts."""

import argparse
from pathlib import Path

import pytest
from dualpath.bench.demo.command import EXIT_USAGE, command
from dualpath.bench.demo.config import DemoConfig, parse_rate
from dualpath.transfer.errors import InvalidRequest


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("50MB/s", 50e6),
        ("400Mbit/s", 50e6),
        ("400mbps", 400e6),
        ("1GiB/s", 1 << 30),
        ("1.5 GB/s", 1.5e9),
        ("2000kB/s", 2e6),
    ],
)
def test_rates_are_read_with_their_unit(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "50", "50MB", "fast", "-5MB/s", "1B/s", "1e9GB/s"])
def test_other_rates_are_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidRequest, match="rate"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policies": ("fastest",)}, "fastest"),
        ({"policies": ()}, "--policies"),
        ({"policies": ("split", "split")}, "twice"),
        ({"concurrency": 0}, "--concurrency"),
        ({"sessions": -1}, "--sessions"),
        ({"budget_bytes": 1}, "--budget-mib"),
        ({"budget_bytes": -5}, "--budget-mib"),
        ({"compute_ratio": 0.0}, "--compute-ratio"),
        ({"prefill": 0}, "--prefill"),
        ({"trace": "/nowhere/x.jsonl"}, "/nowhere/x.jsonl"),
        ({"json": "/nowhere/x.json"}, "/nowhere/x.json"),
    ],
)
def test_a_wrong_value_is_refused_by_its_flag(changes: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        DemoConfig(**changes)  # type: ignore[arg-type]


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(words))


def test_wrong_usage_ends_with_status_2_and_a_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("--storage-rate", "quick") == EXIT_USAGE
    assert "quick" in capsys.readouterr().err
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"runs": 1}\n')
    assert run("--trace", str(bad), "--shaping", "none") == EXIT_USAGE
    assert "bad.jsonl, line 1" in capsys.readouterr().err


def test_the_default_is_what_the_help_says() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args([])
    assert args.storage_rate == "auto"
    assert args.policies == ",".join(DemoConfig().policies)
    assert args.budget_mib == DemoConfig().budget_bytes == 0


def test_without_a_budget_the_direct_policy_runs_about_equally_long_at_any_rate() -> None:
    fast, slow = (DemoConfig(prefill=2, storage_bytes_per_s=rate) for rate in (50e6, 10e6))
    assert fast.planned_bytes == 5 * slow.planned_bytes
    assert DemoConfig().planned_bytes * 2 == fast.planned_bytes
    assert DemoConfig(budget_bytes=7 << 20).planned_bytes == 7 << 20


@pytest.mark.parametrize(
    ("unshaped", "nodes", "rate"),
    [(1e9, (1, 1), 50e6), (2e8, (1, 1), 35e6), (2e8, (1, 3), 17e6), (1e6, (1, 1), 10e6)],
)
def test_the_automatic_rate_leaves_the_processor_room(
    unshaped: float, nodes: tuple[int, int], rate: float
) -> None:
    config = DemoConfig(prefill=nodes[0], decode=nodes[1]).fitting(unshaped)
    assert config.storage_bytes_per_s == rate
    assert config.fitting(1e5) is config


def test_a_rate_that_was_asked_for_is_kept() -> None:
    assert DemoConfig(storage_bytes_per_s=9e7).fitting(1e6).storage_bytes_per_s == 9e7
