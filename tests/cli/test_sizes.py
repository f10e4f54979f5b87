"""Units on the command line."""

from __future__ import annotations

import pytest
from dualpath.cli.sizes import format_bytes, format_rate, parse_bytes, parse_rate, parse_seconds
from dualpath.transfer.errors import InvalidRequest
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4096", 4096),
        ("4GiB", 4 << 30),
        ("4 GiB", 4 << 30),
        ("1.5KiB", 1536),
        ("4GB", 4_000_000_000),
        ("0", 0),
        ("12B", 12),
    ],
)
def test_sizes_tell_decimal_from_binary_units(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["4G", "", "GiB", "-1", "1.5", "4gib", "1e9", "0x10", "nan"])
def test_a_size_that_could_mean_two_things_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidRequest, match=f"'{text}'"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "rate"),
    [("50MB/s", 5e7), ("800Mbit/s", 1e8), ("1Gbit", 1.25e8), ("1000", 1000.0), ("0", 0.0)],
)
def test_rates_are_bytes_a_second(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


def test_durations_are_seconds() -> None:
    assert parse_seconds("500ms") == 0.5
    assert parse_seconds("2") == 2.0
    assert parse_seconds("2min") == 120.0
    with pytest.raises(InvalidRequest, match="duration"):
        parse_seconds("2 fortnights")


@given(st.integers(min_value=0, max_value=1 << 60))
def test_a_plain_number_of_bytes_is_itself(nbytes: int) -> None:
    assert parse_bytes(f"{nbytes}") == pytest.approx(nbytes, rel=1e-15)


def test_shown_sizes_keep_at_least_one_unit() -> None:
    assert format_bytes(512) == "512 B"
    assert format_bytes(4 << 30) == "4.00 GiB"
    assert format_rate(5e7) == "50.0 MB/s"
    assert format_rate(10) == "10 B/s"
