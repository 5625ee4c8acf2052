"""example_objective refuses wrong arguments with a sentence that names them."""

import pytest
import torch
from heads import (
    elsewhere,
    ids,
    make,
)

from pyunlearn.errors import ArgumentError
from pyunlearn.ops import example_objective

pytestmark = pytest.mark.usefixtures("poisoned")


# ---------------------------------------------------------------- errors


def broken(**changes):
    """Return valid arguments, overridden by the changes."""
    case = make(4, 4, 10)
    valid = {
        "hidden": case.hidden,
        "weight": case.weight,
        "targets": case.targets,
        "example_index": torch.tensor([0, 1, 2, 3]),
        "function": lambda sums, counts, *_: sums,
        "per_example": (),
    }
    return valid | changes


def call(**task):
    """Call example_objective with every argument by name."""
    front = [task.pop(name) for name in ("hidden", "weight", "targets", "example_index", "function")]
    return example_objective(*front, *task.pop("per_example"), **task)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"hidden": torch.ones(2, 2, 4), "targets": ids(2, 2)},
            r"hidden must have shape \(N, D\) and targets \(N,\), got targets of shape \(2, 2\): flatten both",
        ),
        (
            {"example_index": torch.ones(4)},
            r"example_index must be an int64 tensor, got torch\.float32 of shape \(4,\)",
        ),
        ({"example_index": [0, 1, 2, 3]}, "example_index must be an int64 tensor, got list"),
        ({"example_index": ids(3)}, r"one number for each target, shape \(4,\) on cpu, got \(3,\) on cpu"),
        ({"example_index": ids(4, 1)}, r"one number for each target, shape \(4,\) on cpu, got \(4, 1\) on cpu"),
        ({"example_index": ids(4, **elsewhere)}, r"one number for each target, .* on cpu, got \(4,\) on meta"),
        ({"example_index": torch.tensor([0, 1, -1, 2])}, r"example_index must lie in \[0, 3\), got -1"),
        (
            {"per_example": (torch.zeros(3),)},
            r"example_index must lie in \[0, 3\), got 3: does a per_example tensor lack entries\?",
        ),
        (
            {"per_example": (torch.zeros(4), torch.zeros(5))},
            r"per_example must be tensors of 4 entries on cpu, got torch\.float32 of shape \(5,\)",
        ),
        ({"per_example": (torch.zeros(4), 1.0)}, "must be tensors of 4 entries on cpu, got float"),
        ({"per_example": ([0, 1, 2, 3],)}, "must be tensors of 4 entries on cpu, got list"),
        ({"per_example": (torch.zeros(4, **elsewhere),)}, "must be tensors of 4 entries on cpu, got"),
        (
            {"per_example": (torch.zeros(4, requires_grad=True),)},
            "per_example tensors are constants here, and one requires a gradient: detach it",
        ),
        (
            {"per_example": (torch.zeros(5),), "group_size": 2},
            "5 examples do not make whole groups of 2: add or drop some",
        ),
        ({"group_size": 0}, "group_size must be a whole number, 1 or more, got 0"),
        ({"group_size": 2.0}, r"group_size must be a whole number, 1 or more, got 2\.0"),
        (
            {"function": lambda sums, counts: sums.mean()},
            r"function must return one loss for each example, a tensor of shape \(4,\), got \(\): leave the mean out",
        ),
        (
            {"function": lambda sums, counts: sums, "group_size": 2},
            r"one loss for each group of 2 examples, a tensor of shape \(2,\), got \(2, 2\)",
        ),
        ({"function": lambda sums, counts: 0.0}, r"a tensor of shape \(4,\), got float: leave the mean out"),
        (
            {"function": lambda sums, counts: sums.detach()},
            "function must be differentiable in its first argument, and its losses want no gradient: "
            "use torch operations",
        ),
        ({"targets": ids(3)}, r"one token id for each row of hidden, shape \(4,\), got \(3,\)"),
        ({"targets": torch.tensor([0, -100, 10, 1])}, r"targets must lie in \[0, 10\) or be -100 .*, got 10: "),
        ({"weight": torch.ones(10, 5)}, r"weight must have shape \(V, 4\) to match hidden .*, got \(10, 5\)"),
        ({"bias": torch.ones(9)}, r"bias must have shape \(10,\), one number for each vocabulary entry, got \(9,\)"),
        ({"softcap": 0.0}, r"softcap must be positive, got 0\.0: leave it None for no cap"),
        ({"workspace": -1}, "workspace must be a number of bytes, 0 or more, got -1"),
    ],
)
def test_errors(changes, sentence, dtype):
    """Each wrong argument raises an error that names it, the requirement and the value, in one pass and in two."""
    task = broken(**changes)
    task |= {"hidden": task["hidden"].to(dtype).requires_grad_(), "weight": task["weight"].to(dtype)}
    with pytest.raises(ArgumentError, match=sentence):
        call(**task)


def test_valid_arguments():
    """The arguments that the errors above start from are valid."""
    assert call(**broken()).losses.shape == (4,)


def test_parameter_inside_the_function_is_refused():
    """A parameter inside the function that requires a gradient is an error, since it would get none."""
    beta = torch.tensor(0.1, requires_grad=True)
    task = [torch.randn(4, 3, requires_grad=True), torch.randn(5, 3), torch.arange(4), torch.tensor([0, 0, 1, 1])]
    with pytest.raises(ArgumentError, match="wants a gradient of its own"):
        example_objective(*task, lambda sums, counts: sums * (2 * beta))
    example_objective(*task, lambda sums, counts: sums * beta.detach()).loss.backward()
