"""Hypothesis strategies for untrusted input: valid files with a few mutations, and noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

# critical lengths and counts: zero, sign bits, one too many, and the largest value of a field
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1]


@st.composite
def mutated(draw: st.DrawFn, valid: Sequence[bytes]) -> bytes:
    """One of these files after one to six mutations, or occasionally noise."""
    data = draw(st.sampled_from(valid))
    if not draw(st.integers(0, 19)):
        return draw(st.binary(max_size=400))
    for _ in range(draw(st.integers(1, 6))):
        data = _mutate(draw, data, valid)
    return data


# not a strategy, because Hypothesis keeps strategies together with their arguments
def _mutate(draw: st.DrawFn, data: bytes, valid: Sequence[bytes]) -> bytes:
    # half of the mutations are in the header, where they matter most
    end = min(len(data), 600) if draw(st.booleans()) else len(data)
    at = draw(st.integers(0, end))
    kind = draw(st.sampled_from(("bytes", "number", "truncate", "delete", "repeat", "insert", "splice", "bit")))
    if kind == "bytes":
        new = draw(st.binary(min_size=1, max_size=16))
        return data[:at] + new + data[at + len(new) :]
    if kind == "number":
        size, order = draw(st.sampled_from((1, 2, 4, 8))), draw(st.sampled_from(("little", "big")))
        number = draw(st.sampled_from(NUMBERS)) % 2 ** (8 * size)
        return data[:at] + number.to_bytes(size, order) + data[at + size :]
    if kind == "truncate":
        return data[:at]
    if kind == "insert":
        return data[:at] + draw(st.binary(min_size=1, max_size=64)) + data[at:]
    if kind == "splice":
        other = draw(st.sampled_from(valid))
        return data[:at] + other[draw(st.integers(0, len(other))) :]
    if kind == "bit" and data:
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
    length = draw(st.integers(1, 256))
    return data[:at] + (data[at : at + length] * 2 if kind == "repeat" else b"") + data[at + length :]


def json_values(strings: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """Any JSON value, including numbers out of range."""
    numbers = st.integers() | st.sampled_from([*NUMBERS, -1, 10**40]) | st.floats() | st.booleans()
    leaves = st.none() | numbers | strings | st.text(max_size=20)
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    )
