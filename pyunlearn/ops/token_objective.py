"""Objectives of an example's token log-likelihoods (WGA, TNPO, SatImp, FLAT): value and gradient in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyunlearn.errors import ArgumentError
from pyunlearn.ops._check import check, check_examples, check_head, check_negligible, ignored, in_one_dtype
from pyunlearn.ops._objective import Function, checked, chunk_by_example, differentiated, require_graph
from pyunlearn.ops._one_pass import Work, one_pass, one_pass_serves
from pyunlearn.ops._passes import select_rows
from pyunlearn.ops._portable import write_rows
from pyunlearn.ops.linear_log_likelihood import linear_log_likelihood


class TokenObjective(NamedTuple):
    """The result of token_objective; `loss` alone is differentiable."""

    loss: Tensor  # (), the sum of losses
    losses: Tensor  # (B,) or (B / group_size,)
    log_likelihood: Tensor  # (N,), nats, 0 where ignored
    counts: Tensor  # (B,), scored tokens


def token_objective(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    example_index: Tensor,
    function: Function,
    *per_token: Tensor,
    examples: int | None = None,
    group_size: int = 1,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    workspace: int | None = None,
    negligible: float = 0.0,
) -> TokenObjective:
    """Compute the sum over examples of a function of their tokens' log-likelihoods, with its gradient in the same pass.

        loss = sum of function(log_likelihood, example, counts, *per_token) over the examples

    It generalizes example_objective, whose function sees only each example's sum. `function` is differentiated on a
    chunk's log-likelihoods once they are known; its derivatives are the rows' coefficients. A weight w(p) that must not
    be differentiated is detached inside the function.

    float16, torch.compile and CUDA graphs run as linear_log_likelihood, as in example_objective.

    Args:
        hidden, weight, targets, example_index: as in example_objective.
        function: called as function(log_likelihood (m,), example (m,), counts (b,), *(x (m, ...))) on some of the
            examples at a time; returns the loss of each, (b,), or of each group, (b / group_size,). `example` is the
            index of each row's example among these b, ascending, and `counts` their scored tokens, which may be 0.
            Ignored rows are not among the m. It must treat the examples (or groups) independently, and return the same
            when called again.
        per_token: (N, ...) constant tensors, such as the reference model's log-likelihoods.
        examples: number of examples B; default: the largest example_index + 1, rounded up to whole groups.
        group_size: number of neighbouring examples that form a group.
        bias, logit_scale, softcap, ignore_index, workspace, negligible: as in example_objective.

    Returns:
        TokenObjective(loss, losses, log_likelihood, counts).

    Raises:
        ArgumentError: as example_objective; per-token tensors that do not fit.

    Example:
        >>> import torch
        >>> def weighted_ascent(log_likelihood, example, counts):  # WGA: each token weighted by its probability
        ...     return torch.zeros(len(counts)).index_add(0, example, log_likelihood.detach().exp() * log_likelihood)
        >>> hidden, weight, targets = torch.eye(2), torch.eye(2), torch.tensor([0, 1])  # logits [1, 0] and [0, 1]
        >>> token_objective(hidden, weight, targets, torch.tensor([0, 1]), weighted_ascent).losses
        tensor([-0.2290, -0.2290])
    """
    check(hidden, targets, name="hidden", softcap=softcap, workspace=workspace)
    check_head(hidden, weight, bias)
    check_negligible(negligible)
    stand_in = () if examples is None else (torch.empty((examples,), device=targets.device),)
    examples = check_examples(targets, example_index, stand_in, group_size)
    _check_per_token(targets, per_token)
    hidden, weight = in_one_dtype(hidden, weight)
    ignore_index = ignored(ignore_index)
    if not one_pass_serves(hidden):
        values = linear_log_likelihood(
            hidden, weight, targets, bias=bias, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index,
            workspace=workspace,
        )  # fmt: skip
        live = targets != ignore_index
        return tokens_objective_of(values, live, example_index, examples, function, per_token, group_size)
    layout = chunk_by_example(hidden, weight, targets, example_index, examples, group_size, ignore_index, workspace)
    live_per_token = select_rows(layout.rows, *per_token)

    def step(k: int, log_likelihood: Tensor, differentiate: bool) -> tuple[tuple[Tensor, ...], Tensor]:
        chunk, rows = layout.examples[k], slice(*layout.chunks[k])
        counts, example = layout.counts[chunk], layout.example[rows] - chunk.start  # (b,), (m,)

        def losses_of(x: Tensor) -> Tensor:
            losses = function(x, example, counts, *(y[rows] for y in live_per_token))
            return checked(losses, len(counts) // group_size, group_size)

        if not differentiate:
            return (losses_of(log_likelihood), log_likelihood), log_likelihood
        losses, d_log_likelihood = differentiated(losses_of, log_likelihood)
        return (losses, log_likelihood.clone()), d_log_likelihood

    work = Work(
        layout.targets, layout.rows, layout.chunks, layout.at_a_time, step, logit_scale, softcap or 0.0,
        layout.workspace, negligible,
    )  # fmt: skip
    loss, losses, values = one_pass(work, hidden, weight, bias)
    if layout.rows is not None:
        values = write_rows(values.new_zeros(targets.shape), layout.rows, values)
    return TokenObjective(loss, losses, values, layout.counts)


def tokens_objective_of(
    log_likelihood: Tensor, live: Tensor, example_index: Tensor, examples: int, function: Function,
    per_token: tuple[Tensor, ...] = (), group_size: int = 1,
) -> TokenObjective:  # fmt: skip
    """Compute token_objective by autograd from the log-likelihoods (N,) of all rows; only live rows are used.

    Under torch.compile no shape may depend on which rows are ignored, so the ignored rows form examples of their own,
    whose losses are dropped.
    """
    index = torch.where(live, example_index.long(), examples)
    order = index.argsort(stable=True)
    counts = index.new_zeros((examples + group_size,)).index_add(0, index, torch.ones_like(index))
    losses = function(log_likelihood[order], index[order], counts, *(x[order] for x in per_token))
    losses = checked(losses, examples // group_size + 1, group_size)[:-1]
    if log_likelihood.requires_grad:
        require_graph(losses)
    return TokenObjective(losses.sum(), losses.detach(), log_likelihood.detach(), counts[:examples])


def _check_per_token(targets: Tensor, per_token: tuple[Tensor, ...]) -> None:
    for x in per_token:
        if not isinstance(x, Tensor) or x.dim() == 0 or len(x) != len(targets) or x.device != targets.device:
            got = f"{x.dtype} of shape {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentError(f"per_token must be tensors of {len(targets)} entries on {targets.device}, got {got}")
        if x.requires_grad:
            raise ArgumentError("per_token tensors are constants here, and one requires a gradient: detach it")
