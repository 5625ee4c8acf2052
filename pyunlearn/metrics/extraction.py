"""Extraction: what a model writes of a text when it is asked, by decoding or by sampling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pyunlearn.errors import ArgumentError, DependencyError
from pyunlearn.metrics._arrays import Booleans, Floats, Integers, log_likelihoods, same_length

ContinueFrom = Callable[[Integers], Any]


class GreedyExtraction(NamedTuple):
    """What decoding found for each of B completions, and at what cost."""

    strength: Floats
    """(B,) 1 - prefix / length, 0 to 1; high = extractable."""
    prefix: Integers
    """(B,) the shortest prefix found from which the rest was written."""
    calls: int
    """How often `continue_from` was called."""


def extraction_strength_by_bisection(continue_from: ContinueFrom, lengths: ArrayLike) -> GreedyExtraction:
    """Extraction strength from greedy decoding, in at most ceil(log2(length + 1)) batched calls.

    Bisection assumes that matchability is monotone: if the rest is written after k tokens, it is after k + 1. Exact greedy matches are, but for
    rounding that differs with the batch; a looser match (ROUGE above a threshold) need not be, and then `prefix` is one that matches, with
    one before it that does not, but perhaps not the shortest: the strength is a lower bound of that of the scan. Prefix 0 is tried as
    well: public code leaves it out, and never finds a completion that the prompt alone gives away (strength 1).

    Args:
        continue_from: takes (B,) prefix lengths and returns (B,) whether greedy decoding after the prompt and that many true tokens
            writes the rest of each completion. An example that is settled is asked with its whole length: nothing to decode.
        lengths: (B,) tokens of each completion, 1 or more.

    Returns:
        GreedyExtraction.

    Raises:
        ArgumentError: a length below 1, or an answer of another shape.

    Source: Wang et al. 2024, arXiv 2406.09179 and its code.
    """
    length = _lengths(lengths)
    low, high, calls = np.zeros_like(length), length.copy(), 0
    while (open_ := low < high).any():
        middle = (low + high) // 2
        match = _ask(continue_from, np.where(open_, middle, length))
        calls += 1
        high = np.where(open_ & match, middle, high)
        low = np.where(open_ & ~match, middle + 1, low)
    return GreedyExtraction(1 - high / length, high, calls)


def extraction_strength_by_scan(continue_from: ContinueFrom, lengths: ArrayLike) -> GreedyExtraction:
    """Extraction strength from greedy decoding, by its definition: every prefix from 0 on, until the rest is written.

    It assumes nothing, and takes up to as many batched calls as the longest completion has tokens.

    Args:
        continue_from, lengths: as in `extraction_strength_by_bisection`.

    Returns:
        GreedyExtraction.

    Raises:
        ArgumentError: a length below 1, or an answer of another shape.

    Source: Carlini et al. 2021, arXiv 2012.07805; Wang et al. 2024, arXiv 2406.09179.
    """
    length = _lengths(lengths)
    prefix, found, calls = length.copy(), np.zeros(length.shape, dtype=np.bool_), 0
    for k in range(int(length.max())):
        if not (open_ := ~found & (k < length)).any():
            break
        match = open_ & _ask(continue_from, np.where(open_, k, length))
        calls += 1
        prefix, found = np.where(match, k, prefix), found | match
    return GreedyExtraction(1 - prefix / length, prefix, calls)


def _lengths(lengths: ArrayLike) -> Integers:
    found = np.atleast_1d(np.asarray(lengths, dtype=np.int64))
    if found.ndim != 1 or found.size == 0 or (found < 1).any():
        raise ArgumentError(f"lengths must be one or more numbers of at least 1 token, got {found.tolist()}.")
    return found


def _ask(continue_from: ContinueFrom, prefix_lengths: Integers) -> Booleans:
    found = np.asarray(continue_from(prefix_lengths), dtype=np.bool_)
    if found.shape != prefix_lengths.shape:
        raise ArgumentError(f"continue_from must answer for each of {prefix_lengths.shape}, and gave {found.shape}.")
    return found


def n_grams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """Every run of n tokens, in order, as often as it stands there. Raises ArgumentError when n is below 1."""
    if n < 1:
        raise ArgumentError(f"n must be at least 1 token, and is {n}.")
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def extraction_likelihood(tokens: Sequence[int], continuations: Sequence[Sequence[int]], *, n: int = 10) -> float:
    """How much of a text's rest the model writes, on average over all places to begin.

        EL_n(x) = 1 / (T - n) sum over t = 1..T-n of OV_n(f(x_<t), x_>=t)
        OV_n(a, b) = #{n-grams of a, each as often as it stands there, that are among those of b} / #{n-grams of b}

    f decodes greedily. A continuation is cut to the length of what it should be, so OV_n is at most 1; one that ends early loses what it did
    not write. A continuation that repeats one n-gram of the text counts it every time, as in the source's code: see `repetition`.

    Args:
        tokens: T token ids, more than n.
        continuations: T - n of them; the t-th (from 0) is what the model writes after the first t tokens.
        n: length of the n-grams; 10 in the source.

    Returns:
        0 to 1. High = extractable.

    Raises:
        ArgumentError: a text of n tokens or fewer, or another number of continuations.

    Source: Jang et al. 2022, arXiv 2210.01504.
    """
    terms = len(tokens) - n
    if n < 1 or terms < 1 or len(continuations) != terms:
        raise ArgumentError(
            f"extraction_likelihood needs more than n = {n} >= 1 tokens and a continuation for each of the first T - n: got {len(tokens)} tokens "
            f"and {len(continuations)} continuations."
        )
    total = 0.0
    for t, continuation in enumerate(continuations):
        rest = n_grams(tokens[t:], n)
        known = set(rest)
        written = n_grams(continuation[: len(tokens) - t], n)
        total += sum(gram in known for gram in written) / len(rest)
    return total / terms


def extraction_probability(log_likelihood: ArrayLike, queries: ArrayLike) -> Floats:
    """The probability that at least one of n samples is the text: a text is (n, p)-discoverable if it is p or more.

        1 - (1 - p_s)^n,    p_s = exp(sum over t of ln p_t)

    In the log domain, so that it keeps its digits for p_s near 0 (where 1 - p_s rounds to 1) and near 1.

    Args:
        log_likelihood: (...) the *sum* over the text's tokens under the scheme that samples (temperature, top-k), nats. A mean, or the
            plain model's likelihood under another scheme, answers another question.
        queries: (...) n, 1 or more; broadcast.

    Returns:
        (...), 0 to 1. High = extractable.

    Raises:
        ArgumentError: log-likelihoods above 0 or NaN, fewer than 1 query.

    Source: Hayes et al. 2024, arXiv 2410.19482, definition of (n, p)-discoverable extraction.
    """
    n = np.asarray(queries, dtype=np.float64)
    if not (n >= 1).all():
        raise ArgumentError("queries must be 1 or more, got fewer or NaN.")
    with np.errstate(over="ignore"):
        return np.asarray(-np.expm1(-np.exp(np.log(n) + _log_hazard(log_likelihood))))


def log_queries_to_extract(log_likelihood: ArrayLike, probability: ArrayLike) -> Floats:
    """The natural logarithm of how many samples make it as likely as `probability` that one of them is the text.

        ln n = ln( ln(1 - p) / ln(1 - p_s) )

    Args:
        log_likelihood: (...) as in `extraction_probability`.
        probability: (...) p, above 0 and below 1; broadcast.

    Returns:
        (...) ln n; the smallest number of queries is ceil(exp(ln n)), at least 1. Low = extractable; -inf for p_s = 1, inf for p_s = 0. As a
        logarithm, for n soon exceeds any float: a text of 500 tokens at 2 nats each takes e^1000.

    Raises:
        ArgumentError: log-likelihoods above 0 or NaN, a probability outside (0, 1).

    Source: Hayes et al. 2024, arXiv 2410.19482.
    """
    p = np.asarray(probability, dtype=np.float64)
    if not ((p > 0) & (p < 1)).all():
        raise ArgumentError("probability must lie between 0 and 1, both left out.")
    return np.asarray(np.log(-np.log1p(-p)) - _log_hazard(log_likelihood))


def _log_hazard(log_likelihood: ArrayLike) -> Floats:
    """ln(-ln(1 - e^x)) for x <= 0, to full precision."""
    x = log_likelihoods(log_likelihood, "log_likelihood")
    with np.errstate(divide="ignore"):
        near_one = -np.log(-np.expm1(np.maximum(x, -1.0)))  # e^x near 1: 1 - e^x is -expm1(x)
        near_zero = -np.log1p(-np.exp(np.minimum(x, -1.0)))
        # below e^-37, -ln(1 - p) = p to the last digit, and p itself may underflow
        return np.where(x < -37, x, np.log(np.where(x > -1.0, near_one, near_zero)))


class VerbatimMatch(NamedTuple):
    """Tokens, 0 or more; high = memorized. 50 in a row is the usual mark of an extraction (arXiv 2012.07805, 2202.07646)."""

    longest: int
    """The longest run of tokens that stands in both texts, anywhere."""
    prefix: int
    """Tokens that agree from the first on."""


def verbatim_match(written: Sequence[Hashable], truth: Sequence[Hashable]) -> VerbatimMatch:
    """How many tokens in a row a model has written of a text: the longest run, and the common prefix.

    A run is contiguous in both, unlike the subsequence of ROUGE-L, which any two texts of a language share in part.

    Args:
        written, truth: tokens (ids, words, characters), any length.

    Returns:
        VerbatimMatch, from 0 to the shorter length.

    Source: Carlini et al. 2021, arXiv 2012.07805.
    """
    places: dict[Hashable, list[int]] = {}
    for j, token in enumerate(truth):
        places.setdefault(token, []).append(j)
    longest, ending = 0, Counter[int]()  # ending[j]: length of the run that ends at this token and at truth[j]
    for token in written:
        ending = Counter({j: ending[j - 1] + 1 for j in places.get(token, ())})
        longest = max(longest, *ending.values()) if ending else longest
    pairs = zip(written, truth, strict=False)
    prefix = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(written), len(truth)))
    return VerbatimMatch(longest, prefix)


def rouge_l(written: Sequence[str], truth: Sequence[str], *, measure: str = "f1", stemmer: bool = False) -> Floats:
    """ROUGE-L of each text that a model wrote against the true one, by rouge-score.

    With L the longest common subsequence of words: recall = L / words of the truth, precision = L / words written, F1 their harmonic mean.
    MUSE takes f1 without a stemmer (arXiv 2407.06460), TOFU recall with one (arXiv 2401.06121): numbers of the two do not compare.

    Args:
        written, truth: B texts each.
        measure: "f1" or "recall".
        stemmer: whether words are compared by their Porter stems.

    Returns:
        (B,), 0 to 1. High = memorized.

    Raises:
        ArgumentError: an unknown measure, numbers of texts that differ, or a truth without a Latin letter or digit: rouge-score drops every
            other character, so the score would be 0 whatever was written.
        DependencyError: rouge-score is not installed.

    Source: Lin 2004; rouge-score, whose `score` takes the truth first (swapped, recall is precision).
    """
    if measure not in ("f1", "recall"):
        raise ArgumentError(f'measure must be "f1" or "recall", got {measure!r}.')
    same_length(written, truth, "written and truth")
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise DependencyError(
            "rouge_l needs the package rouge-score, which is not installed: pip install 'pyunlearn[metrics]'."
        ) from error
    blank = np.array([not any(c.isascii() and c.isalnum() for c in text) for text in truth], dtype=np.bool_)
    if blank.any():
        raise ArgumentError(
            f"truth {int(np.flatnonzero(blank)[0])} has no Latin letter or digit, and rouge-score sees no others: compare tokens, with verbatim_match."
        )
    scorer = RougeScorer(["rougeL"], use_stemmer=stemmer)
    found = [scorer.score(true, wrote)["rougeL"] for wrote, true in zip(written, truth, strict=True)]
    return np.array([f.recall if measure == "recall" else f.fmeasure for f in found], dtype=np.float64)
