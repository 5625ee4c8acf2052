"""Gradients of single examples, reduced to numbers: norms, and inner products with one given gradient.

Each parameter's gradient is reduced to a number as soon as the backward pass has computed it, and freed. No example's
whole gradient is ever in memory; in addition to the weights there is at most the one gradient to compare with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyunlearn.data import Tokens
from pyunlearn.errors import ArgumentError, ModelError
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import Scorer, evaluation_mode
from pyunlearn.ops._portable import on_one_device, to_float64

Floats = NDArray[np.float64]
Visit = Callable[[str, Tensor], None]

GROUPS = ("embed", "first third", "middle third", "last third", "head")
"""Layer groups of parameters: before the blocks, in one third of them, or after them. A head tied to the embedding
counts as embed."""


def gradient_norms(model: Any, tokens: Sequence[Tokens], *, workspace: int | None = None) -> Floats:
    """Compute the norm of each example's gradient: || grad of its mean NLL a token ||_2, over all trained parameters.

    Args:
        model: a transformers language model, or a LanguageModel; its weights, gradients and mode stay as they are.
        tokens: B examples, one backward pass each.
        workspace: bytes for logits, see `pyunlearn.ops.linear_log_likelihood`; a LanguageModel has its own.

    Returns:
        (B,) float64, 0 or more.

    Raises:
        ArgumentError: no example. ModelError: no parameter that trains, or no language model.

    Source: Paul et al. 2021, arXiv 2107.07075 (GraNd: the mean over models early in training).
    """
    norms = np.zeros(len(tokens))
    for i, parts in _each(model, tokens, lambda name, gradient: _square(gradient), workspace):
        norms[i] = float(torch.stack(on_one_device(list(parts.values()))).sum().sqrt())
    return norms


def gradient_inner_products(
    model: Any, tokens: Sequence[Tokens], direction: dict[str, Tensor], *, workspace: int | None = None
) -> dict[str, Floats]:
    """Compute the inner product of each example's gradient with one direction, by layer group: the G-effect.

        < grad of example i's mean NLL a token, direction >   summed over the group's parameters

    Args:
        model: a transformers language model, or a LanguageModel; its weights, gradients and mode stay as they are.
        tokens: B examples, one backward pass each.
        direction: a tensor for each parameter that trains, by name, on any device: `mean_gradient` of an objective.
        workspace: bytes for logits; a LanguageModel has its own.

    Returns:
        (B,) float64 for each of `GROUPS`; their sum is the whole inner product. With an unlearning objective's
        gradient, the mean over the forget set is its G-effect there, and likewise on the retain set: wanted are below
        0, and 0 or above.

    Raises:
        ArgumentError: no example, or a direction that misses a parameter. ModelError: as `gradient_norms`.

    Source: Wang et al. 2025, arXiv 2502.19301.
    """
    groups = layer_groups(model)
    missing = [name for name in groups if name not in direction]
    if missing:
        raise ArgumentError(
            f"direction must have a tensor for each parameter that trains, and has none for {missing[0]}"
        )
    products = {group: np.zeros(len(tokens)) for group in GROUPS}

    def product(name: str, gradient: Tensor) -> Tensor:
        other = direction[name].to(gradient.device)
        return torch.dot(gradient.flatten().float(), other.flatten().float())

    for i, parts in _each(model, tokens, product, workspace):
        for name, part in parts.items():
            products[groups[name]][i] += float(part)
    return products


def mean_gradient(
    model: Any,
    tokens: Sequence[Tokens],
    function: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    weights: Sequence[float] | None = None,
    batch_size: int = 8,
    workspace: int | None = None,
) -> dict[str, Tensor]:
    """Compute the gradient of an objective, averaged over examples.

    Args:
        model: a transformers language model, or a LanguageModel; its weights, gradients and mode stay as they are.
        tokens: B examples.
        function: from (b,) summed log-likelihoods and (b,) scored tokens to (b,) losses, as in `pyunlearn.methods` with
            reduction="none"; None for the NLL a token.
        weights: B numbers, 0 or more, of the examples in the mean; None: each counts the same.
        batch_size: examples in one pass.
        workspace: bytes for logits; a LanguageModel has its own.

    Returns:
        name -> float32 tensor of the parameter's shape, for each that trains; zeros for one without a gradient.

    Raises:
        ArgumentError: no example. ModelError: as `gradient_norms`.
    """
    lm = LanguageModel.of(model, workspace=workspace, needs_tokenizer=False)
    parameters, count = trained_parameters(lm.module), len(tokens) if weights is None else math.fsum(weights)
    loss = function or (lambda sums, counts: -sums / counts)
    mean = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}

    def visit(name: str, gradient: Tensor) -> None:
        mean[name].add_(gradient, alpha=1 / count)

    def weighted(sums: Tensor, counts: Tensor, factors: Tensor) -> Tensor:
        return factors * loss(sums, counts)

    with evaluation_mode(lm.module), visited(parameters, visit):
        for indices, batch in Scorer(lm, batch_size).batches(tokens):
            if weights is None:
                lm.likelihood.objective(batch, loss).loss.backward()
            else:
                factors = torch.tensor([weights[i] for i in indices], device=batch.ids.device)  # (b,)
                lm.likelihood.objective(batch, weighted, factors).loss.backward()
    return mean


def layer_groups(model: Any) -> dict[str, str]:
    """Return the layer group of each parameter that trains: name -> one of `GROUPS`.

    Blocks are the modules of a numbered list; an encoder's and a decoder's are divided into thirds separately. Frozen
    blocks count, so that LoRA on the last block alone is in the last third.

    Args:
        model: a transformers language model, or a LanguageModel.

    Raises:
        ModelError: no parameter that trains, or no language model.
    """
    lm = LanguageModel.of(model, needs_tokenizer=False)
    names = list(trained_parameters(lm.module))
    depth: dict[str, int] = {}
    for name, _ in lm.module.named_parameters():
        if block := _BLOCK.match(name):
            depth[block[1]] = max(depth.get(block[1], 0), int(block[2]) + 1)
    table = lm.inner.get_input_embeddings().weight
    embeds = {name for name, p in lm.module.named_parameters() if p is table}
    groups = {}
    for name in names:
        block = _BLOCK.match(name)
        if block is not None:
            groups[name] = GROUPS[1 + 3 * int(block[2]) // depth[block[1]]]
        else:
            groups[name] = "embed" if name in embeds or re.search(r"emb|wte|wpe|shared", name) else "head"
    return groups


_BLOCK = re.compile(r"(.*?)\.(\d+)\.")  # (the list's name, the block's number)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return name -> parameter of those that train, a tied one once. Raises ModelError when there is none."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ModelError("the model has no parameter that trains: set requires_grad on those to be measured")
    return parameters


def _square(gradient: Tensor) -> Tensor:
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return to_float64(torch.linalg.vector_norm(gradient, dtype=dtype)) ** 2


def _each(
    model: Any, tokens: Sequence[Tokens], number: Callable[[str, Tensor], Tensor], workspace: int | None
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield (index, {parameter: the number computed from its gradient}), example by example."""
    lm = LanguageModel.of(model, workspace=workspace, needs_tokenizer=False)
    parameters, parts = trained_parameters(lm.module), {}

    def visit(name: str, gradient: Tensor) -> None:
        parts[name] = number(name, gradient)

    with evaluation_mode(lm.module), visited(parameters, visit):
        for (i,), batch in Scorer(lm, 1).batches(tokens):
            (-lm.likelihood(batch).mean()).backward()  # type: ignore[no-untyped-call]
            yield i, parts
            parts.clear()


@contextmanager
def visited(parameters: dict[str, nn.Parameter], visit: Visit) -> Iterator[None]:
    """Pass each gradient of a backward pass to `visit` and free it; afterwards restore those from before."""
    before = {name: p.grad for name, p in parameters.items()}

    def hook(name: str) -> Callable[[Tensor], None]:
        def take(p: Tensor) -> None:
            with torch.no_grad():
                visit(name, p.grad)  # type: ignore[arg-type]
            p.grad = None

        return take

    for p in parameters.values():
        p.grad = None
    handles: list[Any] = [p.register_post_accumulate_grad_hook(hook(name)) for name, p in parameters.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, p in parameters.items():
            p.grad = before[name]
