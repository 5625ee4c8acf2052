"""Membership attacks: one score for each text, HIGHER = less likely a member of the training set, so of a memorized text it is low.

That is the sign of open-unlearning and of mimir; papers that call high scores members take the negative. `k` is a share of the tokens (0.2, not
20). Forget set and holdout must come from the same source and length, or an attack measures that difference and not membership.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._check import Floats, between, numbers, one_of, same_length, texts_of_tokens

_LEAST_VARIANCE = 1e-6  # nats^2: a token that the model is certain of has none


def loss_score(log_likelihood: ArrayLike) -> Floats:
    """-log_likelihood, (n,): the LOSS attack (Yeom et al. 2018, arXiv 1709.01604). Nats a token for mean log-likelihoods (n,); 0 and up.

    Raises:
        ArgumentError: a number that is not finite.
    """
    return -numbers("log_likelihood", log_likelihood)


def zlib_score(log_likelihood: ArrayLike, texts: Sequence[str]) -> Floats:
    """-log_likelihood / len(zlib.compress(text in UTF-8)), (n,): loss against plain repetitiveness (Carlini et al. 2021, arXiv 2012.07805).

    Nats a byte; 0 and up. log_likelihood (n,) is the mean per token in mimir and open-unlearning; with the sum, long texts compare better. Give the
    scored part of each text alone. zlib needs 8 bytes for nothing at all, so short texts score low.

    Raises:
        ArgumentError: as many texts as numbers are wanted; a number that is not finite.
    """
    x = numbers("log_likelihood", log_likelihood)
    if isinstance(texts, str) or len(texts) != len(x):
        got = "one string" if isinstance(texts, str) else str(len(texts))
        raise ArgumentError(f"texts must be a list of {len(x)} strings, one for each log-likelihood, got {got}")
    return -x / [len(zlib.compress(text.encode("utf-8"))) for text in texts]


def reference_score(log_likelihood: ArrayLike, reference_log_likelihood: ArrayLike) -> Floats:
    """reference_log_likelihood - log_likelihood, (n,): the loss less that of a model not trained on the text (Carlini et al. 2021, arXiv 2012.07805).

    Nats a token for means; any sign, 0 = the model knows the text as well as the reference does.

    Raises:
        ArgumentError: different lengths, a number that is not finite.
    """
    x, base = numbers("log_likelihood", log_likelihood), numbers("reference_log_likelihood", reference_log_likelihood)
    same_length("log_likelihood", x, "reference_log_likelihood", base)
    return base - x


def min_k_score(log_likelihoods: Sequence[ArrayLike] | ArrayLike, k: float = 0.2) -> Floats:
    """-mean of the lowest k of a text's token log-likelihoods, (n,), nats; 0 and up: Min-K% (Shi et al. 2023, arXiv 2310.16789).

    The lowest max(1, floor(k T)) of T tokens. k is 0.2 in the paper and 0.4 in MUSE and TOFU. floor is taken of the product as written: 0.29 of
    100 tokens is 29, where int(0.29 * 100) is 28.

    Args:
        log_likelihoods: of n texts, each (T_i,) nats, scored tokens only (no padding); one text alone may stand for a list of one.
        k: share of the tokens, above 0 and at most 1 (1 = the loss).

    Raises:
        ArgumentError: a text without tokens, a number that is not finite, a k outside (0, 1].
    """
    return np.array([_lowest(x, k) for x in texts_of_tokens("log_likelihoods", log_likelihoods)])


def min_k_plus_plus_score(
    log_likelihoods: Sequence[ArrayLike] | ArrayLike,
    entropy: Sequence[ArrayLike] | ArrayLike,
    variance: Sequence[ArrayLike] | ArrayLike,
    k: float = 0.2,
) -> Floats:
    """-mean of the lowest k of z_t, (n,), deviations, any sign: Min-K%++ (Zhang et al. 2024, arXiv 2404.02936).

        z_t = (log p_t - mu_t) / sqrt(variance_t),   mu_t = sum over v of p_v log p_v = -entropy_t

    with mean and variance of log p under the model's own p, as ops.token_statistics gives them. Variances below 1e-6 count as that.

    Args:
        log_likelihoods, entropy, variance: of n texts, each (T_i,); nats, nats, nats squared.
        k: share of the tokens, above 0 and at most 1; the lowest max(1, floor(k T)).

    Raises:
        ArgumentError: as min_k_score; numbers of tokens that differ; a negative variance.
    """
    names = ("log_likelihoods", "entropy", "variance")
    tables = [texts_of_tokens(n, v) for n, v in zip(names, (log_likelihoods, entropy, variance), strict=True)]
    for name, table in zip(names[1:], tables[1:], strict=True):
        if [len(x) for x in table] != [len(x) for x in tables[0]]:
            raise ArgumentError(f"{name} must have one number for each token of log_likelihoods, text by text")
    if any((v < 0).any() for v in tables[2]):
        raise ArgumentError(
            "variance must be 0 or more, got a negative number: pass it as ops.token_statistics gives it"
        )
    z = [(x + h) / np.sqrt(np.maximum(v, _LEAST_VARIANCE)) for x, h, v in zip(*tables, strict=True)]
    return np.array([_lowest(x, k) for x in z])


def logit_score(log_likelihood: ArrayLike) -> Floats:
    """ln((1 - p) / p), (n,), p = exp(log_likelihood): LiRA's statistic, nearly normal over shadow models, where the loss is skewed (arXiv 2112.03570).

    log_likelihood is the mean per token, nats. Any sign; high = unlikely. Kept finite for p = 1: ln 2^-53 at the least.

    Raises:
        ArgumentError: a number that is not finite or is above 0.
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
    """The likelihood-ratio attack, (n,) nats; HIGHER = less likely a member (Carlini et al. 2022, arXiv 2112.03570).

        online   ln N(score; out) - ln N(score; in)      normal laws of the text's scores under shadow models trained with and without it
        offline  ln P(Z <= score), Z of the normal law out; at most 0

    The offline form is one-sided: a text that is *less* likely than under the models without it is no member. (Code that takes the normal density
    instead calls it one.) U-LiRA for unlearning (Hayes et al. 2024, arXiv 2403.01218): in = unlearned models, out = retrained ones.

    Args:
        scores: (n,) under the model attacked, of logit_score or any attack.
        out_scores: (n, K) under K models trained without the text; NaN where a model does not count for a text.
        in_scores: (n, K') under models trained with it; None for the offline form.
        center: "mean" or "median" of the models.
        variance: "example", each text's own (n - 1 in the denominator; two models or more), or "global", one for all texts, pooled around their
            own centers: better with few models.
        members: "low" where a low score means a member (all scores here), "high" the other way round.

    Raises:
        ArgumentError: shapes that do not fit, too few models for the variance (with one, use reference_score), an unknown choice.
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
    """Center and deviation of each row, NaN left out."""
    one_of("center", center, ("mean", "median"))
    one_of("variance", variance, ("example", "global"))
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 2 or len(x) != n or np.isinf(x).any():
        raise ArgumentError(f"{name} must have shape ({n}, models), finite or NaN, got shape {x.shape}")
    count = np.isfinite(x).sum(1)
    if (count < (2 if variance == "example" else 1)).any() or count.sum() <= n:
        raise ArgumentError(
            f"{name} must come from two models or more for each text, got {count.min() if n else 0}: with few, pass variance='global'; with one, use reference_score"
        )
    middle = np.nanmedian(x, axis=1) if center == "median" else np.nanmean(x, axis=1)
    squares = np.nansum((x - np.nanmean(x, axis=1, keepdims=True)) ** 2, axis=1)
    spread = np.sqrt(squares / (count - 1) if variance == "example" else np.full(n, squares.sum() / (count - 1).sum()))
    return middle, np.maximum(spread, 1e-12 * np.maximum(np.abs(middle), 1.0))


def _lowest(x: Floats, k: float) -> float:
    """Minus the mean of the lowest max(1, floor(k T))."""
    if k != 1:
        between("k", k, 0, 1)
    count = max(1, int(k * len(x) + 1e-9))
    return float(-np.partition(x, count - 1)[:count].mean())
