"""Direct preference optimization: another answer instead of the forget text."""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from pyunlearn.methods.reduction import reduced
from pyunlearn.options import Number


def dpo(
    winner: Tensor, winner_reference: Tensor, loser: Tensor, loser_reference: Tensor, *, beta: Annotated[float, Number(above=0)] = 0.1, reduction: str = "mean"
) -> Tensor:  # fmt: skip
    """Prefers the winner, another answer, to the loser, the forget text.

        loss_i = -2/beta log sigmoid(beta ((winner_i - winner_reference_i) - (loser_i - loser_reference_i)))

    Args:
        winner, winner_reference, loser, loser_reference: (B,) summed log-likelihoods under the model and under the reference, nats.
        beta: how soon it is content, per nat.
        reduction: "mean", or "none" for the losses themselves.

    Returns:
        () the mean loss, or (B,) losses.

    Source: Rafailov et al. 2023, arXiv 2305.18290, eq. 7, times 2/beta; for unlearning Maini et al. 2024, arXiv 2401.06121 (IdkDPO, the winner is a
    refusal) and Mekala et al. 2024, arXiv 2409.13474 (AltPO, the winner is an answer of the model's own).
    """
    margin = (winner - winner_reference) - (loser - loser_reference)
    return reduced(-(2 / beta) * F.logsigmoid(beta * margin), reduction)
