"""Memory of many records: token ids, results and result.json as arrays and in parts, not as objects."""

import copy
import json
import pickle
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.data import Tokens
from pyunlearn.data.lazy import LazyList, json_parts
from pyunlearn.data.token_ids import TokenIds

LARGEST = 2**31 - 1
ids = st.lists(st.integers(0, LARGEST), min_size=2, max_size=6).map(tuple)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(ids, ids, st.slices(6))
def test_token_ids_are_those_of_the_tuple(a, b, at):
    """They compare, hash, slice, count and print alike, and a slice is a tuple."""
    packed = TokenIds(a)
    assert (packed == b) == (b == packed) == (packed == TokenIds(b)) == (a == b)
    assert {a: 1}[packed] == {packed: 1}[a] == 1
    assert packed[at] == a[at]
    assert isinstance(packed[at], tuple)
    assert (tuple(packed), len(packed), packed[-1], repr(packed)) == (a, len(a), a[-1], repr(a))
    assert packed.array.tolist() == list(a)
    assert packed != list(a)


@given(ids, ids)
def test_tokens_compare_and_hash_by_their_ids(a, b):
    """Also copied, pickled, or with another field replaced."""
    tokens = Tokens(a, 1)
    assert (tokens == Tokens(b, 1)) == (a == b)
    assert {tokens, Tokens(list(a), 1), copy.deepcopy(tokens), pickle.loads(pickle.dumps(tokens))} == {tokens}
    assert replace(replace(tokens, ids=b), ids=a) == tokens
    assert Tokens(a, 0, b) == Tokens(TokenIds(a), 0, TokenIds(b))


def test_a_token_id_takes_four_bytes():
    """And a text 200 more: in a tuple each takes eight, and 28 more as a number."""
    tracemalloc.start()
    texts = [Tokens(range(start, start + 1000), first=1) for start in range(10_000, 110_000, 1000)]
    size = tracemalloc.get_traced_memory()[0] / len(texts)
    tracemalloc.stop()
    assert size <= 4 * 1000 + 200


def test_a_lazy_list_is_that_of_its_items():
    """It compares as a list does, from either side; a copy and a pickle are lists."""
    lazy = LazyList(3, lambda i: {"i": i})
    same = [{"i": 0}, {"i": 1}, {"i": 2}]
    assert lazy == same
    assert same == lazy
    assert lazy != same[:2]
    assert lazy != (*same,)
    assert copy.deepcopy(lazy) == pickle.loads(pickle.dumps(lazy)) == same
    assert isinstance(copy.deepcopy(lazy), list)
    assert [*lazy, *lazy[1:]] == [*same, *same[1:]]
    with pytest.raises(IndexError):
        lazy[3]


@given(st.dictionaries(st.text(), values, min_size=1, max_size=3), st.lists(values, max_size=3))
def test_json_in_parts_is_that_of_json_dumps(content, items):
    """Byte for byte, with a LazyList as the list of its items."""
    lazy = {**content, "examples": LazyList(len(items), items.__getitem__), "settings": content}
    whole = {**content, "examples": items, "settings": content}
    assert "".join(json_parts(lazy)) == json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "peak", "end"),
    [("forget set, with a retain set of 1,000", 1300, 700), ("forget set, without other texts", 1000, 650)],
)
def test_a_record_takes_little_more_than_its_text(name, peak, end):
    """Bytes of Python's objects and arrays over a run that saves its result, and at its end; a text has about 160.

    With ids in tuples, results as objects, or result.json as one string there are more.
    """
    sys.path.append(str(Path(__file__).parent.parent))  # last: the package is the installed one
    from benchmarks.memory import RECORDS, measured_records

    few, many = (measured_records(RECORDS[name], n, traced=True) for n in (1500, 4500))
    assert (many["objects peak"] - few["objects peak"]) / 3000 <= peak
    assert (many["objects end"] - few["objects end"]) / 3000 <= end
