"""Token ids on the command line, and token ids made from a name.

Owns the spelling of lists: `1,2,3`, ranges `0..4095` (both ends included), a file (JSON array or
numbers separated by blanks or commas), `-` for stdin. A key stands for an endless list of token
ids made from it, so that a file can be stored under a name.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from dualpath.transfer.errors import InvalidRequest

TOKENS_MAX = 16 << 20
TOKEN_ID_MAX = 2**32 - 1
_DIGEST_TOKENS = struct.Struct("<8I")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def parse_tokens(text: str) -> Sequence[int]:
    """Token ids of a list, a range, a file's name or `-`. Raises InvalidRequest."""
    if text == "-":
        return _numbers(sys.stdin.read(), "stdin")
    if _RANGE.fullmatch(text) or re.fullmatch(r"[\d\s,.]+", text):
        return _numbers(text, "--tokens")
    path = Path(text)
    try:
        return _numbers(path.read_text(encoding="utf-8"), text)
    except OSError as error:
        raise InvalidRequest(
            f"--tokens: '{text}' is neither a list such as 1,2,3 or 0..4095 nor a file that can "
            f"be read: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"--tokens: {text} is not a text file") from error


def tokens_of_key(key: str, count: int) -> Sequence[int]:
    """The first `count` token ids that stand for `key`; the same everywhere, for ever."""
    if not key:
        raise InvalidRequest("--key is empty")
    seed = hashlib.sha256(b"dualpath-key-1\0" + key.encode()).digest()
    tokens: list[int] = []
    for index in range(-(-count // 8)):
        tokens += _DIGEST_TOKENS.unpack(hashlib.sha256(seed + struct.pack("<Q", index)).digest())
    return tokens[:count]


def _numbers(text: str, where: str) -> Sequence[int]:
    stripped = text.strip()
    if stripped.startswith("["):
        tokens = _json_numbers(stripped, where)
    else:
        tokens = []
        for word in re.split(r"[\s,]+", stripped):
            tokens += _word(word, where) if word else ()
            if len(tokens) > TOKENS_MAX:
                raise InvalidRequest(f"{where}: more than {TOKENS_MAX} tokens")
    wrong = next((token for token in tokens if not 0 <= token <= TOKEN_ID_MAX), None)
    if wrong is not None:
        raise InvalidRequest(f"{where}: token id {wrong} is outside of 0..{TOKEN_ID_MAX}")
    if not tokens:
        raise InvalidRequest(f"{where}: no token ids")
    return tokens


def _word(word: str, where: str) -> Sequence[int]:
    if match := _RANGE.fullmatch(word):
        first, last = int(match.group(1)), int(match.group(2))
        if not first <= last < first + TOKENS_MAX:
            raise InvalidRequest(f"{where}: '{word}' is not a range of 1..{TOKENS_MAX} tokens")
        return range(first, last + 1)
    if not word.isdecimal():
        raise InvalidRequest(f"{where}: '{word}' is not a token id")
    return (int(word),)


def _json_numbers(text: str, where: str) -> list[int]:
    try:
        tokens = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"{where}: not a JSON array: {error}") from error
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise InvalidRequest(f"{where}: the JSON must be one flat array of whole numbers")
    if len(tokens) > TOKENS_MAX:
        raise InvalidRequest(f"{where}: {len(tokens)} tokens, at most {TOKENS_MAX}")
    return tokens
