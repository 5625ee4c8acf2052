"""Objectives of each example's own log-likelihood (NPO, SimNPO, DPO, ...): value and gradient out of one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyunlearn.errors import ArgumentError
from pyunlearn.ops._check import (
    check,
    check_examples,
    check_head,
    check_negligible,
    check_per_row,
    ignored,
    in_one_dtype,
)
from pyunlearn.ops._objective import Function, checked, chunk_by_example, differentiated, require_graph
from pyunlearn.ops._one_pass import Work, one_pass, one_pass_serves
from pyunlearn.ops._passes import real_of, select_rows
from pyunlearn.ops.linear_log_likelihood import linear_log_likelihood


class ExampleObjective(NamedTuple):
    """`loss` () is differentiable; losses (B,) or (B / group_size,), log_likelihood (B,) in nats, and counts (B,) of scored tokens are not."""

    loss: Tensor
    losses: Tensor
    log_likelihood: Tensor
    counts: Tensor


def example_objective(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    example_index: Tensor,
    function: Function,
    *per_example: Tensor,
    group_size: int = 1,
    likeliest: float = 1.0,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    workspace: int | None = None,
    negligible: float = 0.0,
) -> ExampleObjective:
    """The sum over examples of a function of each one's log-likelihood, with its gradient made in the same pass.

        sums[b] = sum of weights[n] * linear_log_likelihood[n] over the rows n with example_index[n] = b (over the likeliest of them, if asked)
        loss    = sum over b of function(sums[b], counts[b], *(x[b] for x in per_example))

    The rows are taken in chunks that end where examples end. As soon as a chunk's sums are there, `function` is differentiated on them, which
    gives the coefficient of each row, and the gradient is made while the chunk's logits still lie there: three matrix products, two with a frozen
    head, within the workspace. An example longer than a chunk costs a fourth product for what does not fit.

    float16 runs as linear_log_likelihood, for its gradients would underflow before the loss scale reaches them; so does torch.compile and a
    CUDA graph.

    Args:
        hidden: (N, D), float32, bfloat16, float16 or float64.
        weight: (V, D), of the same device; another dtype is brought to the common one.
        targets: (N,), int64 token ids in [0, V), or ignore_index, whose rows count for nothing.
        example_index: (N,), int64, the example of each row, in [0, B); in any order, fastest in ascending order.
        function: called as function(sums (b,), counts (b,), *(x[...] for x in per_example)) on some of the examples at a time; returns the loss of
            each, (b,). It must treat every example by itself, and give the same answer when called again. With group_size k > 1 everything it gets has
            shape (b, k, ...), and it returns (b,): example pairs for DPO.
        per_example: (B, ...) tensors without gradient of their own: the reference model's log-likelihoods, say. B is the length of the first, or
            the largest example_index + 1, rounded up to whole groups.
        group_size: so many neighbouring examples stay together.
        likeliest: the share of each example's tokens that count, those of the smallest loss, one at least: the loss selection of arXiv 2406.09179.
            The others have no part in sums, counts and gradient: their coefficient is 0 (see negligible).
        weights: (N,), floating point, without gradient of their own: factors on the log-likelihoods in the sums. counts and likeliest know nothing of
            them. Default: 1.
        bias, logit_scale, softcap, ignore_index: as in linear_log_likelihood. A temperature T is logit_scale / T and softcap / T.
        workspace: bytes for scratch and logits (default: 256 MiB on the CPU, on a GPU 2 GiB or half of what is free).
        negligible: rows whose target has 1 - p below this may leave the gradient's products: a text that is known by heart consists of such. What each
            row's gradient for its logits loses sums to 2 |coefficient * logit_scale| negligible in magnitude at most. So may rows with coefficient 0,
            which is exact; on a GPU only where negligible is above 0, for to count them it has to be waited for, and never where the kernels
            for H100 and H200 run. Rows leave where moving the others together costs less than the products saved.

    Returns:
        ExampleObjective(loss, losses, log_likelihood, counts).

    Raises:
        ArgumentError: as linear_log_likelihood; weights that want a gradient; likeliest outside (0, 1], negligible outside [0, 1); example indices or per-example tensors that do not fit; a function that does not return one
            loss for each example, or no differentiable one.
    """
    check(hidden, targets, name="hidden", softcap=softcap, workspace=workspace)
    check_head(hidden, weight, bias)
    check_negligible(negligible)
    if not isinstance(likeliest, (int, float)) or not 0 < likeliest <= 1:
        raise ArgumentError(f"likeliest must be a share of the tokens, above 0 and at most 1, got {likeliest!r}")
    examples = check_examples(targets, example_index, per_example, group_size)
    if weights is not None:
        check_per_row(weights, targets, name="weights")
        if weights.requires_grad:
            raise ArgumentError("weights must be constants here, and they want a gradient: pass weights.detach()")
    hidden, weight = in_one_dtype(hidden, weight)
    ignore_index = ignored(ignore_index)
    if not one_pass_serves(hidden):
        found = linear_log_likelihood(
            hidden, weight, targets, bias=bias, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index,
            workspace=workspace,
        )  # fmt: skip
        live = targets != ignore_index
        return objective_of(found, live, example_index, examples, function, per_example, group_size, likeliest, weights)
    at = chunk_by_example(hidden, weight, targets, example_index, examples, group_size, ignore_index, workspace)
    counted = how_many(at.counts, likeliest)
    w = None if weights is None else select_rows(at.rows, weights.to(real_of(hidden)))[0]

    def step(k: int, log_likelihood: Tensor, differentiate: bool) -> tuple[tuple[Tensor, ...], Tensor]:
        mine, rows = at.examples[k], slice(*at.chunks[k])
        counts = at.counts[mine]
        taken = None if likeliest == 1 else likeliest_of(log_likelihood, counts, counted[mine])
        summands = log_likelihood if w is None else w[rows] * log_likelihood
        summands = summands if taken is None else torch.where(taken, summands, 0)
        sums = torch.segment_reduce(summands, "sum", lengths=counts, unsafe=True)  # no atomics
        given = (counted[mine], [x[mine] for x in per_example], group_size)
        if not differentiate:
            return (_losses(function, sums, *given), sums), log_likelihood
        losses, d_sums = differentiated(lambda x: _losses(function, x, *given), sums)
        each = d_sums.repeat_interleave(counts, output_size=len(log_likelihood))
        each = each if w is None else w[rows] * each
        return (losses, sums), each if taken is None else torch.where(taken, each, 0)

    work = Work(
        at.targets, at.rows, at.chunks, at.at_a_time, step, logit_scale, softcap or 0.0, at.workspace, negligible
    )
    loss, losses, sums = one_pass(work, hidden, weight, bias)
    return ExampleObjective(loss, losses, sums, counted)


def how_many(counts: Tensor, likeliest: float) -> Tensor:
    """(B,) how many of each example's tokens count: that share of them, rounded down, but one at least where there is any."""
    if likeliest == 1:
        return counts
    share = (counts.double() * likeliest + 1e-9).long()  # a hair above, so that 0.29 of 100 is 29
    return torch.minimum(share.clamp(min=1), counts)


