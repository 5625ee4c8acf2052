"""Membership attacks: one score per text, LOW = more likely a member of the training set.

This is the sign of open-unlearning and mimir; papers that call high scores members take the negative. The forget set
and the holdout must come from the same source and have like lengths, or an attack measures that difference and not
membership.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._check import (
    Floats,
    as_floats,
    between,
    lists_of_texts,
    numbers,
    one_of,
    same_length,
    texts_of_tokens,
)

_LEAST_VARIANCE = 1e-6  # nats^2: the variance of a token that the model is certain of is 0


def loss_score(log_likelihood: ArrayLike) -> Floats:
    """Compute the LOSS attack, -log_likelihood. Low = member.

    Args:
        log_likelihood: (n,) mean per token, nats.

    Returns:
        (n,) nats per token, 0 and up.

    Raises:
        ArgumentError: NaN or Inf.

    Example:
        >>> loss_score([-0.5, -3.0]).tolist()
        [0.5, 3.0]

    See Also:
        auc, tpr_at_fpr: how well scores tell the forget set from a holdout.

    Source: Yeom et al. 2018, arXiv 1709.01604.
    """
    return -numbers("log_likelihood", log_likelihood)


def zlib_score(log_likelihood: ArrayLike, texts: Sequence[str]) -> Floats:
    """Compute the zlib attack: the loss over the compressed size of the text. Low = member.

        -log_likelihood / len(zlib.compress(text in UTF-8))

    zlib adds 8 bytes to any text, so short texts score low.

    Args:
        log_likelihood: (n,) nats: the mean per token in mimir and open-unlearning; sums compare better on long texts.
        texts: the scored part of each of the n texts.

    Returns:
        (n,) nats per byte, 0 and up.

    Raises:
        ArgumentError: another number of texts than of log-likelihoods, NaN or Inf.

    Example:
        >>> zlib_score([-2.0, -2.0], ["a code: 83610427", "na na na na na na"]).round(3).tolist()
        [0.083, 0.154]

    Source: Carlini et al. 2021, arXiv 2012.07805.
    """
    x = numbers("log_likelihood", log_likelihood)
    lists_of_texts(texts=texts)
    same_length("log_likelihood", x, "texts", texts)
    return -x / [len(zlib.compress(text.encode("utf-8"))) for text in texts]


def reference_score(log_likelihood: ArrayLike, reference_log_likelihood: ArrayLike) -> Floats:
    """Compute the score of the reference attack: the loss minus that of a model not trained on the text. Low = member.

        reference_log_likelihood - log_likelihood

    Args:
        log_likelihood: (n,) mean per token, nats.
        reference_log_likelihood: (n,) the same under the reference model.

    Returns:
        (n,) nats per token, any sign; 0 = known as well as by the reference model.

    Raises:
        ArgumentError: different lengths, NaN or Inf.

    Example:
        >>> reference_score([-1.0, -3.0], [-3.0, -3.0]).tolist()
        [-2.0, 0.0]

    See Also:
        lira_score: the same idea with several reference models.

    Source: Carlini et al. 2021, arXiv 2012.07805.
    """
    x, base = numbers("log_likelihood", log_likelihood), numbers("reference_log_likelihood", reference_log_likelihood)
    same_length("log_likelihood", x, "reference_log_likelihood", base)
    return base - x


def min_k_score(log_likelihoods: Sequence[ArrayLike] | ArrayLike, k: float = 0.2) -> Floats:
    """Compute Min-K%: minus the mean of the lowest share k of a text's token log-likelihoods. Low = member.

    The lowest max(1, floor(k T)) of T tokens count. The product is rounded to the number as written: 0.29 of 100
    tokens is 29, where int(0.29 * 100) is 28.

    Args:
        log_likelihoods: for each of n texts (T_i,) nats, scored tokens only (no padding); one text alone is accepted.
        k: share of the tokens, above 0 and at most 1 (1 = the loss): 0.2 in the paper, 0.4 in MUSE and TOFU.

    Returns:
        (n,) nats, 0 and up.

    Raises:
        ArgumentError: a text without tokens, NaN or Inf, k outside (0, 1].

    Example:
        >>> min_k_score([[-0.1, -0.2, -0.3, -4.0], [-1.0, -2.0]], k=0.5).round(2).tolist()
        [2.15, 2.0]

    Source: Shi et al. 2023, arXiv 2310.16789.
    """
    return np.array([_lowest(x, k) for x in texts_of_tokens("log_likelihoods", log_likelihoods)])


def min_k_plus_plus_score(
    log_likelihoods: Sequence[ArrayLike] | ArrayLike,
    entropy: Sequence[ArrayLike] | ArrayLike,
    variance: Sequence[ArrayLike] | ArrayLike,
    k: float = 0.2,
) -> Floats:
    """Compute Min-K%++: minus the mean of the lowest share k of standardised token log-likelihoods. Low = member.

        z_t = (log p_t - mu_t) / sqrt(variance_t),   mu_t = sum over v of p_v log p_v = -entropy_t

    Mean and variance of log p are those under the model's own p, as `ops.token_statistics` returns them. Variances
    below 1e-6 count as 1e-6.

    Args:
        log_likelihoods: for each of n texts (T_i,) nats.
        entropy: for each text (T_i,) nats.
        variance: for each text (T_i,) nats squared.
        k: share of the tokens, above 0 and at most 1; the lowest max(1, floor(k T)) count.

    Returns:
        (n,) standard deviations, any sign.

    Raises:
        ArgumentError: as `min_k_score`; numbers of tokens that differ; a negative variance.

    Example:
        >>> min_k_plus_plus_score([-1.0, -4.0], [2.0, 2.0], [1.0, 4.0], k=1).tolist()
        [-0.0]

    Source: Zhang et al. 2024, arXiv 2404.02936.
    """
    names = ("log_likelihoods", "entropy", "variance")
    tables = [texts_of_tokens(n, v) for n, v in zip(names, (log_likelihoods, entropy, variance), strict=True)]
    for name, table in zip(names[1:], tables[1:], strict=True):
        if [len(x) for x in table] != [len(x) for x in tables[0]]:
            raise ArgumentError(f"{name} must have one number for each token of log_likelihoods, text by text")
    if any((v < 0).any() for v in tables[2]):
        raise ArgumentError(
            "variance must be 0 or more, got a negative number: pass it as ops.token_statistics returns it"
        )
    z = [(x + h) / np.sqrt(np.maximum(v, _LEAST_VARIANCE)) for x, h, v in zip(*tables, strict=True)]
    return np.array([_lowest(x, k) for x in z])


def logit_score(log_likelihood: ArrayLike) -> Floats:
    """Compute LiRA's statistic ln((1 - p) / p), p = exp(log_likelihood). Low = member.

    It is nearly normal over models, where the loss is skewed.

    Args:
        log_likelihood: (n,) mean per token, nats.

    Returns:
        (n,) nats, any sign; finite also for p = 1: ln 2^-53 at the least.

    Raises:
        ArgumentError: NaN, Inf or a number above 0.

    Example:
        >>> import math
        >>> logit_score([math.log(0.9), math.log(0.5)]).round(3).tolist()
        [-2.197, 0.0]

    Source: Carlini et al. 2022, arXiv 2112.03570.
    """
    x = numbers("log_likelihood", log_likelihood)
    if (x > 0).any():
        raise ArgumentError(f"log_likelihood must be 0 or less, got {x.max()}: pass the logarithm, not the loss")
    x = np.minimum(x, -(2.0**-53))
    return np.log(-np.expm1(x)) - x


def lira_score(
    scores: ArrayLike,
    out_scores: ArrayLike,
    in_scores: ArrayLike | None = None,
    *,
    center: str = "mean",
    variance: str = "example",
    members: str = "low",
) -> Floats:
    """Compute the likelihood-ratio attack over shadow models. Low = member.

        online   ln N(score; out) - ln N(score; in)   normal laws of the text's scores under models without and with it
        offline  ln P(Z <= score)                     Z of the normal law `out`; at most 0

    The offline form is one-sided: a text that is *less* likely than under the models without it is no member. (Code
    that takes the normal density instead calls it one.) In U-LiRA, for unlearning, `in` are models from which the text
    was unlearned and `out` are retrained models.

    Args:
        scores: (n,) under the attacked model, from `logit_score` or any attack.
        out_scores: (n, K) under K models trained without the text; NaN where a model does not count for a text.
        in_scores: (n, K') under models trained with it; None for the offline form.
        center: "mean" or "median" of the models.
        variance: "example" for the variance of each text (n - 1 in the denominator; two models or more), or "global"
            for one variance pooled over all texts around their own means, which is better with few models.
        members: "low" where a low score means a member (all scores here), "high" the other way round.

    Returns:
        (n,) nats.

    Raises:
        ArgumentError: shapes that do not match, too few models for the variance, an unknown choice.

    Example:
        >>> out, inside = [[2.0, 3.0, 4.0]] * 2, [[0.0, 1.0, 2.0]] * 2
        >>> lira_score([1.0, 3.0], out, inside).tolist()
        [-2.0, 2.0]

    See Also:
        reference_score: the attack with one reference model.

    Source: Carlini et al. 2022, arXiv 2112.03570; for unlearning Hayes et al. 2024, arXiv 2403.01218.
    """
    one_of("members", members, ("low", "high"))
    sign = 1.0 if members == "low" else -1.0
    s = sign * numbers("scores", scores)
    out = _normal("out_scores", out_scores, len(s), center, variance)
    z_out = (s - sign * out[0]) / out[1]
    if in_scores is None:
        return stats.norm.logcdf(z_out)
    inside = _normal("in_scores", in_scores, len(s), center, variance)
    z_in = (s - sign * inside[0]) / inside[1]
    return stats.norm.logpdf(z_out) - np.log(out[1]) - stats.norm.logpdf(z_in) + np.log(inside[1])


def _normal(name: str, values: ArrayLike, n: int, center: str, variance: str) -> tuple[Floats, Floats]:
    """Compute center and standard deviation of each row without its NaN."""
    one_of("center", center, ("mean", "median"))
    one_of("variance", variance, ("example", "global"))
    x = as_floats(name, values)
    if x.ndim != 2 or len(x) != n or np.isinf(x).any():
        raise ArgumentError(f"{name} must have shape ({n}, models), finite or NaN, got shape {x.shape}")
    count = np.isfinite(x).sum(1)
    if (count < (2 if variance == "example" else 1)).any() or count.sum() <= n:
        raise ArgumentError(
            f"{name} must come from two models or more for each text, got {count.min() if n else 0}: with few, pass "
            "variance='global'; with one, use reference_score"
        )
    middle = np.nanmedian(x, axis=1) if center == "median" else np.nanmean(x, axis=1)
    squares = np.nansum((x - np.nanmean(x, axis=1, keepdims=True)) ** 2, axis=1)
    spread = np.sqrt(squares / (count - 1) if variance == "example" else np.full(n, squares.sum() / (count - 1).sum()))
    return middle, np.maximum(spread, 1e-12 * np.maximum(np.abs(middle), 1.0))


def _lowest(x: Floats, k: float) -> float:
    """Compute minus the mean of the lowest max(1, floor(k T)) of T numbers."""
    if k != 1:
        between("k", k, 0, 1)
    count = max(1, int(k * len(x) + 1e-9))
    return float(-np.partition(x, count - 1)[:count].mean())
