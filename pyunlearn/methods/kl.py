"""The KL divergence from a teacher, on the forget set: away from one that knows the text, or toward one that does not."""

from torch import Tensor

from pyunlearn.errors import ArgumentError
from pyunlearn.methods.reduction import reduced, token_means
from pyunlearn.models.distributions import Distributions


def kl(
    model: Distributions, reference: Distributions, targets: Tensor, example: Tensor, counts: Tensor, *, direction: str = "away",
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Minus or plus the divergence of the model from the reference.

        away     loss_i = -mean over its tokens of KL(reference || model)    the reference is the model as it came: SCRUB
        toward   loss_i =  mean over its tokens of KL(reference || model)    the reference never saw the text: bad teaching

    Not to be confused with what the TOFU benchmark calls KL minimization, which is gradient ascent with this divergence on the retain set: `ga+kl`.

    "away" is unbounded, and its gradient is 0 where model and reference agree: at the first step only the retain term moves the model.

    Args:
        model, reference: the distributions of both at N scored rows.
        targets: (N,) the forget tokens.
        example: (N,) whose each is, in [0, B), ascending.
        counts: (B,) tokens of each example.
        direction: "away" or "toward".
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, nats a token.

    Raises:
        ArgumentError: for another direction.

    Source: Kurmanji et al. 2023, arXiv 2302.09880, the max step (away); Chundawat et al. 2022, arXiv 2205.08096 (toward).
    """
    if direction not in ("away", "toward"):
        raise ArgumentError(f'direction must be "away" or "toward", got {direction!r}')
    divergence = token_means(model.kl_from(reference, targets), example, counts)
    return reduced(divergence if direction == "toward" else -divergence, reduction)