def likeliest_of(log_likelihood: Tensor, lengths: Tensor, counted: Tensor) -> Tensor:
    """(n,) bool: the counted[b] largest of each example's log-likelihoods, which stand example by example; of equal ones the first."""
    example = torch.arange(len(lengths), device=lengths.device).repeat_interleave(
        lengths, output_size=len(log_likelihood)
    )
    order = log_likelihood.argsort(descending=True, stable=True)
    order = order[example[order].argsort(stable=True)]
    place = torch.arange(len(order), device=order.device) - (lengths.cumsum(0) - lengths)[example]
    return torch.empty_like(example, dtype=torch.bool).index_copy_(0, order, place < counted[example])


def _losses(function: Function, sums: Tensor, counts: Tensor, per_example: Sequence[Tensor], group_size: int) -> Tensor:
    """The function's losses of some examples, checked."""
    given = [sums, counts, *per_example]
    if group_size > 1:
        given = [x.unflatten(0, (-1, group_size)) for x in given]
    return checked(function(*given), len(sums) // group_size, group_size)


def objective_of(
    log_likelihood: Tensor, live: Tensor, example_index: Tensor, examples: int, function: Function, per_example: Sequence[Tensor] = (),
    group_size: int = 1, likeliest: float = 1.0, weights: Tensor | None = None,
) -> ExampleObjective:  # fmt: skip
    """example_objective from every row's log-likelihood (N,), of which the live ones count; differentiated by autograd."""
    index = example_index.long()
    order = index.argsort(stable=True)
    both = torch.zeros((2, examples), dtype=torch.int64, device=index.device)
    rows, counts = both.index_add(1, index, torch.stack([torch.ones_like(index), live.long()]))
    counts = how_many(counts, likeliest)
    found = log_likelihood[order]
    if likeliest < 1:
        ranked = torch.where(live[order], found.detach(), -torch.inf)
        found = torch.where(likeliest_of(ranked, rows, counts), found, 0)
    if weights is not None:
        found = torch.where(live[order], weights[order], 0).to(found.dtype) * found
    sums = torch.segment_reduce(found, "sum", lengths=rows, unsafe=True)  # no atomics
    losses = _losses(function, sums, counts, per_example, group_size)
    if sums.requires_grad:
        require_graph(losses)
    return ExampleObjective(losses.sum(), losses.detach(), sums.detach(), counts)
