"""Products of the loss's curvature with a vector, batch by batch: no matrix, and a second-order graph of one batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyunlearn.data import TokenBatch
from pyunlearn.edits.base import Editing, wide
from pyunlearn.models.scoring import evaluation_mode
from pyunlearn.ops._portable import on_one_device, to_float64

Vector = list[Tensor]


class Curvature:
    """The function v -> (C + damping I) v, where C is the curvature of the mean over texts of the NLL per token.

    "hessian": C = d^2 L / d theta^2. "gauss-newton": C = J^T (diag p - p p^T) J, where J is the Jacobian of the logits;
    it has no negative eigenvalue, and equals the Hessian where the logits are linear in the weights. Both are exact,
    from two backward passes through a batch's own logits (n, V).
    """

    def __init__(self, edit: Editing, roles: Sequence[str], kind: str, damping: float = 0.0) -> None:
        self.edit, self.kind, self.damping = edit, kind, damping
        self.tokens = [t for role in roles for t in edit.tokens.get(role, ())]
        self.shares = [share for role in roles for share in edit.shares.get(role, ())]

    def __call__(self, vector: Vector) -> Vector:
        """Return the product over all texts."""
        return self.of_part(range(len(self.tokens)), vector)

    def parts(self) -> list[Sequence[int]]:
        """Return the indices of the texts in batches of similar length."""
        order, size = sorted(range(len(self.tokens)), key=lambda i: -len(self.tokens[i])), self.edit.config.batch_size
        return [order[at : at + size] for at in range(0, len(order), size)]

    def of_part(self, part: Sequence[int], vector: Vector) -> Vector:
        """Return the product over the texts at some indices; over one batch it estimates that over all texts."""
        tokens, shares = [self.tokens[i] for i in part], [self.shares[i] for i in part]
        records = math.fsum(shares)
        parameters = list(self.edit.parameters.values())
        totals = [self.damping * v for v in vector]
        product = _gauss_newton if self.kind == "gauss-newton" else _hessian
        # the fused attention kernels have no second derivative
        with evaluation_mode(self.edit.model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for indices, batch in self.edit.batches(tokens):
                logits = wide_logits(self.edit, batch)
                share = torch.tensor([shares[i] for i in indices]).to(logits)[batch.example]  # (n,)
                weights = share * (1 / (batch.counts[batch.example].to(logits.dtype) * records))
                terms = product(logits, batch.targets, weights, parameters, vector)
                for total, term in zip(totals, terms, strict=True):
                    if term is not None:
                        total.add_(term.detach())
        return totals


def wide_logits(edit: Editing, batch: TokenBatch) -> Tensor:
    """Return (n, V) logits at the scored tokens, in float32 or float64, differentiable."""
    logits = edit.lm.likelihood.logits(batch)
    return logits if logits.dtype == torch.float64 else logits.float()


def _hessian(
    logits: Tensor, targets: Tensor, weights: Tensor, parameters: Sequence[nn.Parameter], vector: Vector
) -> Sequence[Any]:
    """Return the product of a batch's Hessian, None for a parameter that the loss does not depend on."""
    log_likelihood = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    gradient = torch.autograd.grad(-(weights * log_likelihood).sum(), parameters, create_graph=True, allow_unused=True)
    terms = [(g * v).sum() for g, v in zip(gradient, vector, strict=True) if g is not None and g.requires_grad]
    if not terms:
        return [None] * len(vector)
    return torch.autograd.grad(torch.stack(on_one_device(terms)).sum(), parameters, allow_unused=True)


def _gauss_newton(
    logits: Tensor, targets: Tensor, weights: Tensor, parameters: Sequence[nn.Parameter], vector: Vector
) -> Sequence[Any]:
    """Return the product of a batch's Gauss-Newton matrix, None for a parameter that the logits do not depend on."""
    dual = torch.zeros_like(logits, requires_grad=True)
    # J^T dual, which is linear in dual: its derivative along v is J v
    back = torch.autograd.grad(logits, parameters, dual, create_graph=True, allow_unused=True)
    terms = [(g * v).sum() for g, v in zip(back, vector, strict=True) if g is not None]
    (forward,) = torch.autograd.grad(torch.stack(on_one_device(terms)).sum(), dual, retain_graph=True)
    p = logits.detach().softmax(-1)
    middle = weights[:, None] * (p * forward - p * (p * forward).sum(-1, keepdim=True))
    return torch.autograd.grad(logits, parameters, middle, allow_unused=True)


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Convert 16-bit weights to float32 for a while, since a second derivative has no precise digit in 16 bits.

    Afterwards the parameters refer to the same tensors as before.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.bfloat16, torch.float16)]
    narrow, gradients = [t.data for t in tensors], [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
        t.data = t.data.float()
    try:
        yield
    finally:
        for t, data, gradient in zip(tensors, narrow, gradients, strict=True):
            t.grad = None
            t.data = data
            t.grad = gradient


def largest_eigenvalue(product: Curvature, *, iterations: int = 8, seed: int = 0) -> float:
    """Estimate the largest eigenvalue by power iteration from a random vector: some percent too small at most."""
    generator = torch.Generator().manual_seed(seed)
    vector = [
        torch.randn(p.shape, generator=generator, dtype=wide(p).dtype).to(p.device)
        for p in product.edit.parameters.values()
    ]
    value = 0.0
    for _ in range(iterations):
        size = norm(vector)
        if not 0 < size < float("inf"):
            break
        vector = product([v / size for v in vector])
        value = norm(vector)
    return value


def dot(a: Vector, b: Vector) -> float:
    """Return the inner product, summed in float64.

    >>> dot([torch.ones(2), torch.ones(1)], [torch.ones(2), 3 * torch.ones(1)])
    5.0
    """
    products = [torch.dot(to_float64(x.flatten()), to_float64(y.flatten())) for x, y in zip(a, b, strict=True)]
    return float(sum(on_one_device(products)))


def norm(a: Vector) -> float:
    """Return the Euclidean norm, summed in float64.

    >>> norm([3 * torch.ones(1), 4 * torch.ones(1)])
    5.0
    """
    return dot(a, a) ** 0.5
