"""Use of the Hopper kernels by the ops: which calls they serve, and what they cost."""

import pytest
import torch
from emulated import PLACE, assert_right, evaluate, head, truth, unit
from heads import assert_agree, plain
from torch.utils.flop_counter import FlopCounterMode

from pyunlearn.ops import (
    _plan,
    example_objective,
    linear_log_likelihood,
    weighted_log_likelihood,
)
from pyunlearn.ops.hopper import dispatch

pytestmark = pytest.mark.emulator


@pytest.mark.parametrize("trained", ["hidden", "weight", "both"])
@pytest.mark.parametrize("workspace", [0, None])
def test_frozen_parts(trained, workspace, watched):
    """A frozen input costs no product, and torch computes only the products of the gradients."""
    case = head(64, 32, 600, bias=False)
    hidden, weight = case.hidden.clone(), case.weight.clone()
    hidden.requires_grad_(trained != "weight"), weight.requires_grad_(trained != "hidden")
    with FlopCounterMode(display=False) as counter:
        weighted_log_likelihood(hidden, weight, case.targets, unit(64), workspace=workspace).backward()
    expected = truth(case, unit(64))
    actual = [t.grad for t in (hidden, weight) if t.requires_grad]
    assert_agree(actual, [w for w, t in zip(expected[1:], (hidden, weight), strict=True) if t.requires_grad], 1.5e-2)
    assert counter.get_total_flops() == 2 * 64 * 32 * 600 * len(actual)
    assert watched.calls["kept_scale_rows"] == (workspace is None) * (2 if trained == "both" else 1)


def test_backward_twice(watched):
    """A retained graph gives the same gradients again, the second time from recomputed logits."""
    case = head(64, 32, 600)
    expected = truth(case, unit(64))
    assert_right(evaluate(linear_log_likelihood, case, unit(64), times=2), expected, torch.bfloat16)
    assert watched.calls["hopper_gradient"] == 1


