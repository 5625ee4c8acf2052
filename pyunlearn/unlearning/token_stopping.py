"""Per-token stopping: tokens as unlikely as those of unseen text are not unlearned further; the force on the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyunlearn.methods.match import quantile_targets
from pyunlearn.methods.reduction import token_means

_NO_FORCE = 1e-30  # sum of a text's derivatives that counts as 0


def above_level(
    log_likelihood: Tensor,
    example: Tensor,
    counts: Tensor,
    level: Tensor,
    unseen: Tensor,
    likely: Tensor | None = None,
) -> Tensor:
    """Return (N,) 1 for each token that is likelier than the token of its rank in unseen text, t of `match`, else 0.

    >>> known, unseen = torch.tensor([-0.5, -1.0, -6.0]), torch.tensor([-4.0, -3.0, -2.0])
    >>> above_level(known, torch.tensor([0, 0, 0]), torch.tensor([3]), torch.full((3,), -3.0), unseen)
    tensor([1., 1., 0.])
    """
    target = quantile_targets(log_likelihood, example, counts, level, unseen, likely)
    return (log_likelihood > target).to(log_likelihood.dtype)


def stopped_by_token(function: Callable[..., Tensor], unseen: Tensor, *, group_size: int = 1) -> Callable[..., Tensor]:
    """Return a function with the same values, whose gradients stop and scale each forget text as the loop needs.

    A token of a forget text that is as unlikely as the token of its rank in unseen text has no gradient. The gradients
    of a text's other tokens are multiplied by one factor, so that their mean is as large as that of gradient ascent,
    1 / n of n tokens. So the loss decides how the force is divided among the tokens, and the force does not fade
    before the text is as unlikely as unseen text. Other texts of a group are pulled as the loss says.

    Args:
        function: of log-likelihoods (N,), example (N,), counts (B,) and further tensors, to losses (B / group_size,).
        unseen: (Q,) log-likelihoods of tokens of unseen text, ascending, nats.
        group_size: texts in one loss, of which the last is the forget text.

    Returns:
        A function of the same tensors and, at the end, (N,) the mean log-likelihood per token, nats, at which each
        token's text is to end, and (N,) the share of its tokens that may stay likelier than the rest.

    >>> def wga(x, example, counts):
    ...     return (x.detach().exp() * x).mean().view(1)
    >>> x = torch.tensor([-0.5, -1.0, -6.0], requires_grad=True)
    >>> loss = stopped_by_token(wga, torch.tensor([-4.0, -3.0, -2.0]))
    >>> level, likely = torch.full((3,), -3.0), torch.ones(3)
    >>> loss(x, torch.tensor([0, 0, 0]), torch.tensor([3]), level, likely).sum().backward()
    >>> x.grad  # of gradient ascent: 1/3 for each
    tensor([0.4150, 0.2517, 0.0000])
    """

    def stopped(log_likelihood: Tensor, example: Tensor, counts: Tensor, *tensors: Tensor) -> Tensor:
        *others, level, likely = tensors
        fixed = log_likelihood.detach()
        forget = (example + 1) % group_size == 0
        above = forget * above_level(fixed, example, counts, level, unseen, likely)
        with torch.enable_grad():
            probe = fixed.clone().requires_grad_()
            (slope,) = torch.autograd.grad(function(probe, example, counts, *others).sum(), probe)
        share, force = (token_means(x, example, counts) for x in (above, above * slope.abs()))
        scale = above * (share / (force * counts).clamp(min=_NO_FORCE))[example]
        factor = torch.where(forget, scale, 1)
        return function(fixed + (log_likelihood - fixed) * factor, example, counts, *others)

    return stopped
