"""A weighted sum of log-likelihoods, where the weights are known beforehand: value and gradient out of one pass."""

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
    """The sum over rows of coefficient * log-likelihood, in nats, with its gradient made in the same pass.

        value = sum over n of coefficients[n] * linear_log_likelihood(hidden, weight, targets, ...)[n]

    Gradient ascent, a mean negative log-likelihood, weighted ascent: whatever is linear in the log-likelihoods. Since no coefficient has to wait for
    the backward pass, three matrix products are enough (two with a frozen head) whatever the workspace, as long as it holds the logits of a
    few hundred rows; linear_log_likelihood takes a fourth for what it cannot keep. The gradients lie ready between forward and backward pass.

    float16, torch.compile and CUDA graphs run as linear_log_likelihood, as in example_objective.

    Args:
        hidden, weight, targets: as in linear_log_likelihood, (..., D), (V, D) and (...).
        coefficients: (...), floating point, without gradient of their own.
        bias, logit_scale, softcap, ignore_index: as in linear_log_likelihood.
        workspace, negligible: as in example_objective, which says when rows with coefficient 0 leave the gradient's products.

    Returns:
        (), float32 (float64 for float64 inputs); differentiable in hidden, weight and bias, as often as the graph is cached.

    Raises:
        ArgumentError: as linear_log_likelihood; coefficients that want a gradient; negligible outside [0, 1).
    """
    check(hidden, targets, name="hidden", softcap=softcap, workspace=workspace)
    check_head(hidden, weight, bias)
    check_per_row(coefficients, targets, name="coefficients")
    check_negligible(negligible)
    ignore_index = ignored(ignore_index)
    if coefficients.requires_grad:
        raise ArgumentError(
            "coefficients must be constants here, and they want a gradient: pass coefficients.detach(), or multiply linear_log_likelihood with them"
        )
    hidden, weight = in_one_dtype(hidden, weight)
    if not one_pass_serves(hidden):
        found = linear_log_likelihood(
            hidden, weight, targets, bias=bias, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index,
            workspace=workspace,
        )  # fmt: skip
        return (torch.where(targets == ignore_index, 0, coefficients).to(found.dtype) * found).sum()
    check_targets(targets, weight.shape[0], ignore_index)
    flat, t = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    rows = live_rows(t, ignore_index)
    t, c = select_rows(rows, t, coefficients.reshape(-1).to(real_of(hidden)))
    most, workspace = rows_per_chunk(len(t), flat, weight, workspace)
    chunks = [(first, min(first + most, len(t))) for first in range(0, len(t), most or 1)] or [(0, 0)]

    def step(k: int, log_likelihood: Tensor, differentiate: bool) -> tuple[tuple[Tensor, ...], Tensor]:
        mine = c[slice(*chunks[k])]
        return (mine * log_likelihood,), mine

    work = Work(t, rows, chunks, most, step, logit_scale, softcap or 0.0, workspace, negligible)
    return one_pass(work, flat, weight, bias)[0]
