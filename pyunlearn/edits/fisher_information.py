"""What the steps along an inverse Fisher information share: the direction, and losses of labels that the model itself draws."""

from __future__ import annotations

import torch
from torch import Tensor

from pyunlearn.data import TokenBatch
from pyunlearn.edits.base import Editing, require_retain, wide
from pyunlearn.edits.curvature import wide_logits
from pyunlearn.probes.gradients import mean_gradient

DAMPING = 0.1
"""Of the mean eigenvalue, where no damping is given."""


def direction(edit: Editing, training_texts: int | None) -> dict[str, Tensor]:
    """name -> v = |F| / n (mean gradient of the forget texts - mean gradient of the retain texts), of the NLL a token.

    n: the texts that the model was trained on; as many as both have, where that is not said. H^-1 v is the Newton step from the minimum
    over all to the minimum without the forget texts, and what the retain texts pull at a model that is not at its minimum falls out.
    """
    forget = edit.tokens["forget"]
    retain = require_retain(edit.tokens, edit.name, "on which the Fisher information is taken")
    factor = len(forget) / (training_texts or len(forget) + len(retain))
    means = [
        mean_gradient(edit.model, tokens, batch_size=edit.batch_size, workspace=edit.workspace) for tokens in (forget, retain)
    ]  # fmt: skip
    return {name: (factor * (means[0][name] - means[1][name])).to(wide(p).dtype) for name, p in edit.parameters.items()}


def drawn_loss(edit: Editing, batch: TokenBatch, generator: torch.Generator) -> Tensor:
    """The sum over texts of 1 / sqrt(T) times the NLL of labels drawn from the model at the T scored tokens; differentiable.

    The mean square of its gradient for one text is the diagonal of the true Fisher information of that text's NLL a token, which is its
    Gauss-Newton matrix: labels of different tokens are drawn independently, so their mixed terms are 0 on average. With the labels of the
    text instead it would be the "empirical" Fisher information, which is another matrix.
    """
    logits = wide_logits(edit, batch)
    cumulated = logits.detach().double().softmax(-1).cumsum(-1)
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device)
    labels = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True).clamp_(max=logits.shape[1] - 1)
    found = logits.log_softmax(-1).gather(1, labels)[:, 0]
    return -(found * batch.counts[batch.example].to(found.dtype).rsqrt()).sum()
