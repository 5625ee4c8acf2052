"""Direct preference optimization: another answer is preferred to the forget text."""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from pyunlearn.methods.reduction import reduced
from pyunlearn.options import Number


def dpo(
    winner: Tensor,
    winner_reference: Tensor,
    loser: Tensor,
    loser_reference: Tensor,
    *,
    beta: Annotated[float, Number(above=0)] = 0.1,
    reduction: str = "mean",
) -> Tensor:
    """Prefer the winner, another answer, to the loser, the forget text.

        loss_i = -2/beta log sigmoid(beta ((winner_i - winner_reference_i) - (loser_i - loser_reference_i)))

    Args:
        winner: (B,) summed log-likelihoods of the winners under the model, nats.
        winner_reference: (B,) the same under the reference model.
        loser: (B,) summed log-likelihoods of the forget texts under the model, nats.
        loser_reference: (B,) the same under the reference model.
        beta: inverse temperature of the preference, per nat; the larger, the sooner the gradient vanishes.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, nats.

    Raises:
        ArgumentError: another reduction.

    Source: Rafailov et al. 2023, arXiv 2305.18290, eq. 7, times 2/beta. For unlearning: Maini et al. 2024, arXiv
    2401.06121 (IdkDPO, the winner is a refusal), and Mekala et al. 2024, arXiv 2409.13474 (AltPO, the winner is
    sampled from the model).

    >>> import torch
    >>> dpo(torch.tensor([-4.0]), torch.tensor([-6.0]), torch.tensor([-3.0]), torch.tensor([-1.0]), beta=1.0)
    tensor(0.0363)
    """
    margin = (winner - winner_reference) - (loser - loser_reference)
    return reduced(-(2 / beta) * F.logsigmoid(beta * margin), reduction)
