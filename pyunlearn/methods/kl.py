"""KL divergence from a teacher on the forget set: away from one that knows the text, or toward one that does not."""

from typing import Annotated

from torch import Tensor

from pyunlearn.errors import ArgumentError
from pyunlearn.methods.reduction import reduced, token_means
from pyunlearn.models.distributions import Distributions
from pyunlearn.options import Choice


def kl(
    model: Distributions,
    reference: Distributions,
    targets: Tensor,
    example: Tensor,
    counts: Tensor,
    *,
    direction: Annotated[str, Choice(("away", "toward"))] = "away",
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute the divergence of the model from a reference model, negative for the direction "away".

        away     loss_i = -mean over its tokens of KL(reference || model)   reference: the original model (SCRUB)
        toward   loss_i =  mean over its tokens of KL(reference || model)   reference: never saw the text (bad teaching)

    "away" is unbounded, and its gradient is 0 where model and reference agree: at the first step only the retain term
    moves the model. The TOFU benchmark's "KL minimization" is another method: gradient ascent with this divergence on
    the retain set, `ga+kl`.

    Args:
        model: the model's distributions at N scored rows.
        reference: the reference model's distributions at the same rows.
        targets: (N,) the forget tokens.
        example: (N,) index of the example of each row, in [0, B), ascending.
        counts: (B,) tokens of each example.
        direction: "away" or "toward".
        weights: (N,) factors on the tokens in the mean; None: all 1.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, nats per token.

    Raises:
        ArgumentError: another direction or reduction.

    Source: Kurmanji et al. 2023, arXiv 2302.09880, the max step (away); Chundawat et al. 2022, arXiv 2205.08096
    (toward).

    >>> import torch
    >>> model, reference = (Distributions(torch.tensor([logits]), None) for logits in ([0.0, 0.0], [2.0, 0.0]))
    >>> kl(model, reference, torch.tensor([0]), torch.tensor([0]), torch.tensor([1]), direction="toward")
    tensor(0.3278)
    """
    if direction not in ("away", "toward"):
        raise ArgumentError(f'direction must be "away" or "toward", got {direction!r}')
    divergence = token_means(model.kl_from(reference, targets), example, counts, weights)
    return reduced(divergence if direction == "toward" else -divergence, reduction)
