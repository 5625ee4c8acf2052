"""Representation misdirection whose length is measured on the model, so that it serves any layer."""

from torch import Tensor

from pyunlearn.methods.reduction import reduced, token_means


def adaptive_rmu(
    hidden: Tensor, example: Tensor, counts: Tensor, direction: Tensor, norms: Tensor, *, beta: float = 5.0, reduction: str = "mean"
) -> Tensor:  # fmt: skip
    """Leads the hidden states of one layer to one random direction, to a multiple of the length that they had.

        loss_i = mean over its tokens of || h_t - beta n_i u ||^2 / D,   n_i = mean over its tokens of || h_t(reference) ||

    Args:
        hidden: (N, D) what the layer gives out at the positions that predict a scored token.
        example: (N,) whose it is, in [0, B).
        counts: (B,) positions of each example.
        direction: (D,) the unit vector u: `pyunlearn.methods.rmu.steering_direction`.
        norms: (B,) n_i, under the model as it was. (The authors' code takes the mean over the first batch for all that follow.)
        beta: how many times as long.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses.

    Source: Huu-Tien et al. 2024, arXiv 2408.06223 (Adaptive RMU).
    """
    goal = (beta * norms)[example, None] * direction
    return reduced(token_means((hidden - goal).square().mean(dim=-1), example, counts), reduction)
