"""Extraction: decoding against its definition, probabilities against exact arithmetic, and what public code gets wrong."""

import math
import sys
from decimal import Decimal, getcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.errors import ArgumentError, DependencyError
from pyunlearn.metrics import (
    extraction_likelihood,
    extraction_probability,
    extraction_strength,
    extraction_strength_by_bisection,
    extraction_strength_by_scan,
    log_queries_to_extract,
    rouge_l,
    verbatim_match,
)

getcontext().prec = 400  # of ln p down to 5e-324, the smallest float, 1 - p must keep some
completions = st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=5)
texts = st.lists(st.integers(0, 3), max_size=12)


def decoder(rows, asked=None):
    """Greedy decoding of several completions, of which rows[b][t] says whether token t follows from the true ones before it."""

    def continue_from(prefix_lengths):
        if asked is not None:
            asked.append(prefix_lengths.tolist())
        return [all(row[k:]) for row, k in zip(rows, prefix_lengths, strict=True)]

    return continue_from


# ---------------------------------------------------------------- extraction strength by decoding


@given(completions)
def test_bisection_and_scan_find_what_one_teacher_forced_pass_finds(rows):
    """Exact greedy matches are monotone, so all three agree; bisection in ceil(log2(n + 1)) calls, the scan in n."""
    expected = [extraction_strength(row) for row in rows]
    lengths, asked = [len(row) for row in rows], []
    bisected = extraction_strength_by_bisection(decoder(rows, asked), lengths)
    scanned = extraction_strength_by_scan(decoder(rows), lengths)
    for found in (bisected, scanned):
        np.testing.assert_allclose(found.strength, expected)
        np.testing.assert_allclose(found.prefix, np.array(lengths) * (1 - np.array(expected)))
    assert bisected.calls == len(asked) <= math.ceil(math.log2(max(lengths) + 1))
    assert scanned.calls <= max(lengths)
    assert all(0 <= k <= n for prefixes in asked for k, n in zip(prefixes, lengths, strict=True))


def test_bisection_finds_what_the_prompt_alone_gives_away():
    """Public code never tries prefix 0, and stops at 1 - 1 / n."""
    assert extraction_strength_by_bisection(decoder([[True] * 8]), [8]).strength.tolist() == [1.0]
    assert extraction_strength_by_bisection(decoder([[False] * 8]), [8]).strength.tolist() == [0.0]


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_where_matching_is_not_monotone_bisection_is_a_lower_bound(answers):
    """A looser match may come and go with the prefix: the scan is the definition, bisection finds some prefix that matches."""

    def continue_from(prefix_lengths):
        return [k == len(answers) or answers[k] for k in prefix_lengths.tolist()]

    n = len(answers)
    scanned = extraction_strength_by_scan(continue_from, [n])
    bisected = extraction_strength_by_bisection(continue_from, [n])
    assert scanned.prefix[0] == next((k for k in range(n) if answers[k]), n)
    assert bisected.strength[0] <= scanned.strength[0]
    assert continue_from(bisected.prefix)[0]


def test_a_settled_example_is_asked_with_nothing_to_decode():
    """So that the caller can leave it out of the batch."""
    for search in (extraction_strength_by_bisection, extraction_strength_by_scan):
        asked = []
        search(decoder([[True], [False] * 5 + [True] * 3], asked), [1, 8])
        assert [prefixes[0] for prefixes in asked] == [0] + [1] * (len(asked) - 1)


def test_lengths_and_answers_that_do_not_fit_are_refused():
    """Empty completions, and one answer for several."""
    for search in (extraction_strength_by_bisection, extraction_strength_by_scan):
        with pytest.raises(ArgumentError, match="at least 1 token"):
            search(decoder([[]]), [0])
        with pytest.raises(ArgumentError, match="at least 1 token"):
            search(decoder([]), [])
        with pytest.raises(ArgumentError, match=r"\(2,\), and gave \(\)"):
            search(lambda k: True, [3, 4])


