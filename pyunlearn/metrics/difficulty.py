"""Difficulty: how hard an example is to learn and to forget, from a model that never saw it, from errors, gradients or noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import CensoredData, ecdf

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._arrays import Booleans, Floats, finite, log_likelihoods, same_length, truths


def difficulty(log_likelihood: ArrayLike, tokens: ArrayLike) -> Floats:
    """The default difficulty: mean negative log-likelihood a token under a model that never saw the example.

        - L_i / T_i

    Counterfactual memorization splits what a model knows of an example into what it knows because it saw it and what it would know anyway; this is
    the latter, in nats. The model must not have been trained on the example: under one that was, a memorized example looks easy.

    Args:
        log_likelihood: (B,) summed log-likelihood of each example under the reference model, nats.
        tokens: (B,) scored tokens of each.

    Returns:
        (B,) nats a token, 0 or more. High = hard.

    Raises:
        ArgumentError: log-likelihoods above 0 or not finite, an example without a scored token.

    Source: the OUT term of arXiv 2112.12938; which measure Baluta et al. 2024, arXiv 2411.04388, take is not known to us.
    """
    sums = log_likelihoods(finite(log_likelihood, "log_likelihood", dimensions=1), "log_likelihood")
    counts = np.asarray(tokens)
    same_length(sums, counts, "log_likelihood and tokens")
    if (counts < 1).any():
        raise ArgumentError("tokens must be at least 1 for each example: leave out those without any.")
    return np.abs(sums) / counts


def el2n(target_log_likelihood: ArrayLike, squared_probability: ArrayLike | None = None) -> Floats:
    """The error norm of each token's prediction, EL2N; of the target's probability alone if no more is given.

        with squared_probability:  ||p - onehot(t)||_2 = sqrt((1 - p_t)^2 + sum over v of p_v^2 - p_t^2)
        without:                   1 - p_t

    The second is a lower bound of the first, which is at most sqrt(2) times as large. The two are different scores: do not mix them.

    Args:
        target_log_likelihood: (...) ln p_t, nats, of each token.
        squared_probability: (...) sum over the vocabulary of p_v^2; in float32 it is good for norms down to about 1e-3, below which the norm lies
            within its bounds but no closer.

    Returns:
        (...), 0 to sqrt(2), or to 1 without squared_probability. High = hard. The score of an example is the mean over its tokens, and
        then over models early in training (several seeds).

    Raises:
        ArgumentError: log-likelihoods above 0 or NaN; a sum of squares that p_t^2 alone exceeds, or above 1.

    Source: Paul, Ganguli and Dziugaite 2021, arXiv 2107.07075; the mean over tokens is ours.
    """
    x = log_likelihoods(target_log_likelihood, "target_log_likelihood")
    miss, own = -np.expm1(x), np.exp(2 * x)
    if squared_probability is None:
        return np.asarray(miss)
    squares = np.asarray(squared_probability, dtype=np.float64)
    if squares.shape != x.shape or not ((squares >= own * (1 - 1e-5) - 1e-12) & (squares <= 1 + 1e-5)).all():
        raise ArgumentError("squared_probability must have one sum for each token, between p_t^2 and 1.")
    # near certainty the difference is rounding; the other tokens' squares cannot exceed the square of their sum
    return np.asarray(np.sqrt(miss**2 + np.clip(squares - own, 0, miss**2)))


def grand(gradient_norms: ArrayLike) -> Floats:
    """GraNd: the norm of each example's loss gradient, averaged over models.

    Args:
        gradient_norms: (K, n) ||grad of example i's loss||_2 under model k (`probes.gradient_norms`), early in training.

    Returns:
        (n,), 0 or more. High = hard. The norm of a summed loss grows with length: take the mean loss, or compare like lengths.

    Raises:
        ArgumentError: norms below 0 or not finite.

    Source: Paul, Ganguli and Dziugaite 2021, arXiv 2107.07075.
    """
    norms = finite(gradient_norms, "gradient_norms", dimensions=2)
    if (norms < 0).any():
        raise ArgumentError("gradient_norms must be 0 or more, got one below.")
    return np.asarray(norms.mean(axis=0))


def mean_relative_difference(
    log_likelihood: Sequence[ArrayLike], noisy: Sequence[ArrayLike], *, floor: float = 1e-6
) -> Floats:
    """MRD: how much each example's tokens change, relatively, when the weights are shaken.

        MRD(x) = | mean over draws d of sum over t of (P_t(theta) - P_t(theta + d)) / P_t(theta) |,   P_t = ln p_t

    A token that is nearly certain has P_t near 0 and rules the sum; |P_t| is taken as `floor` where it is smaller.

    Args:
        log_likelihood: for each of B examples (T_i,) ln p_t, nats.
        noisy: for each (S, T_i) the same under S draws of Gaussian noise on the weights (`probes.noisy_log_likelihoods`).
        floor: nats.

    Returns:
        (B,), 0 or more. High = easy to unlearn, in the source, which samples in proportion to it. The absolute value is taken last, of the mean.

    Raises:
        ArgumentError: draws that do not fit their example, log-likelihoods above 0 or not finite, a floor that is not above 0.

    Source: arXiv 2504.06658 (formula as remembered).
    """
    if not floor > 0:
        raise ArgumentError(f"floor must be above 0 nats, and is {floor}.")
    same_length(log_likelihood, noisy, "log_likelihood and noisy")
    found = []
    for i, (plain, shaken) in enumerate(zip(log_likelihood, noisy, strict=True)):
        p = log_likelihoods(finite(plain, f"log_likelihood[{i}]", dimensions=1), f"log_likelihood[{i}]")
        q = log_likelihoods(finite(shaken, f"noisy[{i}]", dimensions=2), f"noisy[{i}]")
        if q.shape[1] != p.size:
            raise ArgumentError(f"noisy[{i}] must be (draws, {p.size}), one column for each token, and is {q.shape}.")
        found.append(abs(((p - q) / np.minimum(p, -floor)).sum(axis=1).mean()))
    return np.array(found)


class StepsToForget(NamedTuple):
    """When each example was first forgotten."""

    steps: Floats
    """(n,) the step; of a censored example the last one looked at."""
    censored: Booleans
    """(n,) true where the run ended before."""


def steps_to_forget(exposures: ArrayLike, threshold: float, *, steps: ArrayLike | None = None) -> StepsToForget:
    """The first step at which each example's exposure is at most the threshold: tau(x) = min{k : GE_k(x) <= g}.

    Args:
        exposures: (K, n) exposure of each example at K moments, the first of them before the run; bits.
        threshold: g, bits: 1.443 (`NULL_MEAN`), or 4.32 (`SIGNIFICANT`).
        steps: (K,) the step of each moment, rising; 0 to K - 1 if not given.

    Returns:
        StepsToForget. High = hard. An example that is still exposed at the end has no number: its steps are *censored*, and a mean that
        leaves such out, or takes the last step for them, makes hard sets look easy. See `median_steps`.

    Raises:
        ArgumentError: exposures that are not finite, steps that do not rise or do not fit.

    Source: ours, for the question of Baluta et al. 2024, arXiv 2411.04388.
    """
    found = finite(exposures, "exposures", dimensions=2)
    moments = np.arange(len(found)) if steps is None else finite(steps, "steps", dimensions=1)
    same_length(found, moments, "exposures and steps")
    if (np.diff(moments) <= 0).any():
        raise ArgumentError("steps must rise from one moment to the next.")
    gone = found <= threshold
    censored = np.asarray(~gone.any(axis=0))
    return StepsToForget(np.where(censored, moments[-1], moments[gone.argmax(axis=0)]).astype(np.float64), censored)


def median_steps(steps: ArrayLike, censored: ArrayLike) -> float:
    """The Kaplan-Meier median: the first step by which at least half of the examples are forgotten, censoring allowed for.

    Args:
        steps, censored: (n,) as in StepsToForget.

    Returns:
        Steps; inf where the survival curve never comes down to one half. High = hard.

    Raises:
        ArgumentError: steps that are not finite, arrays of different lengths.

    Source: Kaplan and Meier 1958, by scipy.stats.ecdf.
    """
    times, cut = finite(steps, "steps", dimensions=1), truths(censored, "censored")
    same_length(times, cut, "steps and censored")
    survival = ecdf(CensoredData.right_censored(times, cut)).sf
    below = survival.probabilities <= 0.5 + 1e-12
    return float(survival.quantiles[below.argmax()]) if below.any() else np.inf


def entanglement(forget: ArrayLike, retain: ArrayLike) -> float:
    """How much the forget set's representations lie among the retain set's: spread within the two over distance between them.

        (mean ||h_R - mu_R||^2 + mean ||h_F - mu_F||^2) / ( (||mu_R - mu||^2 + ||mu_F - mu||^2) / 2 ),   mu = (mu_R + mu_F) / 2

    Args:
        forget, retain: (n, D) and (m, D) representations under the original model.

    Returns:
        0 or more; inf where the means coincide. High = entangled = hard to unlearn without loss. The scale of the representations cancels.

    Raises:
        ArgumentError: widths that differ, values that are not finite.

    Source: RUM, Zhao et al. 2024, arXiv 2406.01257, and its code.
    """
    f, r = finite(forget, "forget", dimensions=2), finite(retain, "retain", dimensions=2)
    if f.shape[1] != r.shape[1]:
        raise ArgumentError(f"forget and retain must have the same width, and have {f.shape[1]} and {r.shape[1]}.")
    within = sum(((h - h.mean(axis=0)) ** 2).sum(axis=1).mean() for h in (f, r))
    between = ((f.mean(axis=0) - r.mean(axis=0)) ** 2).sum() / 4  # both means lie half their distance from mu
    return float(within / between) if between > 0 else np.inf


class GEffect(NamedTuple):
    """Inner products of the gradient of an unlearning objective with that of two losses."""

    unlearning: Floats
    """<grad NLL_F, grad objective>: below 0 where a step makes the forget set less likely, as it should."""
    retaining: Floats
    """<grad NLL_R, grad objective>: 0 or above where it does the retain set no harm."""


def g_effect(forget: ArrayLike, retain: ArrayLike, objective: ArrayLike) -> GEffect:
    """The G-effect of an objective: what a small step on it does to either set, to first order.

        GE = <grad NLL, grad objective>;  a step of size eta on the objective changes the NLL by -eta GE

    Args:
        forget, retain: (..., D) gradients of the mean NLL of the forget and the retain set; one row for each layer group, say. Where the
            gradients are too large to hold, `probes.gradient_inner_products` gives the products.
        objective: (..., D) gradient of the objective that is minimised.

    Returns:
        GEffect, (...) each. Wanted: unlearning below 0, retaining 0 or above.

    Raises:
        ArgumentError: shapes that differ, values that are not finite.

    Source: Wang et al. 2025, arXiv 2502.19301.
    """
    f, r, o = (finite(x, n) for x, n in ((forget, "forget"), (retain, "retain"), (objective, "objective")))
    if not f.shape == r.shape == o.shape:
        raise ArgumentError(f"forget, retain and objective must have one shape: {f.shape}, {r.shape}, {o.shape}.")
    return GEffect(np.asarray((f * o).sum(axis=-1)), np.asarray((r * o).sum(axis=-1)))
