"""Extraction: probabilities agree with exact arithmetic, matches with their definitions."""

import math
import sys
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.errors import ArgumentError, DependencyError
from pyunlearn.metrics import extraction_probability, rouge_l, verbatim_match

getcontext().prec = 400  # of ln p down to 5e-324, the smallest float, 1 - p must keep some
texts = st.lists(st.integers(0, 3), max_size=12)


# ---------------------------------------------------------------- (n, p)-discoverable


@given(st.floats(-200, 0, exclude_max=True), st.integers(0, 30))
def test_extraction_probability_keeps_its_digits(log_likelihood, exponent):
    """1 - (1 - p)^n agrees with 400-digit arithmetic, from p near 1 to p = e^-200 and n up to 10^30."""
    n = 10**exponent
    miss = (1 - Decimal(log_likelihood).exp()).ln() * n
    assert float(extraction_probability(log_likelihood, n)) == pytest.approx(float(1 - miss.exp()), rel=1e-9)


def test_what_is_certain_and_what_is_hopeless():
    """A sure text needs one query, an impossible one is never sampled, and e^-800, which underflows, still has a
    probability."""
    assert extraction_probability([0.0, -np.inf], 1).tolist() == [1.0, 0.0]
    assert float(extraction_probability(-800.0, 1e300)) == pytest.approx(math.exp(300 * math.log(10) - 800), rel=1e-9)
    assert extraction_probability([[-1.0], [-2.0]], [1, 2, 3]).shape == (2, 3)


def test_one_query_is_the_likelihood_itself_and_more_are_never_fewer():
    """One query returns the likelihood, and the probability rises with n."""
    x = -np.logspace(-12, 2.5, 40)
    np.testing.assert_allclose(extraction_probability(x, 1), np.exp(x), rtol=1e-9)
    assert (np.diff(extraction_probability(-9.0, np.arange(1, 5000))) > 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: extraction_probability(0.5, 1), "0 or less"),
        (lambda: extraction_probability(math.nan, 1), "NaN"),
        (lambda: extraction_probability(-1, 0), "1 or more"),
    ],
)
def test_probabilities_that_cannot_be_are_refused(call, message):
    """A perplexity in place of a log-likelihood, NaN and no query are refused."""
    with pytest.raises(ArgumentError, match=message):
        call()


# ---------------------------------------------------------------- verbatim match and ROUGE-L


@given(texts, texts)
def test_verbatim_match_is_the_longest_common_run_and_prefix(a, b):
    """The longest run and prefix agree with trying every run, and do not depend on the order of the texts."""
    runs = {tuple(b[i:j]) for i in range(len(b) + 1) for j in range(i, len(b) + 1)}
    longest = max(j - i for i in range(len(a) + 1) for j in range(i, len(a) + 1) if tuple(a[i:j]) in runs)
    prefix = max(k for k in range(min(len(a), len(b)) + 1) if a[:k] == b[:k])
    assert verbatim_match(a, b) == (longest, prefix) == verbatim_match(b, a)


def test_token_ids_of_a_tensor_match_by_their_numbers():
    """As `generate` returns them, and against a list; the ids of several texts are refused."""
    written, truth = [9, 5, 6, 7, 8], [1, 2, 5, 6, 7]
    assert verbatim_match(torch.tensor(written), torch.tensor(truth)) == verbatim_match(written, truth) == (3, 0)
    assert verbatim_match(torch.tensor(written), truth) == (3, 0)
    with pytest.raises(ArgumentError, match="written must be the tokens of one text"):
        verbatim_match(torch.tensor([written]), truth)


def test_a_run_is_contiguous_where_a_subsequence_is_not():
    """With every other word right ROUGE-L is one half, and the longest run one word."""
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
    """Recall divides by the words of the truth, not by those written, although rouge-score takes the truth first."""
    pytest.importorskip("rouge_score")
    length = lcs(written, truth)
    pair = [" ".join(written)], [" ".join(truth)]
    assert rouge_l(*pair, measure="recall")[0] == pytest.approx(length / len(truth))
    assert rouge_l(*pair)[0] == pytest.approx(2 * length / (len(written) + len(truth)))


def test_the_stemmer_compares_stems():
    """The stemmer, used by TOFU and not by MUSE, makes different forms of a word equal."""
    pytest.importorskip("rouge_score")
    pair = ["he was running"], ["he was runs"]
    assert rouge_l(*pair)[0] == pytest.approx(2 / 3)
    assert rouge_l(*pair, stemmer=True)[0] == 1


def test_a_truth_that_rouge_cannot_see_is_refused():
    """A truth in Chinese is refused: rouge-score ignores it, and a perfect copy would score 0, as if forgotten."""
    pytest.importorskip("rouge_score")
    with pytest.raises(ArgumentError, match="truth 1 has no Latin letter"):
        rouge_l(["a", "你好"], ["a", "你好"])
    with pytest.raises(ArgumentError, match="'f1' or 'recall'"):
        rouge_l(["a"], ["a"], measure="precision")
    with pytest.raises(ArgumentError, match="same texts, got 1 and 2"):
        rouge_l(["a"], ["a", "b"])


def test_without_rouge_score_one_sentence_says_how_to_get_it(monkeypatch):
    """The error says how to install rouge-score."""
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(DependencyError, match="run `pip install rouge-score`"):
        rouge_l(["a"], ["a"])