# ---------------------------------------------------------------- extraction likelihood


def overlap(a, b, n):
    grams = [tuple(b[i : i + n]) for i in range(len(b) - n + 1)]
    hits = [tuple(a[i : i + n]) in grams for i in range(len(a) - n + 1)]
    return sum(hits) / len(grams)


@given(st.lists(st.integers(0, 2), min_size=4, max_size=9), st.integers(1, 3), st.integers(0, 100))
def test_extraction_likelihood_is_its_formula(tokens, n, seed):
    """The mean of OV_n over the T - n places to begin."""
    rng = np.random.default_rng(seed)
    written = [rng.integers(0, 3, len(tokens) - t).tolist() for t in range(len(tokens) - n)]
    expected = np.mean([overlap(a, tokens[t:], n) for t, a in enumerate(written)])
    assert extraction_likelihood(tokens, written, n=n) == pytest.approx(expected)


def test_extraction_likelihood_at_its_ends():
    """1 for a perfect echo, however long it goes on; 0 for silence; in between for an echo that stops early."""
    tokens = list(range(8))
    echo = [tokens[t:] for t in range(5)]
    assert extraction_likelihood(tokens, echo, n=3) == 1
    assert extraction_likelihood(tokens, [e + tokens for e in echo], n=3) == 1
    assert extraction_likelihood(tokens, [[]] * 5, n=3) == 0
    assert extraction_likelihood(tokens, [e[:4] for e in echo], n=3) == pytest.approx(
        np.mean([2 / 6, 2 / 5, 2 / 4, 2 / 3, 1])
    )
    with pytest.raises(ArgumentError, match="8 tokens and 4 continuations"):
        extraction_likelihood(tokens, echo[:4], n=3)
    with pytest.raises(ArgumentError, match="more than n = 10"):
        extraction_likelihood(tokens, [])


# ---------------------------------------------------------------- (n, p)-discoverable


@given(st.floats(-200, 0, exclude_max=True), st.integers(0, 30))
def test_extraction_probability_keeps_its_digits(log_likelihood, exponent):
    """Against 400-digit arithmetic: 1 - (1 - p)^n, from p near 1 to p = e^-200, n up to 10^30."""
    n = 10**exponent
    miss = (1 - Decimal(log_likelihood).exp()).ln() * n
    assert float(extraction_probability(log_likelihood, n)) == pytest.approx(float(1 - miss.exp()), rel=1e-9)


@given(st.floats(-100, 0, exclude_max=True), st.floats(1e-6, 1 - 1e-6))
def test_queries_to_extract_inverts_the_probability(log_likelihood, probability):
    """ln n = ln(ln(1 - p) / ln(1 - p_s)), against 400-digit arithmetic."""
    ratio = (1 - Decimal(probability)).ln() / (1 - Decimal(log_likelihood).exp()).ln()
    assert float(log_queries_to_extract(log_likelihood, probability)) == pytest.approx(float(ratio.ln()), abs=1e-9)


def test_what_is_certain_and_what_is_hopeless():
    """p_s = 1 takes one query; e^-1000, which underflows, still has a count, as a logarithm."""
    assert extraction_probability([0.0, -np.inf], 1).tolist() == [1.0, 0.0]
    assert log_queries_to_extract([0.0, -np.inf], 0.5).tolist() == [-np.inf, np.inf]
    assert float(log_queries_to_extract(-1000.0, 0.5)) == pytest.approx(1000 + math.log(math.log(2)))
    assert float(extraction_probability(-800.0, 1e300)) == pytest.approx(math.exp(300 * math.log(10) - 800), rel=1e-9)
    assert extraction_probability([[-1.0], [-2.0]], [1, 2, 3]).shape == (2, 3)


