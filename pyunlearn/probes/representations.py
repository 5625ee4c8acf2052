"""What a model makes of each example before its output head: mean hidden states, and the gradient of the likelihood there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pyunlearn import models
from pyunlearn.data import Tokens
from pyunlearn.errors import ModelError
from pyunlearn.models.scoring import batches_on, by_example, evaluation_mode
from pyunlearn.ops.linear_log_likelihood import linear_log_likelihood

Floats = NDArray[np.float64]


class Representations(NamedTuple):
    """One row for each example."""

    hidden: Floats
    """(B, D) mean of the last hidden states, as the output head reads them, over the positions that predict scored tokens."""
    scores: Floats
    """(B, D) mean over the same positions of grad_h ln p(y_t | h), the Stein score at the last layer."""


def representations(
    model: Any, tokens: Sequence[Tokens], *, batch_size: int = 8, workspace: int | None = None
) -> Representations:
    """The mean last hidden state of each example and the mean Stein score there.

        hidden = mean over t of h_t,   scores = mean over t of d ln p(y_t | h_t) / d h_t = W^T (onehot(y_t) - p_t), times the logit scale

    Only scored positions count: a prompt that many examples share would make them all alike.

    Args:
        model: a transformers language model with a plain linear head.
        tokens: B examples.
        batch_size, workspace: examples in one pass; bytes for logits.

    Returns:
        Representations, for `metrics.knn_radius` (hidden) and `metrics.ksd_difficulty` (both).

    Raises:
        ArgumentError: no example. ModelError: a head whose gradient cannot be had this way (an adapter on it, say).
    """
    if problem := models.head_problem(models.unwrapped(model)):
        raise ModelError(
            f"the model's hidden states cannot be read: {problem}; merge the adapter, or load another form."
        )
    likelihood = models.Likelihood(model, workspace=workspace)
    rows: list[list[Floats]] = [[], []]
    order: list[int] = []
    with evaluation_mode(model):
        for places, batch in batches_on(model, tokens, batch_size):
            with torch.no_grad():
                states, head = likelihood.hidden(batch)
            states = states.detach().requires_grad_()
            found = linear_log_likelihood(
                states, head.weight.detach(), batch.targets, bias=None if head.bias is None else head.bias.detach(),
                logit_scale=head.logit_scale, softcap=head.softcap, workspace=workspace,
            )  # fmt: skip
            (scores,) = torch.autograd.grad(found.sum(), states)
            for kept, values in zip(rows, (states.detach(), scores), strict=True):
                kept += [part.double().mean(dim=0).cpu().numpy() for part in by_example(values, tokens, places)]
            order += places
    back = np.argsort(order)
    return Representations(np.stack(rows[0])[back], np.stack(rows[1])[back])
