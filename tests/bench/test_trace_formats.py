"""Both trace formats: what is read, and what is said about a bad line."""

import contextlib
import gzip
import json
from pathlib import Path

import pytest
from dualpath.bench.testbed.trace_formats import BLOCKS_MAX, TraceRequest, parse_line, read_trace
from dualpath.transfer.errors import InvalidRequest
from hypothesis import given, settings
from hypothesis import strategies as st

RUNS = {
    "trace": "trace_0003",
    "sub": 1,
    "i": 2,
    "t": 1.5,
    "in": 64 * 6 + 5,
    "out": 244,
    "api_time": 7.27,
    "think_time": 0.0,
    "lcp": 0,
    "runs": [[1, 4], [9, 10]],
}
HASH_IDS = {"timestamp": 2500, "input_length": 1100, "output_length": 6, "hash_ids": [0, 7, 8]}


def line(row: object) -> bytes:
    return json.dumps(row).encode()


def test_runs_become_the_full_blocks_of_a_conversation() -> None:
    assert parse_line(line(RUNS), 1) == TraceRequest(
        "trace_0003", "trace_0003/1", 1.5, 64, (1, 2, 3, 4, 9, 10), 389, 244
    )


def test_hash_ids_become_full_blocks_without_the_partly_filled_last_one() -> None:
    assert parse_line(line(HASH_IDS), 3) == TraceRequest("", "request-3", 2.5, 512, (0, 7), 1100, 6)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**RUNS, "runs": [[4, 1]]}, "ends before it starts"),
        ({**RUNS, "runs": [[1]]}, r"runs\[0\]"),
        ({**RUNS, "runs": [[0, 10**12]]}, str(BLOCKS_MAX)),
        ({**RUNS, "runs": [[1, 400]]}, "more than `in`"),
        ({**RUNS, "runs": 5}, "must be a list"),
        ({**RUNS, "runs": [[True, 2]]}, "True"),
        ({**RUNS, "trace": ""}, "`trace`"),
        ({**RUNS, "in": -1}, "`in`"),
        ({**RUNS, "sub": "x"}, "`sub`"),
        ({**RUNS, "t": None}, "`t`"),
        ({**RUNS, "out": 1.5}, "`out`"),
        ({**HASH_IDS, "hash_ids": [1, -2, 3]}, r"hash_ids\[1\]"),
        ({**HASH_IDS, "hash_ids": [1]}, "need 2 or 3"),
        ({**HASH_IDS, "timestamp": float("nan")}, "`timestamp`"),
        ({**RUNS, **HASH_IDS}, "exactly one"),
        ({"a": 1}, "exactly one"),
        ([1], "not a JSON object"),
    ],
)
def test_a_bad_line_is_named_with_its_file_its_number_and_what_is_wrong(
    row: object, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(line(RUNS) + b"\n\n" + line(row) + b"\n")
    with pytest.raises(InvalidRequest, match=said) as raised:
        list(read_trace(str(path)))
    assert f"{path}, line 3: " in str(raised.value)


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_request_or_an_invalid_request(data: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        parse_line(data, 1)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(base=st.sampled_from([RUNS, HASH_IDS]), data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_value_in_any_field_is_a_request_or_an_invalid_request(
    base: dict[str, object], data: st.DataObject
) -> None:
    field = data.draw(st.sampled_from(sorted(base)))
    row = {**base, field: data.draw(_JSON)}
    with contextlib.suppress(InvalidRequest):
        request = parse_line(line(row), 1)
        assert len(request.block_ids) * request.block_tokens <= request.input_tokens


def test_gzip_and_plain_files_give_the_same_requests(tmp_path: Path) -> None:
    text = b"".join(line({**RUNS, "i": i + 1}) + b"\n" for i in range(50))
    plain, zipped = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_bytes(text)
    zipped.write_bytes(gzip.compress(text))
    assert list(read_trace(str(plain))) == list(read_trace(str(zipped)))


def test_a_truncated_or_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    noise = [{**RUNS, "trace": f"t{i * 7919 % 104729}"} for i in range(3000)]
    data = gzip.compress(b"".join(line(row) + b"\n" for row in noise))
    path = tmp_path / "cut.jsonl.gz"
    middle = len(data) // 2
    for bad in (data[:middle], data[:middle] + b"\xff" * 64 + data[middle + 64 :]):
        path.write_bytes(bad)
        with pytest.raises(InvalidRequest, match=r"cut\.jsonl\.gz, line \d+: "):
            list(read_trace(str(path)))


def test_a_file_that_mixes_formats_is_refused_where_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(line(RUNS) + b"\n" + line(HASH_IDS) + b"\n")
    with pytest.raises(InvalidRequest, match="line 2: another format"):
        list(read_trace(str(path)))


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"nothing\.jsonl"):
        list(read_trace(str(tmp_path / "nothing.jsonl")))


def test_requests_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "late.jsonl"
    path.write_bytes(line(RUNS) + b"\n{broken\n")
    requests = read_trace(str(path))
    assert next(requests).input_tokens == 389
    with pytest.raises(InvalidRequest, match="line 2: not JSON"):
        next(requests)
