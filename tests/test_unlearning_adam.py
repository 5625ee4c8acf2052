"""Adam in float32 on 16-bit weights, against torch's own on float32 copies."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pyunlearn.unlearning import adam
from pyunlearn.unlearning.adam import Adam, assign, exact

pytestmark = pytest.mark.usefixtures("one_thread")

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**127), max_value=2.0**127)


def gradients(count, shape=(7, 5)):
    """Return gradients of very different sizes, some of them 0."""
    draws = torch.Generator().manual_seed(1)
    each = [
        torch.randn(shape, generator=draws) * 10.0 ** torch.randint(-6, 3, shape, generator=draws) for _ in range(count)
    ]
    return [g * (torch.rand(shape, generator=draws) < 0.9) for g in each]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_steps_are_those_of_torch(dtype, momentum):
    """Bit for bit, with changes of the learning rate and steps in which a parameter has no gradient."""
    torch.manual_seed(0)
    start = torch.randn(7, 5, dtype=dtype)
    own, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = Adam([own], 1e-2, momentum), torch.optim.AdamW([theirs], 1e-2, (momentum, 0.999), weight_decay=0)
    for number, gradient in enumerate(gradients(50)):
        for p, optimizer in zip((own, theirs), optimizers, strict=True):
            p.grad = None if number == 3 else gradient.to(dtype)
            optimizer.param_groups[0]["lr"] = 1e-2 if number < 20 else 3e-6
            optimizer.step()
    assert torch.equal(own, theirs)
    assert not torch.equal(own, start)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [4, 1 << 22])
def test_offloaded_moments_give_the_same_steps(dtype, momentum, chunk, monkeypatch):
    """Bit for bit; here the copies that a GPU would work on are copies in the same memory."""
    monkeypatch.setattr(adam, "_CHUNK", chunk)
    monkeypatch.setattr(adam, "_near", lambda tensor, device: None if tensor is None else tensor.clone())
    torch.manual_seed(0)
    here = nn.Parameter(torch.randn(7, 5).to(dtype))
    away = nn.Parameter(here.detach().clone())
    optimizers = Adam([here], 1e-5, momentum), Adam([away], 1e-5, momentum, offload=True)
    for gradient in gradients(10):
        for p, optimizer in zip((here, away), optimizers, strict=True):
            p.grad = gradient.to(dtype)
            optimizer.step()
    assert torch.equal(exact(here, optimizers[0].rests.get(here)), exact(away, optimizers[1].rests.get(away)))
    for name, values in optimizers[0].state[here].items():
        assert torch.equal(torch.as_tensor(values), torch.as_tensor(optimizers[1].state[away][name]))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_moments_are_in_the_main_memory(dtype):
    """While the weight is on the GPU; the steps are the same."""
    here = nn.Parameter(torch.randn(7, 5, device="cuda").to(dtype))
    away = nn.Parameter(here.detach().clone())
    optimizers = Adam([here], 1e-5), Adam([away], 1e-5, offload=True)
    for gradient in gradients(10):
        for p, optimizer in zip((here, away), optimizers, strict=True):
            p.grad = gradient.to("cuda", dtype)
            optimizer.step()
    assert torch.equal(here, away)
    assert optimizers[1].state[away]["second"].device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [4, 1 << 22])
def test_16_bit_weights_move_as_float32_copies_do(dtype, chunk, monkeypatch):
    """Bit for bit over 50 steps, most of them smaller than the gap between two 16-bit numbers; also in pieces."""
    monkeypatch.setattr(adam, "_CHUNK", chunk)
    torch.manual_seed(0)
    narrow = nn.Parameter(torch.randn(7, 5).to(dtype))
    wide, start = nn.Parameter(narrow.detach().float()), narrow.detach().clone()
    own, theirs = Adam([narrow], 1e-5), torch.optim.AdamW([wide], 1e-5, (0.0, 0.999), weight_decay=0)
    for gradient in gradients(50):
        narrow.grad, wide.grad = gradient.to(dtype), gradient.to(dtype).float()
        own.step()
        theirs.step()
    assert torch.equal(exact(narrow, own.rests[narrow]), wide)
    torch.testing.assert_close(narrow, wide.detach().to(dtype), rtol=2**-7, atol=0)
    assert not torch.equal(exact(narrow, own.rests[narrow]), start.float())


@given(st.lists(FLOATS, min_size=1, max_size=20))
def test_a_bfloat16_weight_and_its_rest_are_a_float32(values):
    """Every number returns, and the weight alone is as near to it as a bfloat16 number can be."""
    value = torch.from_numpy(np.array(values, dtype=np.float32))
    weight, rest = torch.zeros(len(values), dtype=torch.bfloat16), torch.zeros(len(values), dtype=torch.int16)
    assign(weight, rest, value.clone())
    assert torch.equal(exact(weight, rest).view(torch.int32), value.view(torch.int32))
    nearest = (value.bfloat16().double() - value.double()).abs()
    assert torch.equal((weight.double() - value.double()).abs(), nearest)


def test_a_trained_weight_costs_few_bytes():
    """Second moment 4, or 1; the rest of bfloat16 2, of float16 4; a first moment only where there is momentum."""
    bytes_of = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for momentum, bound in ((0.0, None), (0.9, None), (0.0, 1.0)):
            p = nn.Parameter(torch.ones(1000, dtype=dtype))
            optimizer = Adam([p], 1e-3, momentum, clipped_to=bound)
            p.grad = torch.ones_like(p)
            optimizer.step()
            held = [*optimizer.rests.values(), *(v for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))]
            bytes_of[dtype, momentum, bound] = sum(t.nbytes for t in held) / 1000
    assert [*bytes_of.values()] == [4, 8, 1, 6, 10, 3, 8, 12, 5]
