"""Utility: what a model is still good for, on text that was to survive."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pyunlearn.errors import ArgumentError, DependencyError
from pyunlearn.metrics._arrays import log_likelihoods, same_length

COLLAPSED = 0.5
"""Share of repeated 4-grams above which a text counts as collapsed. Human text has about 0.006 in the source's table; sampled text comes near it."""


def perplexity(log_likelihood: ArrayLike, tokens: ArrayLike) -> float:
    """The perplexity of a corpus: exp of the mean negative log-likelihood a token.

        exp(- sum over i of L_i / sum over i of T_i)

    Args:
        log_likelihood: (B,) summed log-likelihood L_i of each text, nats.
        tokens: (B,) scored tokens T_i of each: those that have a log-likelihood, which for a plain text are one fewer than its tokens.

    Returns:
        1 or more; inf where a token has probability 0. Low = good. Long texts weigh more than short ones: it is not the mean of the texts'
        perplexities, which one outlier rules. With an interval: `aggregate_interval(perplexity, log_likelihood, tokens)`.

    Raises:
        ArgumentError: a log-likelihood above 0 or NaN, a text without a scored token, arrays of different lengths.
    """
    sums, counts = np.atleast_1d(log_likelihoods(log_likelihood, "log_likelihood")), np.atleast_1d(np.asarray(tokens))
    same_length(sums, counts, "log_likelihood and tokens")
    if counts.size == 0 or (counts < 1).any():
        raise ArgumentError("tokens must be at least 1 for each of one or more texts: leave out texts without any.")
    with np.errstate(over="ignore"):
        return float(np.exp(-sums.sum() / counts.sum()))


def bleu(written: Sequence[str], truth: Sequence[str | Sequence[str]]) -> float:
    """Corpus BLEU of what a model wrote, by sacrebleu with its defaults (13a tokens, exponential smoothing).

    Args:
        written: B texts.
        truth: B references: one text each, or several, whose numbers may differ. In this order: sacrebleu itself wants them
            transposed, and scores the wrong pairs without a word where they are not.

    Returns:
        0 to 100. High = like the truth. A corpus score: the mean of sentence scores is another number. With an interval (Koehn 2004):
        `aggregate_interval(bleu, written, truth)`.

    Raises:
        ArgumentError: no text, numbers that differ, a text without reference.
        DependencyError: sacrebleu is not installed.

    Source: Papineni et al. 2002; Post 2018, arXiv 1804.08771.
    """
    return float(_sacrebleu("bleu").corpus_bleu(list(written), _streams(written, truth)).score)


def _sacrebleu(name: str) -> Any:
    try:
        import sacrebleu
    except ImportError as error:
        raise DependencyError(
            f"{name} needs the package sacrebleu, which is not installed: pip install 'pyunlearn[metrics]'."
        ) from error
    return sacrebleu


def _streams(written: Sequence[str], truth: Sequence[str | Sequence[str]]) -> list[list[str | None]]:
    """The references as sacrebleu wants them: the k-th of every text together, None where a text has fewer."""
    same_length(written, truth, "written and truth")
    every = [[t] if isinstance(t, str) else list(t) for t in truth]
    if not every or not all(every):
        raise ArgumentError("truth must have at least one reference for each of one or more texts.")
    return [[t[k] if k < len(t) else None for t in every] for k in range(max(map(len, every)))]


def n_grams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """Every run of n tokens, in order, as often as it stands there. Raises ArgumentError when n is below 1."""
    if n < 1:
        raise ArgumentError(f"n must be at least 1 token, and is {n}.")
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct_n(tokens: Sequence[Hashable], *, n: int = 4) -> float:
    """The share of a text's n-grams that are different from one another.

    Args:
        tokens: of one generated text (ids or words).
        n: length of the n-grams.

    Returns:
        Above 0, to 1; low = repetitive. 1 for a text shorter than n, in which nothing repeats. It falls with length: compare texts
        of the same length.

    Raises:
        ArgumentError: n below 1.

    Source: Li et al. 2015, arXiv 1510.03055.
    """
    grams = n_grams(tokens, n)
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(tokens: Sequence[Hashable], *, n: int = 4) -> float:
    """The share of a text's n-grams that stood in it before: 1 - `distinct_n` (seq-rep-n).

    Args:
        tokens, n: as in `distinct_n`.

    Returns:
        0, to below 1; high = repetitive.

    Raises:
        ArgumentError: n below 1.

    Source: Welleck et al. 2019, arXiv 1908.04319.
    """
    return 1 - distinct_n(tokens, n=n)


def collapsed(tokens: Sequence[Hashable], *, n: int = 4, threshold: float = COLLAPSED) -> bool:
    """Whether a generated text is mostly repetition: `repetition` above the threshold.

    Give it *sampled* text, of 50 tokens or more: greedy decoding loops in healthy models as well (about 0.44 in the source's table for
    GPT-2's kind), so there only the difference from the original model tells. An empty text is no repetition: count those apart.

    Args:
        tokens, n: as in `distinct_n`.
        threshold: from 0 to 1.

    Returns:
        True = collapsed.

    Raises:
        ArgumentError: n below 1.

    Source: the measure from arXiv 1908.04319 (its numbers as remembered); the threshold is ours.
    """
    return repetition(tokens, n=n) > threshold
