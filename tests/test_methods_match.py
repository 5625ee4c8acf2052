"""Matching of token log-likelihoods to those of unseen text: formula, fixed point, direction, ranks."""

import math

import numpy as np
import pytest
import torch

from pyunlearn.errors import ArgumentError
from pyunlearn.methods import match

UNSEEN = np.sort(np.random.default_rng(0).exponential(2.0, 40))[::-1] * -1


def targets(log_p, level, unseen=UNSEEN, likely=1.0):
    """Return for each of T tokens the quantile of its rank, moved to the level: plain Python.

    All but the share `likely` of them, the likeliest, have the mean of theirs.
    """
    ranks = [sum(y < x for y in log_p) for x in log_p]
    out = [unseen[int((rank + 0.5) / len(log_p) * len(unseen))] for rank in ranks]
    rest = [rank < len(log_p) - int(likely * len(log_p)) for rank in ranks]
    mean = sum(t for t, r in zip(out, rest, strict=True) if r) / max(1, sum(rest))
    out = [mean if r else t for t, r in zip(out, rest, strict=True)]
    return [min(0.0, t + level - sum(out) / len(out)) for t in out]


def call(texts, levels, likely=None, **options):
    """Return the losses of texts given as lists of log-likelihoods, and the gradient of each token."""
    x = torch.tensor([v for t in texts for v in t], dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([len(t) for t in texts])
    example = torch.repeat_interleave(torch.arange(len(texts)), counts)
    level = torch.tensor(levels, dtype=torch.float64)[example]
    share = None if likely is None else torch.tensor(likely, dtype=torch.float64)[example]
    losses = match(x, example, counts, level, torch.tensor(UNSEEN.copy()), share, reduction="none", **options)
    return losses.tolist(), torch.autograd.grad(losses.sum(), x)[0].tolist()


@pytest.mark.parametrize("likely", [None, [0.0, 0.5, 0.29, 1.0]])
@pytest.mark.parametrize("width", [0.3, 2.0])
def test_the_loss_is_its_formula(width, likely):
    """For texts of different lengths, with tokens in any order; the gradient goes through log p alone."""
    r = np.random.default_rng(1)
    texts = [(-r.exponential(1.0, n)).tolist() for n in (1, 2, 7, 30)]
    levels = [-1.0, -3.0, -2.5, -0.4]
    losses, gradient = call(texts, levels, likely, width=width)
    right, slopes = [], []
    for text, level, share in zip(texts, levels, likely or [1.0] * 4, strict=True):
        aim = targets(text, level, likely=share)
        force = [min(1, max(-1, (x - t) / width)) for x, t in zip(text, aim, strict=True)]
        weights = [f / max(1e-4, 1 - math.exp(x)) for f, x in zip(force, text, strict=True)]
        right.append(sum(w * x for w, x in zip(weights, text, strict=True)) / len(text))
        slopes += [w / len(text) for w in weights]
    assert losses == pytest.approx(right, rel=1e-12)
    assert gradient == pytest.approx(slopes, rel=1e-12)


def test_a_text_at_the_level_of_unseen_text_is_left_alone():
    """Its tokens are the quantiles of the unseen ones; a likelier text falls, an unlikelier one rises."""
    quantiles = UNSEEN[[int((i + 0.5) / 10 * 40) for i in range(10)]]
    level = float(quantiles.mean())
    for text, sign in ((quantiles, 0), (quantiles * 0.2, 1), (quantiles * 3, -1)):
        _, gradient = call([text.tolist()], [level])
        assert np.sign(np.round(gradient, 12)).tolist() == [sign] * 10


def test_each_token_of_a_memorized_text_has_the_same_force():
    """The gradient with respect to its own logit is 1 for tokens of any certainty, where gradient ascent's vanishes."""
    logits = torch.tensor([[4.0, 0.0], [7.0, 0.0], [9.0, 0.0]], dtype=torch.float64, requires_grad=True)
    log_p = torch.log_softmax(logits, dim=-1)[:, 0]
    (ascent,) = torch.autograd.grad(log_p.sum(), logits, retain_graph=True)
    assert ascent[:, 0].max() < 0.02
    example, counts = torch.zeros(3, dtype=torch.int64), torch.tensor([3])
    unseen = torch.tensor([-5.0, -4.0, -3.0], dtype=torch.float64)
    loss = match(log_p, example, counts, torch.full((3,), -4.0, dtype=torch.float64), unseen)
    (gradient,) = torch.autograd.grad(3 * loss, logits)
    assert gradient[:2, 0].tolist() == pytest.approx([1, 1])
    assert gradient[2, 0].item() == pytest.approx(1, abs=0.2)  # 1 - p is 1.2e-4


def test_wrong_reductions_are_refused():
    """As for all losses."""
    with pytest.raises(ArgumentError, match="reduction must be"):
        match(torch.zeros(1), torch.tensor([0]), torch.tensor([1]), torch.zeros(1), torch.zeros(1), reduction="sum")
