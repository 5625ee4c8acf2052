"""Cases of example_objective: objectives, examples of several lengths, and the definition in PyTorch."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from heads import (
    Case,
    bytes_of,
    cast,
    make,
    plain,
)

from pyunlearn.ops import example_objective


def ascent(sums, counts, before):
    """Compute gradient ascent's loss: the mean log-likelihood of an example's tokens."""
    return sums / counts.clamp(min=1)


def npo(sums, counts, before):
    """Compute the loss of negative preference optimization (NPO)."""
    return 20 * F.softplus(0.1 * (sums - before))


def simnpo(sums, counts, before):
    """Compute the loss of SimNPO, which has no reference model."""
    return 0.8 * F.softplus(2.5 * sums / counts.clamp(min=1) + 3.0)


def dpo(sums, counts, before):
    """Compute the loss of direct preference optimization (DPO) for pairs (chosen, rejected)."""
    margin = sums - before
    return F.softplus(-0.1 * (margin[:, 0] - margin[:, 1]))


class Objective(NamedTuple):
    """A loss function and the number of examples in one of its groups."""

    function: object
    group_size: int = 1


OBJECTIVES = {"ascent": Objective(ascent), "npo": Objective(npo), "simnpo": Objective(simnpo), "dpo": Objective(dpo, 2)}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)

# rows of each example: the first, one in the middle and the last have none; no order
LENGTHS = (2, 0, 9, 4, 1, 7, 5, 0)
ROWS = sum(LENGTHS)


def layout(lengths=LENGTHS, *, seed=0, ordered=False):
    """Return the example index of each row."""
    index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return index if ordered else index[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))]


def reference_likelihoods(case, index, examples):
    """Return log-likelihoods of a reference model, near those of the head."""
    case = cast(case, dtype=torch.float64, device="cpu")
    actual = plain(*case[:2], case.targets, bias=case.bias)
    return torch.linspace(-3, 3, examples, dtype=torch.float64).index_add(0, index, actual)


class Problem(NamedTuple):
    """A case, the example index of its rows, and the reference log-likelihood of each example."""

    case: Case
    index: torch.Tensor  # type: ignore[assignment]  # hides tuple.index
    before: torch.Tensor


def problem(width=20, vocabulary=203, *, lengths=LENGTHS, ordered=False, seed=0, device="cpu", **options):
    """Return a problem with examples of these lengths, their rows shuffled unless `ordered`."""
    case = make(sum(lengths), width, vocabulary, seed=seed, device=device, **options)
    index = layout(lengths, seed=seed, ordered=ordered)
    before = reference_likelihoods(case, index, len(lengths))
    real = torch.promote_types(case.hidden.dtype, torch.float32)
    return Problem(case, index.to(device), before.to(device, real))


def definition(hidden, weight, targets, index, function, before, *, group_size=1, **options):
    """Return (loss, losses, sums, counts), computed in plain PyTorch."""
    actual = plain(hidden, weight, targets, **options)
    sums = actual.new_zeros(len(before)).index_add(0, index, actual)
    counts = torch.bincount(index[targets != options.get("ignore_index", -100)], minlength=len(before))
    task = [sums, counts, before.to(sums)]
    losses = function(*(x.view(-1, group_size) for x in task) if group_size > 1 else task)
    return losses.sum(), losses.detach(), sums.detach(), counts


def evaluate(op, task, objective, *, factor=1.0, **options):
    """Return [loss, losses, log_likelihood, counts, gradients of factor * loss for hidden, weight and bias if any]."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in task.case[:3]]
    loss, *others = op(
        *leaves[:2],
        task.case.targets,
        task.index,
        objective.function,
        task.before,
        group_size=objective.group_size,
        bias=leaves[2],
        **options,
    )
    assert not any(x.requires_grad for x in others)
    gradients = torch.autograd.grad(factor * loss, [leaf for leaf in leaves if leaf is not None])
    return [loss.detach(), *others, *gradients]


def truth(task, objective, **options):
    """Return what `evaluate` should return, computed by the definition in float64."""
    case = cast(task.case, dtype=torch.float64, device="cpu")
    return evaluate(definition, Problem(case, task.index.cpu(), task.before.double().cpu()), objective, **options)


def graph(task, objective, trained=(0, 1, 2), **options):
    """Return the op's result, and hidden, weight and bias; the `trained` ones require a gradient."""
    leaves = [t.detach().clone().requires_grad_(i in trained) for i, t in enumerate(task.case[:3])]
    actual = example_objective(
        *leaves[:2],
        task.case.targets,
        task.index,
        objective.function,
        task.before,
        group_size=objective.group_size,
        bias=leaves[2],
        **options,
    )
    return actual, leaves


# the number of rows whose logits fit the workspace; None: the default, all of them; 0: none, so they are recomputed
CAPACITIES = [None, 10, 4, 1, 0]
any_capacity = pytest.mark.parametrize("capacity", CAPACITIES)


def workspace_for(capacity, case):
    """Return the workspace in bytes that fits the logits of `capacity` rows."""
    return None if capacity is None else bytes_of(capacity, case) if capacity else 0