@pytest.mark.parametrize(
    "workspace", [None, _plan.bytes_of_sum(600, 32, torch.bfloat16) + 15 * (1200 + _plan._FUSED_SCRATCH)]
)
@pytest.mark.parametrize("masked", [0.0, 0.5])
def test_one_pass(workspace, masked, watched, monkeypatch):
    """With known coefficients, rows are processed in fully cached chunks, and no product is computed twice."""
    monkeypatch.setattr(_plan, "balance", lambda *_: 0)
    case = head(100, 32, 600, masked=masked)
    expected = truth(case, unit(100))
    value = (expected[0] * unit(100)).sum()[None]
    actual = evaluate(
        lambda h, w, t, **options: weighted_log_likelihood(h, w, t, unit(100), **options),
        case,
        None,
        workspace=workspace,
    )
    assert_right([actual[0][None], *actual[1:]], [value, *expected[1:]], torch.bfloat16)
    live = int((case.targets >= 0).sum())
    assert watched.calls["hopper_statistics_kept"] == (1 if workspace is None else -(-live // 15))
    assert not watched.calls["hopper_gradient"]
    assert not watched.calls["statistics"]


def test_example_objective(watched):
    """A function of each example's sum is differentiated on the sums of these kernels."""
    case = head(60, 32, 600)
    index = torch.arange(60, device=PLACE["device"]) // 12
    hidden, weight = (t.clone().requires_grad_() for t in case[:2])

    def function(sums, counts):
        return torch.nn.functional.softplus(sums / counts)

    actual = example_objective(hidden, weight, case.targets, index, function, bias=case.bias)
    actual.loss.backward()
    h, w = (t.double().requires_grad_() for t in case[:2])
    sums = plain(h, w, case.targets, bias=case.bias.double()).view(5, 12).sum(1)
    function(sums, 12).sum().backward()
    assert_agree([actual.log_likelihood], [sums], 1e-5)
    assert_agree([hidden.grad, weight.grad], [h.grad, w.grad], 1.5e-2)
    assert watched.calls["hopper_statistics_kept"] == 1


@pytest.mark.parametrize("change", ["float32", "width", "stride", "offset", "transposed"])
def test_unsupported_inputs_run_on_the_portable_kernels(change, watched):
    """Other types, widths and alignments run on the portable kernels, with the same results."""
    case = head(10, 16, 200, bias=False)
    expected = truth(case, unit(10))[0]
    hidden, weight = case.hidden, case.weight
    if change == "float32":
        hidden, weight = hidden.float(), weight.float()
    elif change == "width":
        hidden, weight = hidden[:, :12], weight[:, :12]
        expected = plain(hidden.double(), weight.double(), case.targets)
    elif change == "stride":
        weight = weight.new_zeros(200, 20)[:, :16].copy_(weight)
    elif change == "offset":
        weight = weight.new_zeros(200, 24)[:, 4:20].copy_(weight)
    else:
        weight = weight.T.contiguous().T
    assert not dispatch.serves(hidden, weight)
    assert_agree([linear_log_likelihood(hidden, weight, case.targets)], [expected], 1e-5)
    assert watched.calls["statistics"]
    assert not watched.calls["hopper_statistics"]


def test_strided_weight_and_memory_from_elsewhere(emulated):
    """Rows aligned to 16 bytes are read in place; other memory is copied first."""
    case = head(10, 16, 200, bias=False)
    expected = truth(case, unit(10))
    strided = case._replace(weight=torch.zeros(200, 32, dtype=torch.bfloat16)[:, 8:24].copy_(case.weight))
    assert dispatch.serves(strided.hidden, strided.weight)
    assert_agree([linear_log_likelihood(*strided[:2], case.targets)], expected[:1], 1e-5)
    assert emulated.last["hopper_statistics"][1] == strided.weight.data_ptr()
    store = bytearray(200 * 16 * 2 + 16)
    odd = next(
        t
        for t in (torch.frombuffer(store, dtype=torch.bfloat16, offset=o, count=3200) for o in (2, 4))
        if t.data_ptr() % 16
    )
    odd = odd.view(200, 16).copy_(case.weight)
    assert_agree([linear_log_likelihood(case.hidden, odd, case.targets)], expected[:1], 1e-5)


def test_one_row_that_is_expanded(emulated):
    """A single row of stride 0 is copied first."""
    case = head(10, 16, 200, bias=False)
    row = case.hidden[:1].expand(4, 16)[:1]
    assert row.stride(0) == 0
    assert_agree([linear_log_likelihood(row, case.weight, case.targets[:1])], [truth(case, unit(10))[0][:1]], 1e-5)


@pytest.mark.parametrize("workspace", [0, None])
def test_a_coefficient_of_0_hides_nan(workspace, watched):
    """A row that is NaN, or beyond the range, and whose coefficient is 0 leaves the other rows' gradients alone."""
    case, weights = head(300, 16, 576), unit(300)
    clean = truth(case, weights.index_fill(0, torch.tensor([9, 40]), 0))
    case.hidden[9, 3], case.hidden[40] = torch.nan, 1e30
    weights[[9, 40]] = 0
    actual = evaluate(linear_log_likelihood, case, weights, workspace=workspace)
    others = torch.tensor([i for i in range(300) if i not in (9, 40)])
    assert_right([actual[0][others], *actual[1:]], [clean[0][others], *clean[1:]], torch.bfloat16)
    weights[9] = 1
    assert evaluate(linear_log_likelihood, case, weights, workspace=workspace)[2].isnan().any()


def test_the_environment_variable_chooses(monkeypatch):
    """PYUNLEARN_HOPPER=0 turns them off, 1 skips the subprocess; another value raises ValueError."""
    for value in ("", "0", "1"):
        monkeypatch.setenv("PYUNLEARN_HOPPER", value)
        assert dispatch.requested() == value
    monkeypatch.setenv("PYUNLEARN_HOPPER", "0")
    assert not dispatch.run_on(torch.device("cuda", 0))
    monkeypatch.setenv("PYUNLEARN_HOPPER", "yes")
    with pytest.raises(ValueError, match="PYUNLEARN_HOPPER must be 1 or 0, got 'yes'"):
        dispatch.requested()
