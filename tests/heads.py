"""Shared helpers of the op tests: cases, their definition in PyTorch, comparisons, counts of memory and products."""

import math
import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pyunlearn.ops import _backend, _plan

# the package's attributes of these names are the functions
op_module = sys.modules["pyunlearn.ops.linear_log_likelihood"]
logits_module = sys.modules["pyunlearn.ops.log_likelihood"]
kl_module = sys.modules["pyunlearn.ops.kl_divergence"]
statistics_module = sys.modules["pyunlearn.ops.token_statistics"]

TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-12}
on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)])


def plain(hidden, weight, targets, *, workspace=None, **options):
    """Compute the definition in plain PyTorch."""
    return plain_from_logits(hidden @ weight.T, targets, **options)


def plain_from_logits(z, targets, *, bias=None, logit_scale=1.0, softcap=None, ignore_index=-100):
    """Compute the definition from logits, 16-bit ones in float32, as is common."""
    z = (z if bias is None else z + bias) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z if z.dtype.itemsize > 2 else z.float()
    return -F.cross_entropy(z, targets, reduction="none", ignore_index=ignore_index)


class Case(NamedTuple):
    """Hidden states (N, D), an output head (V, D) with its bias (V,) or None, and targets (N,)."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor


def make(rows, width, vocabulary, *, dtype=torch.float32, device="cpu", bias=True, masked=0.0, seed=0):
    """Return a case with logits of standard deviation near 2 and a share `masked` of its rows ignored."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g)
    weight = torch.randn(vocabulary, width, generator=g) * (2 / math.sqrt(width))
    offset = torch.randn(vocabulary, generator=g) if bias else None
    targets = torch.randint(vocabulary, (rows,), generator=g)
    targets[torch.rand(rows, generator=g) < masked] = -100
    return cast(Case(hidden, weight, offset, targets), dtype=dtype, device=device)


def cast(case, **to):
    """Return the case on another device or in another dtype."""
    moved = [None if t is None else t.to(**to) for t in case[:3]]
    return Case(*moved, case.targets.to(to.get("device", case.targets.device)))


def error(actual, wanted):
    """Return the largest difference, relative to the largest wanted number or to 1, if that is larger."""
    actual, wanted = actual.detach(), wanted.detach().double().cpu()
    size = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    return float((actual.double().cpu() - wanted).abs().max()) / size if wanted.numel() else 0.0


def assert_agree(actual, wanted, tolerance):
    """Assert that values and gradients differ by no more than the tolerance, and that none is NaN."""
    assert [f.shape for f in actual] == [w.shape for w in wanted]
    errors = [error(f, w) for f, w in zip(actual, wanted, strict=True)]
    assert all(e <= tolerance for e in errors), errors


def saved_elsewhere():
    """Return hooks that store the tensors saved for backward in other memory, as `save_on_cpu` does."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x)


def assert_equal(actual, wanted):
    """Assert equality bit for bit."""
    assert all(torch.equal(f, w) for f, w in zip(actual, wanted, strict=True)), [
        error(f, w) for f, w in zip(actual, wanted, strict=True)
    ]


def tensors_in(values):
    """Yield the tensors among nested lists, tuples and dicts, in a third of the time of PyTorch's own functions."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from tensors_in(value)


class Allocations(TorchDispatchMode):
    """Record the peak of live bytes, the largest tensor and every shape of allocations, inside our ops too."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes, self.peak, self.largest, self.shapes = {}, 0, 0, 0, {}
        library = torch.ops.pyunlearn
        self.inside = {
            library.linear_log_likelihood.default: op_module._forward,
            library.linear_log_likelihood_backward.default: op_module._backward,
            library.log_likelihood.default: logits_module._forward,
            library.log_likelihood_backward.default: logits_module._backward,
            library.token_statistics.default: statistics_module._forward,
            library.kl_divergence.default: kl_module._forward,
            library.kl_divergence_backward.default: kl_module._backward,
        }

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tensors_in((args, kwargs))}
        if function in self.inside:
            with self:
                return self.inside[function](*args, **(kwargs or {}))
        out = function(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            if tensor.untyped_storage()._cdata not in known:
                storage = tensor.untyped_storage()
                self._count(storage)
                self.largest = max(self.largest, storage.nbytes())
                shape = tuple(tensor.shape)
                self.shapes[shape] = max(self.shapes.get(shape, 0), storage.nbytes())
        if self.bytes > self.peak:  # freed storages matter only where the peak would rise
            self.alive = {at: (ref, n) for at, (ref, n) in self.alive.items() if not ref.expired()}
            self.bytes = sum(n for _, n in self.alive.values())
            self.peak = max(self.peak, self.bytes)
        return out

    def _count(self, storage):
        self.bytes += storage.nbytes() - self.alive.get(storage._cdata, (None, 0))[1]
        self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())


def ids(*shape, **options):
    """Return valid token ids."""
    return torch.ones(*shape, dtype=torch.int64, **options)


elsewhere = {"device": "meta"}


def bytes_of(rows, case):
    """Return a workspace in bytes that fits the logits of `rows` live rows, with the rest that a chunk needs."""
    (vocabulary, width), dtype = case.weight.shape, case.weight.dtype
    size, real = dtype.itemsize, 8 if dtype is torch.float64 else 4
    sums = _plan.bytes_of_sum(vocabulary, width, dtype)
    return sums + rows * (vocabulary * size + (0 if size == real else real * 8192))


def watch_chunks(monkeypatch, module):
    """Make chunks cost nothing, so that small cases use them; return the list of each call's rows per chunk."""
    monkeypatch.setattr(_plan, "balance", lambda *_: 0)
    seen, original = [], module.one_pass

    def one_pass(work, *head):
        seen.append([end - first for first, end in work.chunks])
        return original(work, *head)

    monkeypatch.setattr(module, "one_pass", one_pass)
    return seen


def products(case, function):
    """Return the number of products of all live rows with the whole head in a call, torch's and ours."""
    live, mine = int((case.targets != -100).sum()), []

    def counted(original):
        def product(out, a, b, *rest):
            mine.append(2 * out.numel() * a.shape[1])
            original(out, a, b, *rest)

        return product

    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
        for name in ("bf16_product", "bf16_gradient"):
            patch.setattr(_backend, name, counted(getattr(_backend, name)))
        function()
    return (counter.get_total_flops() + sum(mine)) / (2 * live * case.weight.numel())
