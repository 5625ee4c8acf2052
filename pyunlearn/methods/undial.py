"""UNDIAL: self-distillation from adjusted logits."""

from torch import Tensor

from pyunlearn.methods.reduction import reduced, token_means
from pyunlearn.models.distributions import Distributions


def undial(
    model: Distributions,
    reference: Distributions,
    targets: Tensor,
    example: Tensor,
    counts: Tensor,
    *,
    beta: float = 10.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute the cross entropy with the reference model's distribution, in which the forget token's logit is lowered.

        loss_i = mean over its tokens of -sum over v of q[v] log p[v]
        q = softmax(reference logits - beta at the token)

    The loss is bounded below; its minimum is at p = q.

    Args:
        model: the model's distributions p at N scored rows.
        reference: the reference model's distributions at the same rows.
        targets: (N,) the forget tokens.
        example: (N,) index of the example of each row, in [0, B), ascending.
        counts: (B,) tokens of each example.
        beta: amount by which the logit is lowered, nats; the token's odds fall by the factor exp(beta).
        weights: (N,) factors on the tokens in the mean; None: all 1.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, nats per token.

    Raises:
        ArgumentError: another reduction.

    Source: Dong et al. 2024, arXiv 2402.10052 (UNDIAL), without its focus on nouns and entities.

    >>> import torch
    >>> model, reference = (Distributions(torch.tensor([logits]), None) for logits in ([0.0, 0.0], [3.0, 0.0]))
    >>> undial(model, reference, torch.tensor([0]), torch.tensor([0]), torch.tensor([1]), beta=3.0)
    tensor(0.6931)
    """
    losses = model.kl_from(reference, targets, beta) + reference.entropy(targets, beta)
    return reduced(token_means(losses, example, counts, weights), reduction)
