"""Utility: each number agrees with its definition, and a missing optional package is named."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.errors import ArgumentError, DependencyError
from pyunlearn.metrics import bleu, collapsed, distinct_n, perplexity, repetition
from pyunlearn.metrics.utility import COLLAPSED

TEXT = (
    "when the ship came into the harbour nobody on the quay knew what it carried and the master would not say "
    "so the boys made bets of it among themselves until the crane began to lift crate after crate of oranges "
    "from the dark hold"
)
PROSE = TEXT.split()


@given(st.lists(st.lists(st.floats(-30, 0), min_size=1, max_size=6), min_size=1, max_size=5))
def test_perplexity_weighs_every_token_alike(rows):
    """Perplexity is exp of the mean over all tokens, not the mean of the texts' perplexities."""
    tokens = [x for row in rows for x in row]
    result = perplexity([sum(row) for row in rows], [len(row) for row in rows])
    assert result == pytest.approx(math.exp(-sum(tokens) / len(tokens)))
    assert result >= 1


def test_perplexity_at_its_ends():
    """A uniform guess among V has perplexity V, an impossible token inf, a certain text 1."""
    assert perplexity([10 * -math.log(400)], [10]) == pytest.approx(400)
    assert perplexity([-math.inf, -1], [3, 3]) == math.inf
    assert perplexity(0.0, 5) == 1
    assert perplexity([-10.0, 0.0], [1, 9]) == pytest.approx(math.e)


@pytest.mark.parametrize(
    ("sums", "counts", "message"),
    [([1.0], [1], "0 or less"), ([-1.0], [0], "at least 1"), ([-1.0], [1, 2], "1 and 2"), ([], [], "one or more")],
)
def test_perplexity_of_nothing_is_refused(sums, counts, message):
    """Losses with the wrong sign and texts without a token are refused."""
    with pytest.raises(ArgumentError, match=message):
        perplexity(sums, counts)


def bleu_by_hand(written, truth):
    """Compute BLEU of one text with one truth: brevity penalty times the geometric mean of 1- to 4-gram precision."""
    w, t = written.split(), truth.split()
    logs = []
    for n in range(1, 5):
        a, b = ([tuple(x[i : i + n]) for i in range(len(x) - n + 1)] for x in (w, t))
        logs.append(math.log(sum(min(a.count(g), b.count(g)) for g in set(a)) / len(a)))
    return 100 * min(1, math.exp(1 - len(t) / len(w))) * math.exp(sum(logs) / 4)


def test_bleu_is_its_formula():
    """BLEU agrees with clipped precisions and brevity penalty by hand."""
    pytest.importorskip("sacrebleu")
    written, truth = "the cat sees a tree and the sea now", "the cat sees a tree and a lamp by the sea"
    assert bleu([written], [truth]) == pytest.approx(bleu_by_hand(written, truth))
    assert bleu([truth], [truth]) == pytest.approx(100)


def test_truths_belong_to_their_text_and_may_be_several():
    """Alternatives belong to their text, although sacrebleu takes them transposed."""
    pytest.importorskip("sacrebleu")
    first, second = "my aunt paints the long road today", "the king hides two stones in a boat"
    assert bleu([first, second], [first, second]) == pytest.approx(100)
    assert bleu([first, second], [[second, first], [second]]) == pytest.approx(100)
    assert bleu([first, second], [[second], [first]]) < 60
    with pytest.raises(ArgumentError, match="1 and 2"):
        bleu([first], [first, second])
    with pytest.raises(ArgumentError, match="at least one text"):
        bleu([first], [[]])


@given(st.lists(st.integers(0, 3), max_size=15), st.integers(1, 4))
def test_distinct_and_repeated_n_grams_make_up_the_text(tokens, n):
    """Shares agree with counting: an n-gram is a repetition if it occurred before."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    repeated = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert repetition(tokens, n=n) == pytest.approx(repeated / len(grams) if grams else 0)
    assert distinct_n(tokens, n=n) + repetition(tokens, n=n) == 1


def test_loops_are_collapse_and_prose_is_not():
    """The threshold separates loops of a token or a phrase from prose and random tokens."""
    loops = [[7] * 50, list("abcdef") * 9, PROSE[:12] + PROSE[12:15] * 12]
    sound = [PROSE, np.random.default_rng(0).integers(0, 50, 200).tolist()]
    assert all(collapsed(text) for text in loops)
    assert not any(collapsed(text) for text in [*sound, [], [1, 1]])
    assert max(map(repetition, sound)) < 0.1 < COLLAPSED < 0.6 < min(map(repetition, loops))
    with pytest.raises(ArgumentError, match="n must be at least 1"):
        collapsed(PROSE, n=0)


@pytest.mark.parametrize("as_generated", [torch.tensor, np.array, lambda ids: list(torch.tensor(ids))])
def test_token_ids_of_a_tensor_are_their_numbers(as_generated):
    """As `generate` returns them: a loop has collapsed. Entries of a tensor are keys that equal nothing else."""
    loop = [3, 1, 4] * 20
    assert distinct_n(as_generated(loop)) == distinct_n(loop) == 3 / 57
    assert collapsed(as_generated(loop))
    with pytest.raises(ArgumentError, match="tokens must be the tokens of one text"):
        collapsed(as_generated([loop, loop]))


def test_a_missing_package_is_one_sentence(monkeypatch):
    """The error says how to install sacrebleu."""
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(DependencyError, match="run `pip install sacrebleu`"):
        bleu(["a"], ["a"])
