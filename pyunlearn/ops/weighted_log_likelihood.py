"""Weighted sum of log-likelihoods with known weights: value and gradient in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from pyunlearn.errors import ArgumentError
from pyunlearn.ops._check import (
    check,
    check_head,
    check_negligible,
    check_per_row,
    check_targets,
    ignored,
    in_one_dtype,
)
from pyunlearn.ops._one_pass import Work, one_pass, one_pass_serves, rows_per_chunk
from pyunlearn.ops._passes import live_rows, real_of, select_rows
from pyunlearn.ops.linear_log_likelihood import linear_log_likelihood


def weighted_log_likelihood(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    workspace: int | None = None,
    negligible: float = 0.0,
) -> Tensor:
    """Compute the sum over rows of coefficient * log-likelihood, in nats, with its gradient in the same pass.

        value = sum over n of coefficients[n] * linear_log_likelihood(hidden, weight, targets, ...)[n]

    It serves gradient ascent, a mean negative log-likelihood and any other objective that is linear in the
    log-likelihoods. Since all coefficients are known before the backward pass, three matrix products suffice (two with
    a frozen head) in any workspace that holds the logits of a few hundred rows; linear_log_likelihood needs a fourth
    for logits that it cannot cache. The gradients are stored from the forward to the backward pass.

    float16, torch.compile and CUDA graphs run as linear_log_likelihood, as in example_objective.

    Args:
        hidden, weight, targets: as in linear_log_likelihood, (..., D), (V, D) and (...).
        coefficients: (...), floating point, constants.
        bias, logit_scale, softcap, ignore_index: as in linear_log_likelihood.
        workspace, negligible: as in example_objective, also on dropping rows with coefficient 0 from the gradient.

    Returns:
        (), float32 (float64 for float64 inputs); differentiable in hidden, weight and bias.

    Raises:
        ArgumentError: as linear_log_likelihood; coefficients that require a gradient; negligible outside [0, 1).

    Example:
        >>> import torch
        >>> hidden, weight = torch.eye(2), torch.eye(2)  # logits [1, 0] and [0, 1]
        >>> weighted_log_likelihood(hidden, weight, torch.tensor([0, 1]), torch.tensor([2.0, -1.0]))
        tensor(-0.3133)
    """
    check(hidden, targets, name="hidden", softcap=softcap, workspace=workspace)
    check_head(hidden, weight, bias)
    check_per_row(coefficients, targets, name="coefficients")
    check_negligible(negligible)
    ignore_index = ignored(ignore_index)
    if coefficients.requires_grad:
        raise ArgumentError(
            "coefficients must be constants here, and they want a gradient: pass coefficients.detach(), or multiply "
            "linear_log_likelihood with them"
        )
    hidden, weight = in_one_dtype(hidden, weight)
    if not one_pass_serves(hidden):
        values = linear_log_likelihood(
            hidden, weight, targets, bias=bias, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index,
            workspace=workspace,
        )  # fmt: skip
        return (torch.where(targets == ignore_index, 0, coefficients).to(values.dtype) * values).sum()
    check_targets(targets, weight.shape[0], ignore_index)
    flat, t = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    rows = live_rows(t, ignore_index)
    t, c = select_rows(rows, t, coefficients.reshape(-1).to(real_of(hidden)))
    most, workspace = rows_per_chunk(len(t), flat, weight, workspace)
    chunks = [(first, min(first + most, len(t))) for first in range(0, len(t), most or 1)] or [(0, 0)]

    def step(k: int, log_likelihood: Tensor, differentiate: bool) -> tuple[tuple[Tensor, ...], Tensor]:
        d_value = c[slice(*chunks[k])]  # (m,)
        return (d_value * log_likelihood,), d_value

    work = Work(t, rows, chunks, most, step, logit_scale, softcap or 0.0, workspace, negligible)
    return one_pass(work, flat, weight, bias)[0]
