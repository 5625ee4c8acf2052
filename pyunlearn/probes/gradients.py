"""Gradients of single examples, as numbers: their norms, and their inner products with one that is kept.

A parameter's gradient is reduced to a number as soon as the backward pass has made it, and given back: of no example does a whole gradient
ever live, and beside the weights stands at most the one gradient that all are compared with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyunlearn import models
from pyunlearn.data import Tokens
from pyunlearn.errors import ArgumentError, ModelError
from pyunlearn.models.scoring import batches_on, evaluation_mode

Floats = NDArray[np.float64]
Visit = Callable[[str, Tensor], None]

GROUPS = ("embed", "first third", "middle third", "last third", "head")
"""Where a parameter stands: before the blocks, in one third of them, or after them. A head tied to the embedding counts as embed."""


def gradient_norms(model: nn.Module, tokens: Sequence[Tokens], *, workspace: int | None = None) -> Floats:
    """The norm of each example's gradient: || grad of its mean NLL a token ||_2, over all parameters that train. For GraNd.

    Args:
        model: a transformers language model; its weights, gradients and mode are left as they were.
        tokens: B examples, one backward pass each.
        workspace: bytes for logits: see ops.linear_log_likelihood.

    Returns:
        (B,) float64, 0 or more.

    Raises:
        ArgumentError: no example. ModelError: no parameter that trains, or no language model.

    Source: arXiv 2107.07075 (GraNd: the mean over models early in training).
    """
    found = np.zeros(len(tokens))
    for i, parts in _each(model, tokens, lambda name, gradient: _square(gradient), workspace):
        found[i] = float(torch.stack(list(parts.values())).sum().sqrt())
    return found


def gradient_inner_products(
    model: nn.Module, tokens: Sequence[Tokens], direction: dict[str, Tensor], *, workspace: int | None = None
) -> dict[str, Floats]:
    """The inner product of each example's gradient with one direction, by layer group. For the G-effect.

        < grad of example i's mean NLL a token, direction >   summed over the group's parameters

    Args:
        model, tokens, workspace: as in `gradient_norms`.
        direction: a tensor for each parameter that trains, by name, on any device: `mean_gradient` of an objective.

    Returns:
        (B,) float64 for each of `GROUPS`; their sum is the whole inner product. With an unlearning objective's gradient, the mean over the forget
        set is its G-effect there, and likewise the retain set's: wanted are below 0, and 0 or above.

    Raises:
        ArgumentError: no example, or a direction that misses a parameter. ModelError: as `gradient_norms`.

    Source: Wang et al. 2025, arXiv 2502.19301.
    """
    groups = layer_groups(model)
    missing = [name for name in groups if name not in direction]
    if missing:
        raise ArgumentError(
            f"direction must have a tensor for each parameter that trains, and has none for {missing[0]}."
        )
    found = {group: np.zeros(len(tokens)) for group in GROUPS}

    def product(name: str, gradient: Tensor) -> Tensor:
        other = direction[name].to(gradient.device)
        return torch.dot(gradient.flatten().float(), other.flatten().float()).double()

    for i, parts in _each(model, tokens, product, workspace):
        for name, part in parts.items():
            found[groups[name]][i] += float(part)
    return found


def mean_gradient(
    model: nn.Module, tokens: Sequence[Tokens], function: Callable[[Tensor, Tensor], Tensor] | None = None, *,
    batch_size: int = 8, workspace: int | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The gradient of an objective, averaged over examples: a whole one, float32, by parameter.

    Args:
        model, tokens, workspace: as in `gradient_norms`.
        function: from (b,) summed log-likelihoods and (b,) scored tokens to (b,) losses, as in `methods` with reduction="none"; None for the NLL a token.
        batch_size: examples in one pass.

    Returns:
        name -> tensor like the parameter, float32, for each that trains and has a gradient (zeros for one that has none).

    Raises:
        ArgumentError, ModelError: as `gradient_norms`.
    """
    parameters = trained_parameters(model)
    likelihood, loss = models.Likelihood(model, workspace=workspace), function or (lambda sums, counts: -sums / counts)
    found = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}

    def visit(name: str, gradient: Tensor) -> None:
        found[name].add_(gradient, alpha=1 / len(tokens))

    with evaluation_mode(model), visited(parameters, visit):
        for _, batch in batches_on(model, tokens, batch_size):
            likelihood.objective(batch, loss).loss.backward()
    return found


def layer_groups(model: nn.Module) -> dict[str, str]:
    """name -> one of `GROUPS`, for each parameter that trains. Blocks are what stands in a numbered list, of each stack its own."""
    names = list(trained_parameters(model))
    places = {name: re.match(r"(.*?)\.(\d+)\.", name) for name in names}
    depth: dict[str, int] = {}
    for (
        name,
        _,
    ) in model.named_parameters():  # frozen blocks count: LoRA on the last block alone is still in the last third
        if place := re.match(r"(.*?)\.(\d+)\.", name):
            depth[place[1]] = max(depth.get(place[1], 0), int(place[2]) + 1)
    table = models.unwrapped(model).get_input_embeddings().weight
    embeds = {name for name, p in model.named_parameters() if p is table}
    found = {}
    for name in names:
        place = places[name]
        if place is not None:
            found[name] = GROUPS[1 + 3 * int(place[2]) // depth[place[1]]]
        else:
            found[name] = "embed" if name in embeds or re.search(r"emb|wte|wpe|shared", name) else "head"
    return found


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """name -> parameter, of those that train; a tied one is there once. Raises ModelError when there is none."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ModelError("the model has no parameter that trains: set requires_grad on those to be measured.")
    return found


def _square(gradient: Tensor) -> Tensor:
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient, dtype=dtype).double() ** 2


def _each(
    model: nn.Module, tokens: Sequence[Tokens], number: Callable[[str, Tensor], Tensor], workspace: int | None
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(place, {parameter: the number that its gradient comes to}), example by example."""
    likelihood, parameters, parts = models.Likelihood(model, workspace=workspace), trained_parameters(model), {}

    def visit(name: str, gradient: Tensor) -> None:
        parts[name] = number(name, gradient)

    with evaluation_mode(model), visited(parameters, visit):
        for (i,), batch in batches_on(model, tokens, 1):
            (-likelihood(batch).mean()).backward()  # type: ignore[no-untyped-call]
            yield i, parts
            parts.clear()


@contextmanager
def visited(parameters: dict[str, nn.Parameter], visit: Visit) -> Iterator[None]:
    """While it lasts a backward pass hands each gradient to `visit` and drops it; gradients that were there come back afterwards."""
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
