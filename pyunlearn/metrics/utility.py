"""Utility: what a model is still good for, on text that must survive."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from pyunlearn.errors import ArgumentError, missing_packages
from pyunlearn.metrics._check import as_floats, lists_of_texts, log_likelihoods, same_length, tokens_of_text

COLLAPSED = 0.5
"""Share of repeated 4-grams above which a text counts as collapsed. Human text has about 0.006 in arXiv 1908.04319."""


def perplexity(log_likelihood: ArrayLike, tokens: ArrayLike) -> float:
    """Compute the perplexity of a corpus: exp of the mean negative log-likelihood per token.

        exp(- sum over i of L_i / sum over i of T_i)

    Long texts weigh more than short ones: it is not the mean of the texts' perplexities, which one outlier dominates.

    Args:
        log_likelihood: (B,) summed log-likelihood L_i of each text, nats.
        tokens: (B,) scored tokens T_i of each: those that have a log-likelihood, for a plain text one fewer than its
            tokens.

    Returns:
        1 or more; inf where a token has probability 0. Low = good.

    Raises:
        ArgumentError: a log-likelihood above 0 or NaN, a text without a scored token, arrays of different lengths.

    Example:
        >>> import math
        >>> round(perplexity([-10 * math.log(4), -2 * math.log(4)], [10, 2]), 6)
        4.0

    See Also:
        aggregate_interval: `aggregate_interval(perplexity, log_likelihood, tokens)` adds an interval.

    Source: Jelinek et al. 1977, J. Acoust. Soc. Am. 62, S63.
    """
    sums, counts = map(np.atleast_1d, (log_likelihoods("log_likelihood", log_likelihood), as_floats("tokens", tokens)))
    same_length("log_likelihood", sums, "tokens", counts)
    if counts.size == 0 or (counts < 1).any():
        raise ArgumentError("tokens must be at least 1 for each of one or more texts: leave out texts without any")
    with np.errstate(over="ignore"):
        return float(np.exp(-sums.sum() / counts.sum()))


def bleu(written: Sequence[str], truth: Sequence[str | Sequence[str]]) -> float:
    """Compute corpus BLEU of texts that a model wrote, by sacrebleu.

    sacrebleu's defaults: 13a tokens, exponential smoothing. A corpus score is not the mean of sentence scores.

    Args:
        written: B texts.
        truth: B true texts, or lists of alternatives, whose numbers may differ. In this order: sacrebleu itself takes
            them transposed, and scores the wrong pairs silently where they are not.

    Returns:
        0 to 100. High = like the truth.

    Raises:
        ArgumentError: no text, numbers of texts that differ, a text without alternative.
        DependencyError: sacrebleu is not installed.

    Example:
        >>> round(bleu(["my aunt paints the long road today"], ["my aunt paints the long road today"]))
        100

    See Also:
        aggregate_interval: `aggregate_interval(bleu, written, truth)` adds an interval (Koehn 2004).

    Source: Papineni et al. 2002; Post 2018, arXiv 1804.08771.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise missing_packages("bleu", "sacrebleu") from error
    lists_of_texts(written=written)
    if isinstance(truth, str):
        raise ArgumentError("truth must be a list of texts, or of lists of alternatives, got one string")
    same_length("written", written, "truth", truth)
    every = [[t] if isinstance(t, str) else list(t) for t in truth]
    if not every or not all(every):
        raise ArgumentError("truth must have at least one text for each of one or more written texts")
    # sacrebleu takes the k-th alternative of every text together, None where a text has fewer
    streams = [[t[k] if k < len(t) else None for t in every] for k in range(max(map(len, every)))]
    return float(sacrebleu.corpus_bleu(list(written), streams).score)


def distinct_n(tokens: Sequence[Hashable], *, n: int = 4) -> float:
    """Compute the share of a text's n-grams that are different from one another.

    Args:
        tokens: of one generated text: ids, also as an array or a tensor, or words.
        n: length of the n-grams, 1 or more.

    Returns:
        Above 0, at most 1; low = repetitive. 1 for a text shorter than n, in which nothing repeats. It falls with
        length: compare texts of the same length.

    Raises:
        ArgumentError: n below 1; the tokens of several texts.

    Example:
        >>> distinct_n("na na na na batman".split(), n=2)
        0.5

    See Also:
        repetition: 1 - distinct_n.

    Source: Li et al. 2015, arXiv 1510.03055.
    """
    if n < 1:
        raise ArgumentError(f"n must be at least 1 token, got {n}")
    ids = tokens_of_text("tokens", tokens)
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(tokens: Sequence[Hashable], *, n: int = 4) -> float:
    """Compute the share of a text's n-grams that occurred in it before: 1 - `distinct_n` (seq-rep-n).

    Args:
        tokens: of one generated text: ids, also as an array or a tensor, or words.
        n: length of the n-grams, 1 or more.

    Returns:
        0 to below 1; high = repetitive.

    Raises:
        ArgumentError: n below 1; the tokens of several texts.

    Example:
        >>> repetition("na na na na batman".split(), n=2)
        0.5

    See Also:
        collapsed: its threshold.

    Source: Welleck et al. 2019, arXiv 1908.04319.
    """
    return 1 - distinct_n(tokens, n=n)


def collapsed(tokens: Sequence[Hashable], *, n: int = 4, threshold: float = COLLAPSED) -> bool:
    """Decide whether a generated text is mostly repetition: `repetition` above the threshold.

    Pass *sampled* text of 50 tokens or more: greedy decoding loops in healthy models as well (about 0.44 in the
    source's table for GPT-2's kind), so there only the difference from the original model is informative. An empty
    text has no repetition: count empty texts separately.

    Args:
        tokens: of one generated text: ids, also as an array or a tensor, or words.
        n: length of the n-grams, 1 or more.
        threshold: from 0 to 1.

    Returns:
        True = collapsed.

    Raises:
        ArgumentError: n below 1; the tokens of several texts.

    Example:
        >>> collapsed("na na na na na na na na na na".split())
        True

    Source: the measure from arXiv 1908.04319 (its numbers from memory); the threshold is ours.
    """
    return repetition(tokens, n=n) > threshold