def test_one_query_is_the_likelihood_itself_and_more_are_never_fewer():
    """n = 1 gives p_s; the probability rises with n."""
    x = -np.logspace(-12, 2.5, 40)
    np.testing.assert_allclose(extraction_probability(x, 1), np.exp(x), rtol=1e-9)
    assert (np.diff(extraction_probability(-9.0, np.arange(1, 5000))) > 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: extraction_probability(0.5, 1), "0 or less"),
        (lambda: extraction_probability(math.nan, 1), "NaN"),
        (lambda: extraction_probability(-1, 0), "1 or more"),
        (lambda: log_queries_to_extract(-1, 1.0), "between 0 and 1"),
        (lambda: log_queries_to_extract(1, 0.5), "0 or less"),
    ],
)
def test_probabilities_that_cannot_be_are_refused(call, message):
    """A perplexity in place of a log-likelihood, no query, certainty."""
    with pytest.raises(ArgumentError, match=message):
        call()


# ---------------------------------------------------------------- verbatim match and ROUGE-L


@given(texts, texts)
def test_verbatim_match_is_the_longest_common_run_and_prefix(a, b):
    """By trying every run; the same with the texts swapped."""
    runs = {tuple(b[i:j]) for i in range(len(b) + 1) for j in range(i, len(b) + 1)}
    longest = max(j - i for i in range(len(a) + 1) for j in range(i, len(a) + 1) if tuple(a[i:j]) in runs)
    prefix = max(k for k in range(min(len(a), len(b)) + 1) if a[:k] == b[:k])
    assert verbatim_match(a, b) == (longest, prefix) == verbatim_match(b, a)


def test_a_run_is_contiguous_where_a_subsequence_is_not():
    """Every other word right: ROUGE-L sees half the text, the run is one word."""
    truth, written = ["a", "b", "c", "d", "e", "f", "g", "h"], ["a", "x", "c", "x", "e", "x", "g", "x"]
    assert verbatim_match(written, truth) == (1, 1)
    pytest.importorskip("rouge_score")
    assert rouge_l([" ".join(written)], [" ".join(truth)])[0] == pytest.approx(0.5)


def lcs(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


words = st.lists(st.sampled_from(["aa", "bb", "cc", "dd"]), min_size=1, max_size=8)


@given(words, words)
def test_rouge_l_is_the_longest_common_subsequence_over_the_truth(written, truth):
    """Recall over the words of the truth, and not over those written: rouge-score takes the truth first."""
    pytest.importorskip("rouge_score")
    length = lcs(written, truth)
    pair = [" ".join(written)], [" ".join(truth)]
    assert rouge_l(*pair, measure="recall")[0] == pytest.approx(length / len(truth))
    assert rouge_l(*pair)[0] == pytest.approx(2 * length / (len(written) + len(truth)))


def test_the_stemmer_compares_stems():
    """TOFU's way; MUSE's does not."""
    pytest.importorskip("rouge_score")
    pair = ["he was running"], ["he was runs"]
    assert rouge_l(*pair)[0] == pytest.approx(2 / 3)
    assert rouge_l(*pair, stemmer=True)[0] == 1


def test_a_truth_that_rouge_cannot_see_is_refused():
    """It drops all but Latin letters and digits: a perfect echo in Chinese would score 0, as if forgotten."""
    pytest.importorskip("rouge_score")
    with pytest.raises(ArgumentError, match="truth 1 has no Latin letter"):
        rouge_l(["a", "你好"], ["a", "你好"])
    with pytest.raises(ArgumentError, match='"f1" or "recall"'):
        rouge_l(["a"], ["a"], measure="precision")
    with pytest.raises(ArgumentError, match="equally many, and are 1 and 2"):
        rouge_l(["a"], ["a", "b"])


def test_without_rouge_score_one_sentence_says_how_to_get_it(monkeypatch):
    """Not a traceback about a module."""
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(DependencyError, match=r"pip install 'pyunlearn\[metrics\]'"):
        rouge_l(["a"], ["a"])
