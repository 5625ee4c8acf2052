"""Products of the loss's curvature with a vector, streamed batch by batch: no matrix, and no second-order graph of more than one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyunlearn.data import TokenBatch, Tokens
from pyunlearn.edits.base import Editing, wide
from pyunlearn.models.scoring import batches_on, evaluation_mode

Vector = list[Tensor]


class Curvature:
    """v -> (C + damping I) v, C the curvature of the mean over the texts of each one's NLL a token.

    "hessian": C = d^2 L / d theta^2. "gauss-newton": C = J^T (diag p - p p^T) J, J the Jacobian of the logits; never negative, and the
    Hessian where the logits are linear in the weights. Both are exact, from two backward passes through a batch's own logits (n, V).
    """

    def __init__(self, edit: Editing, tokens: Sequence[Tokens], kind: str, damping: float = 0.0) -> None:
        self.edit, self.tokens, self.kind, self.damping = edit, tokens, kind, damping

    def __call__(self, vector: Vector) -> Vector:
        """Over all texts."""
        return self._product(self.tokens, vector)

    def parts(self) -> list[Sequence[Tokens]]:
        """The texts in batches of like length."""
        order = sorted(self.tokens, key=lambda t: -len(t))
        return [order[at : at + self.edit.batch_size] for at in range(0, len(order), self.edit.batch_size)]

    def of_part(self, part: Sequence[Tokens], vector: Vector) -> Vector:
        """Over one batch alone, which stands for all."""
        return self._product(part, vector)

    def _product(self, tokens: Sequence[Tokens], vector: Vector) -> Vector:
        model, parameters = self.edit.model, list(self.edit.parameters.values())
        found = [self.damping * v for v in vector]
        one = _gauss_newton if self.kind == "gauss-newton" else _hessian
        with (
            evaluation_mode(model),
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
        ):  # the fused kernels have no second derivative
            for _, batch in batches_on(model, tokens, self.edit.batch_size):
                logits = wide_logits(self.edit, batch)
                weights = 1 / (batch.counts[batch.example].to(logits.dtype) * len(tokens))
                parts = one(logits, batch.targets, weights, parameters, vector)
                for total, part in zip(found, parts, strict=True):
                    if part is not None:
                        total.add_(part.detach())
        return found


def wide_logits(edit: Editing, batch: TokenBatch) -> Tensor:
    """(n, V) logits at the scored tokens, in float32 or float64, differentiable."""
    logits = edit.likelihood._logits(batch)
    return logits if logits.dtype == torch.float64 else logits.float()


def _hessian(
    logits: Tensor, targets: Tensor, weights: Tensor, parameters: Sequence[nn.Parameter], vector: Vector
) -> Sequence[Any]:
    log_likelihood = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    gradient = torch.autograd.grad(-(weights * log_likelihood).sum(), parameters, create_graph=True, allow_unused=True)
    terms = [(g * v).sum() for g, v in zip(gradient, vector, strict=True) if g is not None and g.requires_grad]
    if not terms:
        return [None] * len(vector)
    return torch.autograd.grad(torch.stack(terms).sum(), parameters, allow_unused=True)


def _gauss_newton(
    logits: Tensor, targets: Tensor, weights: Tensor, parameters: Sequence[nn.Parameter], vector: Vector
) -> Sequence[Any]:
    dual = torch.zeros_like(logits, requires_grad=True)
    back = torch.autograd.grad(
        logits, parameters, dual, create_graph=True, allow_unused=True
    )  # J^T dual, linear in dual
    terms = torch.stack([(g * v).sum() for g, v in zip(back, vector, strict=True) if g is not None])
    (forward,) = torch.autograd.grad(terms.sum(), dual, retain_graph=True)  # whose derivative is J v
    p = logits.detach().softmax(-1)
    middle = weights[:, None] * (p * forward - p * (p * forward).sum(-1, keepdim=True))
    return torch.autograd.grad(logits, parameters, middle, allow_unused=True)


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """While it lasts, 16-bit weights stand in float32: in 16 bits a second derivative has no digit left. Afterwards they are the same tensors again."""
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
    """By power iteration from a random vector; from below, within some percent."""
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
    """The inner product, summed in float64."""
    return float(sum(torch.dot(x.flatten().double(), y.flatten().double()) for x, y in zip(a, b, strict=True)))


def norm(a: Vector) -> float:
    """The Euclidean norm, summed in float64."""
    return dot(a, a) ** 0.5
