"""Shared parts of the Fisher steps: the direction v, and losses of labels that are drawn from the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyunlearn.data import TokenBatch
from pyunlearn.edits.base import Editing, wide
from pyunlearn.edits.curvature import wide_logits
from pyunlearn.ops._portable import to_float64

DAMPING = 0.1
"""Default damping, as a multiple of the mean eigenvalue."""

NEEDS = {"retain": "on which the Fisher information is computed"}
"""Roles of texts, in addition to forget, without which there is no Fisher step."""


def direction(edit: Editing, training_texts: int | None) -> dict[str, Tensor]:
    """Return name -> v = |F| / n (mean gradient over the forget texts - mean gradient over the retain texts).

    The gradients are those of the NLL per token; n is the number of texts that the model was trained on, by default the
    number of forget and retain texts. H^-1 v is the Newton step from the minimum of the loss over all texts to the
    minimum without the forget texts; subtracting the retain gradient corrects for a model that is not at its minimum.
    """
    factor = edit.count("forget") / (training_texts or edit.count("forget", "retain"))
    on_forget, on_retain = edit.gradient("forget"), edit.gradient("retain")
    for name, gradient in on_forget.items():
        gradient.sub_(on_retain.pop(name)).mul_(factor)  # in place: two gradients at most are in memory
    return {name: on_forget.pop(name).to(wide(p).dtype) for name, p in edit.parameters.items()}


def drawn_loss(edit: Editing, batch: TokenBatch, shares: Sequence[float], generator: torch.Generator) -> Tensor:
    """Return the sum over texts of 1 / sqrt(T) times the NLL of labels drawn from the model; differentiable.

    T is the number of scored tokens of the text, of a window that of its record; `shares`, (b,), are those of the texts
    in their records. The mean square of the gradient for one text is the diagonal of the
    true Fisher information of that text's NLL per token, which is its Gauss-Newton matrix: labels of different tokens
    are drawn independently, so their mixed terms are 0 on average. The labels of the text instead would give the
    "empirical" Fisher information, which is another matrix.
    """
    logits = wide_logits(edit, batch)  # (n, V)
    cumulative = to_float64(logits.detach()).softmax(-1).cumsum(-1)
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(cumulative.device)
    labels = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp_(max=logits.shape[1] - 1)
    labels = labels.to(logits.device)
    log_likelihood = logits.log_softmax(-1).gather(1, labels)[:, 0]  # (n,)
    root = torch.tensor(shares).to(log_likelihood).sqrt()[batch.example]  # (n,)
    return -(log_likelihood * (root * batch.counts[batch.example].to(log_likelihood.dtype).rsqrt())).sum()
