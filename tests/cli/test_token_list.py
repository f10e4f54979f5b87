"""Token ids as people give them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from dualpath.cli.token_list import parse_tokens, tokens_of_key
from dualpath.transfer.errors import InvalidRequest
from hypothesis import given
from hypothesis import strategies as st


def test_lists_and_ranges_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(parse_tokens("1,2,3")) == [1, 2, 3]
    assert list(parse_tokens("5..7")) == [5, 6, 7]
    assert list(parse_tokens("1, 5..6")) == [1, 5, 6]
    path = tmp_path / "tokens"
    path.write_text("7 8\n9\n")
    assert list(parse_tokens(str(path))) == [7, 8, 9]
    monkeypatch.setattr("sys.stdin", io.StringIO("[1, 2]"))
    assert list(parse_tokens("-")) == [1, 2]


@given(st.lists(st.integers(min_value=0, max_value=2**32 - 1), min_size=1, max_size=50))
def test_a_json_array_comes_back(tokens: list[int]) -> None:
    from dualpath.cli.token_list import _numbers

    assert list(_numbers(json.dumps(tokens), "x")) == tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7..5", "'7..5' is not a range"),
        ("0..99999999999", "not a range of 1"),
        ("1.5", "'1.5' is not a token id"),
        ("4294967296", "4294967296 is outside"),
        ("no-such-file", "neither a list .* nor a file"),
        (",", "no token ids"),
    ],
)
def test_what_is_no_token_id_is_named(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_tokens(text)


@pytest.mark.parametrize("text", ["[1, true]", "[1, [2]]", '{"a": 1}', "[1.5]", "[1", "[-1]", "x"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=r"tokens\.json"):
        parse_tokens(str(path))


def test_the_tokens_of_a_key_never_change() -> None:
    assert tokens_of_key("photo", 3) == [1320409436, 2654480548, 3910197647]
    assert tokens_of_key("photo", 20)[:3] == tokens_of_key("photo", 3)
    assert tokens_of_key("photo", 8) != tokens_of_key("photo2", 8)
    with pytest.raises(InvalidRequest, match="empty"):
        tokens_of_key("", 1)
