"""token_statistics: memory, PyTorch's own checks, and errors."""

import pytest
import torch
from coverings import grid
from heads import Allocations, assert_equal, elsewhere, ids, make, products
from statistics_cases import OPS, op_module, scored

from pyunlearn.errors import ArgumentError
from pyunlearn.ops import _backend, token_statistics, token_statistics_from_logits
from pyunlearn.ops._plan import MIB

pytestmark = pytest.mark.usefixtures("poisoned")


# ---------------------------------------------------------------- cost, and PyTorch's own checks


def watched():
    """Return Allocations that record inside token_statistics."""
    used = Allocations()
    used.inside[torch.ops.pyunlearn.token_statistics.default] = op_module._forward
    return used


@pytest.mark.parametrize("workspace", [MIB, 4 * MIB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cost(workspace, dtype, device):
    """One product, a quarter of the workspace for a block of logits, a few numbers a row, never (N, V) of anything."""
    rows, width, vocabulary = 1024, 8, 8192  # 32 MiB of float32 logits
    case = make(rows, width, vocabulary, dtype=dtype, device=device, masked=0.3)
    seen = []

    def run():
        with watched() as used:
            scored(case, workspace=workspace)
        seen.append(used)

    assert products(case, run) == 1
    blocks = 8 if _backend.kernels_for(case.hidden) == "reference" else 1  # plain PyTorch copies a block
    assert workspace // 8 < seen[0].largest <= workspace // 4 * blocks
    assert seen[0].peak <= workspace // 4 * blocks + rows * 8 * 24 + MIB // 4


def test_opcheck(device):
    """Schema, fake kernels and the missing autograd of both ops must pass torch.library.opcheck."""
    ops, (hidden, weight, bias, targets) = torch.ops.pyunlearn, make(4, 8, 90, device=device)
    torch.library.opcheck(ops.token_statistics.default, (hidden, weight, bias, targets, 0.5, 3.0, -100, None))
    torch.library.opcheck(
        ops.token_statistics.default, (hidden.double(), weight.double(), None, targets, 1.0, 0.0, -100, 0)
    )
    logits = hidden @ weight.T
    for bias_or_none in (bias, None):
        torch.library.opcheck(
            ops.token_statistics_from_logits.default, (logits.bfloat16(), bias_or_none, targets, 0.5, 3.0, -100)
        )


@pytest.mark.full
@grid(op=OPS, dynamic=[False, True], strength=1)
def test_compile(op, dynamic, device):
    """torch.compile(fullgraph=True) must compile it and agree with eager bit for bit, at every shape."""
    torch._dynamo.reset()

    def function(hidden, weight, targets, bias):
        return op(hidden, weight, targets, bias=bias, softcap=4.0)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (6, 9) if dynamic else (6,):
        hidden, weight, bias, targets = make(rows, 8, 200, device=device, masked=0.3)
        assert_equal(compiled(hidden, weight, targets, bias), function(hidden, weight, targets, bias))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden": ids(3, 4)}, r"hidden must be a float32, .*, got torch\.int64 of shape \(3, 4\)"),
        ({"targets": ids(4)}, r"one token id for each row of hidden, shape \(3,\), got \(4,\)"),
        ({"targets": torch.ones(3)}, r"targets must be an int64 tensor"),
        ({"targets": ids(3, **elsewhere)}, "targets are on meta and hidden on cpu: move them to one device"),
        ({"weight": torch.ones(10, 5)}, r"weight must have shape \(V, 4\) to match hidden .*, got \(10, 5\)"),
        ({"weight": torch.ones(10, 4, **elsewhere)}, "weight is on meta and hidden on cpu: move them to one device"),
        ({"bias": torch.ones(9)}, r"bias must have shape \(10,\), one number for each vocabulary entry, got \(9,\)"),
        ({"bias": torch.ones(10, **elsewhere)}, "bias is on meta and the rest on cpu: move them to one device"),
        ({"softcap": 0.0}, r"softcap must be positive, got 0\.0"),
        ({"workspace": -1}, "workspace must be a number of bytes, 0 or more, got -1"),
    ],
)
def test_errors(changes, sentence):
    """Each wrong argument raises an error that names it, the requirement and the value."""
    case = make(3, 4, 10)
    with pytest.raises(ArgumentError, match=sentence):
        token_statistics(**{"hidden": case.hidden, "weight": case.weight, "targets": case.targets} | changes)
    if "bias" in changes:
        with pytest.raises(ArgumentError, match=sentence.replace("hidden", "logits")):
            token_statistics_from_logits(torch.ones(3, 10), case.targets, **changes)
