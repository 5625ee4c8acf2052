"""Objectives of each example's own log-likelihood (NPO, SimNPO, DPO, ...): value and gradient in one pass."""

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
from pyunlearn.ops._portable import segment_sums, to_float64, write_rows
from pyunlearn.ops.linear_log_likelihood import linear_log_likelihood


class ExampleObjective(NamedTuple):
    """The result of example_objective; `loss` alone is differentiable."""

    loss: Tensor  # (), the sum of losses
    losses: Tensor  # (B,) or (B / group_size,)
    log_likelihood: Tensor  # (B,), nats
    counts: Tensor  # (B,), scored tokens


def example_objective(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    example_index: Tensor,
    function: Function,
    *per_example: Tensor,
    group_size: int = 1,
    top_fraction: float = 1.0,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    workspace: int | None = None,
    negligible: float = 0.0,
) -> ExampleObjective:
    """Compute the sum over examples of a function of each one's log-likelihood, with its gradient in the same pass.

        sums[b] = sum of weights[n] * linear_log_likelihood[n] over the rows n with example_index[n] = b
        loss    = sum over b of function(sums[b], counts[b], *(x[b] for x in per_example))

    The rows are processed in chunks that end where examples end. Once a chunk's sums are known, `function` is
    differentiated on them, which gives the coefficient of each row, and the gradient is computed from the chunk's
    cached logits: three matrix products, two with a frozen head, within the workspace. An example longer than a chunk
    costs a fourth product for the logits that do not fit.

    float16 runs as linear_log_likelihood, since its gradients would underflow before the loss scale reaches them; so do
    torch.compile and CUDA graphs.

    Args:
        hidden: (N, D), float32, bfloat16, float16 or float64.
        weight: (V, D), on the same device; of different dtypes the wider is used for both.
        targets: (N,), int64 token ids in [0, V), or ignore_index, whose rows have no effect.
        example_index: (N,), int64, the example of each row, in [0, B); in any order, fastest in ascending order.
        function: called as function(sums (b,), counts (b,), *(x[...] for x in per_example)) on some of the examples at
            a time; returns the loss of each, (b,). It must treat the examples independently, and return the same when
            called again. With group_size k > 1 its arguments have shape (b, k, ...), and it returns (b,): pairs of
            examples for DPO.
        per_example: (B, ...) constant tensors, such as the reference model's log-likelihoods. B is the length of the
            first, or the largest example_index + 1, rounded up to whole groups.
        group_size: number of neighbouring examples that form a group.
        top_fraction: fraction of each example's tokens that is used, those with the highest log-likelihood, at least
            one: the loss selection of arXiv 2406.09179. The others are left out of sums, counts and gradient: their
            coefficient is 0 (see negligible).
        weights: (N,), floating point, constants: factors on the log-likelihoods in the sums, but not in counts and
            top_fraction. Default: 1.
        bias, logit_scale, softcap, ignore_index: as in linear_log_likelihood. A temperature T is logit_scale / T and
            softcap / T.
        workspace: bytes for scratch and cached logits (default: 256 MiB on the CPU; on a GPU 2 GiB, or half of the free
            memory).
        negligible: rows whose target has 1 - p below this may be dropped from the gradient's products: most rows of a
            memorized text. A dropped row loses a gradient at its logits whose magnitudes sum to at most
            2 |coefficient * logit_scale| negligible. Rows with coefficient 0 may be dropped too, which is exact; on a
            GPU only with negligible above 0, since counting them synchronizes, and never by the kernels for H100 and
            H200. Rows are dropped where compacting the others costs less than the products saved.

    Returns:
        ExampleObjective(loss, losses, log_likelihood, counts).

    Raises:
        ArgumentError: as linear_log_likelihood; weights that require a gradient; top_fraction outside (0, 1];
            negligible outside [0, 1); example indices or per-example tensors that do not fit; a function that does
            not return one differentiable loss for each example.

    Example:
        >>> import torch
        >>> hidden, weight, targets = torch.eye(2), torch.eye(2), torch.tensor([0, 1])  # logits [1, 0] and [0, 1]
        >>> npo = lambda sums, counts, reference: torch.nn.functional.softplus(sums - reference)
        >>> example_objective(hidden, weight, targets, torch.tensor([0, 0]), npo, torch.tensor([-1.0])).losses
        tensor([0.8972])
    """
    check(hidden, targets, name="hidden", softcap=softcap, workspace=workspace)
    check_head(hidden, weight, bias)
    check_negligible(negligible)
    if not isinstance(top_fraction, (int, float)) or not 0 < top_fraction <= 1:
        raise ArgumentError(f"top_fraction must be a share of the tokens, above 0 and at most 1, got {top_fraction!r}")
    examples = check_examples(targets, example_index, per_example, group_size)
    if weights is not None:
        check_per_row(weights, targets, name="weights")
        if weights.requires_grad:
            raise ArgumentError("weights must be constants here, and they want a gradient: pass weights.detach()")
    hidden, weight = in_one_dtype(hidden, weight)
    ignore_index = ignored(ignore_index)
    if not one_pass_serves(hidden):
        values = linear_log_likelihood(
            hidden, weight, targets, bias=bias, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index,
            workspace=workspace,
        )  # fmt: skip
        live = targets != ignore_index
        per_row = (example_index, examples, function, per_example, group_size, top_fraction, weights)
        return objective_of(values, live, *per_row)
    layout = chunk_by_example(hidden, weight, targets, example_index, examples, group_size, ignore_index, workspace)
    counted = top_counts(layout.counts, top_fraction)
    w = None if weights is None else select_rows(layout.rows, weights.to(real_of(hidden)))[0]

    def step(k: int, log_likelihood: Tensor, differentiate: bool) -> tuple[tuple[Tensor, ...], Tensor]:
        chunk, rows = layout.examples[k], slice(*layout.chunks[k])
        counts = layout.counts[chunk]  # (b,)
        used = None if top_fraction == 1 else top_tokens(log_likelihood, counts, counted[chunk])  # (m,)
        summands = log_likelihood if w is None else w[rows] * log_likelihood  # (m,)
        summands = summands if used is None else torch.where(used, summands, 0)
        sums = segment_sums(summands, counts)  # (b,)
        arguments = (counted[chunk], [x[chunk] for x in per_example], group_size)
        if not differentiate:
            return (_losses(function, sums, *arguments), sums), log_likelihood
        losses, d_sums = differentiated(lambda x: _losses(function, x, *arguments), sums)
        d_rows = d_sums.repeat_interleave(counts, output_size=len(log_likelihood))  # (m,)
        d_rows = d_rows if w is None else w[rows] * d_rows
        return (losses, sums), d_rows if used is None else torch.where(used, d_rows, 0)

    work = Work(
        layout.targets, layout.rows, layout.chunks, layout.at_a_time, step, logit_scale, softcap or 0.0,
        layout.workspace, negligible,
    )  # fmt: skip
    loss, losses, sums = one_pass(work, hidden, weight, bias)
    return ExampleObjective(loss, losses, sums, counted)


