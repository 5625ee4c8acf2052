"""linear_log_likelihood and log_likelihood on a GPU: CUDA graphs, streams, synchronization, 64-bit indices."""

import pytest
import torch
import torch.utils.checkpoint
from heads import (
    Case,
    assert_agree,
    assert_equal,
    cast,
    make,
    on_gpu,
    plain,
)
from linear_cases import both_ops, evaluate, from_logits, truth

from pyunlearn.ops import linear_log_likelihood


@on_gpu
@both_ops
def test_cuda_graph(op, device, backend):
    """Forward and backward can be captured in a CUDA graph; a replay follows new inputs, masks and wrong targets."""
    case = make(64, 32, 5000, device=device, masked=0.5)
    leaves = [t.requires_grad_() for t in case[:3]]
    coefficients = torch.linspace(-1, 2, 64, device=device)

    def step():
        values = op(leaves[0], leaves[1], case.targets, bias=leaves[2])
        return [values.detach(), *torch.autograd.grad(values, leaves, coefficients)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = step()
    for seed, masked in ((0, 0.5), (1, 0.0), (2, 1.0)):
        new = make(64, 32, 5000, device=device, masked=masked, seed=seed)
        with torch.no_grad():
            for static, fresh in zip((*leaves, case.targets), new, strict=True):
                static.copy_(fresh)
        graph.replay()
        assert_agree(actual, truth(new), 4e-6)
    case.targets[3] = 10**9
    graph.replay()
    assert actual[0].isnan().nonzero().flatten().tolist() == [3]


@on_gpu
@both_ops
def test_side_stream(op, device, backend):
    """Work is queued on the current stream, so a call on a busy side stream sees earlier work there."""
    case = make(200, 64, 5000, device=device, masked=0.3)
    wanted = evaluate(op, case)
    late = torch.zeros_like(case.hidden)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # cycles, about 10 ms
        late.copy_(case.hidden)
        actual = evaluate(op, case._replace(hidden=late))
    side.synchronize()
    assert_equal(actual, wanted)


@on_gpu
def test_no_synchronization(device, backend):
    """Nothing synchronizes with the GPU, forward or backward, except for dropping ignored rows at the start."""
    case = make(32, 16, 500, device=device, masked=0.3)
    hidden, weight = (t.clone().requires_grad_() for t in case[:2])
    live = case.targets >= 0
    rows, targets = hidden[live], case.targets[live]
    total = linear_log_likelihood(hidden, weight, case.targets).sum()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = total + from_logits(hidden, weight, case.targets).sum()
        (total + linear_log_likelihood(rows, weight, targets, ignore_index=None).sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert weight.grad.isfinite().all()


@on_gpu
def test_past_32_bits(device, backend):
    """Beyond 2^31 logits indices must not wrap: every row of 20000 x 128256 has the value that it has alone."""
    case = make(20000, 16, 128256, device=device, dtype=torch.bfloat16, bias=False)
    actual = linear_log_likelihood(*case[:2], case.targets)
    some = torch.tensor([0, 1, 9999, 16743, 16744, 19998, 19999])  # 16744 * 128256 > 2^31
    few = cast(Case(case.hidden[some], case.weight, None, case.targets[some]), device="cpu")
    assert_agree([actual[some]], [plain(*cast(few, dtype=torch.float64)[:2], few.targets)], 2e-6)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@both_ops
def test_second_gpu(op):
    """Tensors of the second GPU are processed there while the first is current."""
    case = make(20, 16, 500, masked=0.3)
    with torch.cuda.device(0):
        assert_agree(evaluate(op, cast(case, device="cuda:1")), truth(case), 4e-6)
