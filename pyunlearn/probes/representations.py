"""Representations of examples at the output head: mean hidden states, and the gradient of the likelihood there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pyunlearn import models
from pyunlearn.data import Tokens
from pyunlearn.errors import ModelError
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import Scorer, by_example, evaluation_mode
from pyunlearn.ops._portable import to_float64
from pyunlearn.ops.linear_log_likelihood import linear_log_likelihood

Floats = NDArray[np.float64]


class Representations(NamedTuple):
    """Mean hidden states and Stein scores, one row for each of B examples."""

    hidden: Floats
    """(B, D) mean of the last hidden states, the input of the output head, over the positions of scored tokens."""
    scores: Floats
    """(B, D) mean over the same positions of grad_h ln p(y_t | h), the Stein score at the last layer."""


def representations(
    model: Any, tokens: Sequence[Tokens], *, batch_size: int = 8, workspace: int | None = None
) -> Representations:
    """Compute the mean last hidden state of each example and the mean Stein score there.

        hidden = mean over t of h_t
        scores = mean over t of d ln p(y_t | h_t) / d h_t = W^T (onehot(y_t) - p_t), times the logit scale

    Only scored positions count: a prompt that many examples share would make them all alike.

    Args:
        model: a transformers language model with a plain linear head, or a LanguageModel.
        tokens: B examples.
        batch_size: examples in one pass.
        workspace: bytes for logits; a LanguageModel has its own.

    Returns:
        Representations, for `metrics.knn_radius` (hidden) and `metrics.ksd_difficulty` (both).

    Raises:
        ArgumentError: no example. ModelError: a head that is not plain linear (an adapter on it, say).
    """
    lm = LanguageModel.of(model, workspace=workspace, needs_tokenizer=False)
    if problem := models.head_problem(lm.inner):
        raise ModelError(
            f"the model's hidden states cannot be read: {problem}; merge the adapter, or load another form"
        )
    hidden = np.zeros((len(tokens), 0))
    stein = hidden
    with evaluation_mode(lm.module):
        for indices, batch in Scorer(lm, batch_size).batches(tokens):
            with torch.no_grad():
                states, head = lm.likelihood.hidden(batch)  # (n, D)
            states = states.detach().requires_grad_()
            log_likelihood = linear_log_likelihood(
                states,
                head.weight.detach(),
                batch.targets,
                bias=None if head.bias is None else head.bias.detach(),
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                workspace=lm.workspace,
            )
            (d_states,) = torch.autograd.grad(log_likelihood.sum(), states)
            if not hidden.size:
                hidden, stein = np.zeros((2, len(tokens), states.shape[1]))
            for rows, values in ((hidden, states.detach()), (stein, d_states)):
                rows[indices] = [to_float64(x).mean(dim=0).cpu().numpy() for x in by_example(values, tokens, indices)]
    return Representations(hidden, stein)