def top_counts(counts: Tensor, top_fraction: float) -> Tensor:
    """Compute (B,) the used tokens per example: floor(top_fraction * count), but 1 at least where count is not 0."""
    if top_fraction == 1:
        return counts
    used = (to_float64(counts) * top_fraction + 1e-9).long()  # a hair above, so that 0.29 of 100 is 29
    return torch.minimum(used.to(counts.device).clamp(min=1), counts)


def top_tokens(log_likelihood: Tensor, lengths: Tensor, counted: Tensor) -> Tensor:
    """Select (n,) bool the counted[b] largest log-likelihoods of each example; of equal ones the first.

    The log-likelihoods are sorted by example, lengths[b] for example b.
    """
    example = torch.arange(len(lengths), device=lengths.device).repeat_interleave(
        lengths, output_size=len(log_likelihood)
    )
    order = log_likelihood.argsort(descending=True, stable=True)
    order = order[example[order].argsort(stable=True)]
    position = torch.arange(len(order), device=order.device) - (lengths.cumsum(0) - lengths)[example]
    return write_rows(torch.empty_like(example, dtype=torch.bool), order, position < counted[example])


def _losses(function: Function, sums: Tensor, counts: Tensor, per_example: Sequence[Tensor], group_size: int) -> Tensor:
    """Return the function's losses of some examples, checked."""
    arguments = [sums, counts, *per_example]
    if group_size > 1:
        arguments = [x.unflatten(0, (-1, group_size)) for x in arguments]
    return checked(function(*arguments), len(sums) // group_size, group_size)


def objective_of(
    log_likelihood: Tensor, live: Tensor, example_index: Tensor, examples: int, function: Function,
    per_example: Sequence[Tensor] = (), group_size: int = 1, top_fraction: float = 1.0, weights: Tensor | None = None,
) -> ExampleObjective:  # fmt: skip
    """Compute example_objective by autograd from the log-likelihoods (N,) of all rows; only live rows are used."""
    index = example_index.long()
    order = index.argsort(stable=True)
    both = torch.zeros((2, examples), dtype=torch.int64, device=index.device)
    rows, counts = both.index_add(1, index, torch.stack([torch.ones_like(index), live.long()]))
    counts = top_counts(counts, top_fraction)
    values = log_likelihood[order]
    if top_fraction < 1:
        ranked = torch.where(live[order], values.detach(), -torch.inf)
        values = torch.where(top_tokens(ranked, rows, counts), values, 0)
    if weights is not None:
        values = torch.where(live[order], weights[order], 0).to(values.dtype) * values
    sums = segment_sums(values, rows)
    losses = _losses(function, sums, counts, per_example, group_size)
    if sums.requires_grad:
        require_graph(losses)
    return ExampleObjective(losses.sum(), losses.detach(), sums.detach(), counts)
