"""UNDIAL: self-distillation from adjusted logits."""

from torch import Tensor

from pyunlearn.methods.reduction import reduced, token_means
from pyunlearn.models.distributions import Distributions


def undial(
    model: Distributions, reference: Distributions, targets: Tensor, example: Tensor, counts: Tensor, *, beta: float = 10.0,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Cross entropy with the reference's distribution, in which the forget token's logit has been lowered.

        loss_i = mean over its tokens of -sum over v of q[v] log p[v],    q = softmax(reference logits - beta at the token)

    Bounded, with a fixed end: there p is q.

    Args:
        model, reference: the distributions of both at N scored rows.
        targets: (N,) the forget tokens.
        example: (N,) whose each is, in [0, B), ascending.
        counts: (B,) tokens of each example.
        beta: how far the logit is lowered; the token's odds fall by exp(beta).
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, nats a token.

    Source: Dong et al. 2024, arXiv 2402.10052 (UNDIAL), without its focus on nouns and entities.
    """
    losses = model.kl_from(reference, targets, beta) + reference.entropy(targets, beta)
    return reduced(token_means(losses, example, counts), reduction)
