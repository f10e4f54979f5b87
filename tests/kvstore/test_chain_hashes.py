"""Chain hashes: fixed vectors, and what they promise."""

from __future__ import annotations

import subprocess
import sys

import pytest
from dualpath.kvstore.chain import algorithms, chain_hashes, parents_of
from dualpath.transfer.errors import InvalidRequest
from hypothesis import given
from hypothesis import strategies as st

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


@pytest.mark.parametrize(
    ("algorithm", "root", "expected"),
    [
        ("sha256", "", "670598ae108ff14109095ef76c6c703e89123755457199e369c7be129ad45615"),
        ("sha256", "tenant-1", "4ef345e77ff9cb2aa5b1626abea37ba0256563751f7b8f0b592d4a1fea8daf26"),
        ("xxh3_128", "", "e56e7267ff2934f7688f07eee3e412a9"),
    ],
)
def test_the_hashes_of_known_tokens_never_change(algorithm: str, root: str, expected: str) -> None:
    found = chain_hashes(range(12), 4, algorithm=algorithm, root=root)
    assert found[-1].hex() == expected


def test_another_process_finds_the_same_hashes() -> None:
    code = (
        "from dualpath.kvstore.chain import chain_hashes\n"
        "print(chain_hashes([1, 2, 3, 4], 2, extra=b'image')[-1].hex())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    assert out.stdout.decode().strip() == chain_hashes([1, 2, 3, 4], 2, extra=b"image")[-1].hex()


@given(TOKENS, TOKENS, st.integers(1, 8))
def test_prompts_share_exactly_the_blocks_of_their_common_prefix(
    a: list[int], b: list[int], size: int
) -> None:
    common = 0
    while common < min(len(a), len(b)) and a[common] == b[common]:
        common += 1
    first, second = chain_hashes(a, size), chain_hashes(b, size)
    assert len(first) == len(a) // size
    shared = common // size
    assert first[:shared] == second[:shared]
    assert not set(first[shared:]) & set(second[shared:])


@given(TOKENS.filter(lambda tokens: len(tokens) >= 8))
def test_root_extra_block_size_and_algorithm_part_chains(tokens: list[int]) -> None:
    heads = {
        chain_hashes(tokens, 4)[0],
        chain_hashes(tokens, 8)[0],
        chain_hashes(tokens, 4, root="r")[0],
        chain_hashes(tokens, 4, extra=b"r")[0],
        chain_hashes(tokens, 4, algorithm="xxh3_128")[0],
    }
    assert len(heads) == 5


def test_parents_start_with_the_empty_one() -> None:
    hashes = chain_hashes(range(8), 2)
    assert parents_of(hashes) == [b"", *hashes[:3]]
    assert parents_of([]) == []


def test_bad_input_names_the_value() -> None:
    with pytest.raises(InvalidRequest, match=r"md5.*sha256"):
        chain_hashes([1], 1, algorithm="md5")
    with pytest.raises(InvalidRequest, match="positive, not 0"):
        chain_hashes([1], 0)
    for tokens in ([-1], [1.5], [[1], [2]], ["a"], [2**64]):
        with pytest.raises(InvalidRequest, match="token ids"):
            chain_hashes(tokens, 1)  # type: ignore[arg-type]


def test_blake3_is_offered_only_where_it_is_installed() -> None:
    if "blake3" in algorithms():
        assert len(chain_hashes([1], 1, algorithm="blake3")[0]) == 32
    else:
        with pytest.raises(InvalidRequest, match="pip install blake3"):
            chain_hashes([1], 1, algorithm="blake3")
