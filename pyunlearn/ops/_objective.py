"""Shared by the objectives of examples: chunks that end where examples end, losses and their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyunlearn.errors import ArgumentError
from pyunlearn.ops._check import check_targets
from pyunlearn.ops._one_pass import rows_per_chunk
from pyunlearn.ops._passes import live_rows, select_rows

Function = Callable[..., Tensor]


class Layout(NamedTuple):
    """The live rows sorted by example, and their partition into chunks."""

    targets: Tensor  # (n,)
    rows: Tensor | None  # (n,) their indices among all rows; None: all, in their order
    example: Tensor  # (n,) the example of each row, ascending
    counts: Tensor  # (B,) number of live rows of each example
    examples: list[slice]  # the examples of each chunk
    chunks: list[tuple[int, int]]  # (first, end) live rows of each chunk
    at_a_time: int  # rows that the workspace is planned for
    workspace: int


def chunk_by_example(
    hidden: Tensor, weight: Tensor, targets: Tensor, example_index: Tensor, examples: int, group_size: int,
    ignore_index: int, workspace: int | None,
) -> Layout:  # fmt: skip
    """Sort the live rows by example, stably, and cut them into chunks of whole groups of examples."""
    check_targets(targets, weight.shape[0], ignore_index)
    targets, rows = targets.long(), live_rows(targets, ignore_index)
    t, index = select_rows(rows, targets, example_index.long())
    counts = torch.zeros((examples,), dtype=torch.int64, device=t.device).index_add_(0, index, torch.ones_like(index))
    descends = (index[1:] < index[:-1]).any()
    group_rows = counts.view(-1, group_size).sum(1)
    unsorted, *sizes = torch.cat([descends[None].long(), group_rows]).tolist()  # one synchronization
    if unsorted:
        order = index.argsort(stable=True)
        rows, t, index = order if rows is None else rows[order], t[order], index[order]
    most, workspace = rows_per_chunk(len(t), hidden, weight, workspace)
    groups, chunks = _cut(sizes, most)
    slices = [slice(first * group_size, end * group_size) for first, end in groups]
    return Layout(t, rows, index, counts, slices, chunks, most, workspace)


def _cut(rows: list[int], most: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pack groups of the given numbers of rows into chunks of at most `most` rows, or of one group.

    Returns the (first, end) groups and the (first, end) rows of each chunk.
    """
    groups, chunks, first, begin, end = [], [], 0, 0, 0
    for g, size in enumerate(rows):
        if g > first and end + size - begin > most:
            groups.append((first, g))
            chunks.append((begin, end))
            first, begin = g, end
        end += size
    return [*groups, (first, len(rows))], [*chunks, (begin, end)]


def checked(losses: object, count: int, group_size: int) -> Tensor:
    """Return a function's losses (count,); raise ArgumentError where it returned anything else."""
    if not isinstance(losses, Tensor) or losses.shape != (count,):
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        each = "example" if group_size == 1 else f"group of {group_size} examples"
        raise ArgumentError(
            f"function must return one loss for each {each}, a tensor of shape {(count,)}, got {got}: "
            "leave the mean out"
        )
    return losses


def differentiated(losses_of: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses at x, and the derivative of their sum with respect to x."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        losses = losses_of(leaf)
        require_graph(losses)
        if any(leaf is not other for other in _leaves(losses)):
            raise ArgumentError(
                "function uses a tensor that wants a gradient of its own, which it would not get: detach it, or build "
                "the loss from linear_log_likelihood"
            )
        (d_x,) = torch.autograd.grad(losses.sum(), leaf) if len(x) else (leaf.detach(),)
    return losses.detach(), d_x


def require_graph(losses: Tensor) -> None:
    """Raise ArgumentError where there are losses and they require no gradient."""
    if len(losses) and not losses.requires_grad:
        raise ArgumentError(
            "function must be differentiable in its first argument, and its losses want no gradient: "
            "use torch operations"
        )


def _leaves(x: Tensor) -> list[Tensor]:
    """Return the leaf tensors of the graph that computed x."""
    seen, todo, leaves = set(), [x.grad_fn], []
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        todo += [following for following, _ in node.next_functions]
    return leaves
