"""JiT, zero-shot: the model becomes smooth around the forget texts, by noise on their embeddings; no other text is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from pyunlearn import models
from pyunlearn.data import TokenBatch
from pyunlearn.edits.base import Editing, EditResult, require_positive, wide
from pyunlearn.edits.curvature import wide_logits, widened
from pyunlearn.edits.linear_layers import even_batches
from pyunlearn.errors import ArgumentError, TrainingError
from pyunlearn.models.scoring import evaluation_mode
from pyunlearn.probes.gradients import visited


def zero_shot_smoothing(
    model: Any, forget: Any, *, retain: Any = None, tokenizer: Any = None, sigma: float = 0.5, rate: float = 0.01, samples: int = 25,
    passes: int = 1, two_sided: bool = True, batch_size: int = 8, truncate: bool = False, workspace: int | None = None, seed: int = 0,
    progress: bool | None = None,
) -> EditResult:  # fmt: skip
    """Gradient descent on how far noise on a forget text's embeddings moves the logits, relative to the noise.

        L = mean over texts and N drawings of  [ 1/T sum over scored tokens t of || f(x)_t - f(x + xi)_t ||_2 ] / || xi ||_2
        theta <- theta - rate grad L,   once for each batch;   xi ~ N(0, (sigma r)^2), r the root mean square of the embedding table

    f are the logits, || xi ||_2 is over all embeddings of the text, prompt included. Nothing is clamped, for embeddings have no range; each batch
    begins with no gradient.

    Args:
        model: a transformers language model, or a path; changed in place. With adapters (PEFT) only what trains; to change a few layers alone, freeze the others.
            16-bit weights stand in float32 while it lasts.
        forget: texts, in the forms that `pyunlearn.unlearn` takes.
        retain: texts that are only measured.
        tokenizer, truncate, workspace: as in `pyunlearn.unlearn`.
        sigma: of the noise, in root mean squares of the embedding table, above 0.
        rate: of plain gradient descent, above 0.
        samples: N, drawings of noise for each text.
        passes: over the forget set; 1 in the source.
        two_sided: let the gradient go through f(x + xi) too, at N backward passes more. False is the source's algorithm, which on language models need
            not lower L at all: f(x) is moved to where f(x + xi) was.
        batch_size: texts in one step; those of one length go together.
        seed: of the noise.
        progress: as in `pyunlearn.unlearn`.

    Returns:
        EditResult; `diagnostics`: `sensitivity`, L of each step, and `steps`.

    Raises:
        ArgumentError: a number out of range. TrainingError: L is not finite. DataError, ModelError: as in `pyunlearn.unlearn`. The weights are then what they were.

    Source: Foster et al. 2024, arXiv 2402.01401, algorithm 1, for images; on embeddings it is our port.
    """
    require_positive(sigma=sigma, rate=rate, samples=samples, passes=passes)
    if not isinstance(two_sided, bool):
        raise ArgumentError(f"two_sided must be True or False, got {two_sided!r}")
    sources = {"forget": forget, "retain": retain}
    with Editing("zero_shot_smoothing", model, sources, tokenizer, batch_size=batch_size, truncate=truncate, workspace=workspace, progress=progress) as edit:  # fmt: skip
        generator, found = torch.Generator().manual_seed(seed), []
        deviation = sigma * float(
            wide(models.unwrapped(edit.model).get_input_embeddings().weight).square().mean().sqrt()
        )
        edit.progress.begin("smoothing", int(passes) * len(edit.tokens["forget"]))
        edit.hold()
        with widened(edit.model), evaluation_mode(edit.model):
            for _ in range(int(passes)):
                for places, batch in even_batches(edit, edit.tokens["forget"]):
                    gradient: dict[str, Tensor] = {}
                    with visited(edit.parameters, _adding(gradient)):
                        found.append(_sensitivity(edit, batch, deviation, int(samples), two_sided, generator))
                    if not isfinite(found[-1]):
                        raise TrainingError(
                            f"the sensitivity is {found[-1]} in step {len(found)}, and nothing was changed: take a smaller rate, or a model that is finite"
                        )
                    for name, g in gradient.items():
                        edit.parameters[name].data.sub_(g, alpha=rate)
                    edit.progress.advance(len(places))
            after = {name: p.detach() for name, p in edit.parameters.items()}
        for name, values in after.items():
            edit.write(name, values)
        return edit.done(sensitivity=found, steps=len(found))


def _adding(gradient: dict[str, Tensor]) -> Callable[[str, Tensor], None]:
    def visit(name: str, part: Tensor) -> None:
        gradient[name] = gradient[name].add_(part) if name in gradient else part

    return visit


def _sensitivity(
    edit: Editing, batch: TokenBatch, deviation: float, samples: int, two_sided: bool, generator: torch.Generator
) -> float:
    """L of a batch; its gradient is handed back through the parameters. The logits' own gradient is summed by hand, so that no more than one noisy graph lives."""
    logits = wide_logits(edit, batch)
    clean, total = logits.detach(), 0.0
    push = torch.zeros_like(clean)
    per_token = 1 / (samples * len(batch.counts) * batch.counts[batch.example].to(clean.dtype))
    for _ in range(samples):
        with torch.set_grad_enabled(two_sided), _noise(edit, deviation, generator) as squares:
            noisy = wide_logits(edit, batch)
        apart = clean - noisy.detach()
        size = torch.linalg.vector_norm(apart, dim=1)
        weight = per_token / torch.stack(squares).sum(0).sqrt()[batch.example]
        total += float((weight * size).sum())
        one = (weight / size.clamp_min(torch.finfo(size.dtype).tiny))[:, None] * apart
        push += one
        if two_sided:
            noisy.backward(-one)
    logits.backward(push)
    return total


@contextmanager
def _noise(edit: Editing, deviation: float, generator: torch.Generator) -> Iterator[list[Tensor]]:
    """While it lasts, embeddings come out with noise; the list holds its squared norm for each text, (b,), once for each time the table is read (encoder, decoder)."""
    squares: list[Tensor] = []

    def add(_: Any, __: Any, output: Tensor) -> Tensor:
        noisy = output + deviation * torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
        squares.append((noisy - output).detach().square().sum((1, 2)))  # of what was added, rounding and all
        return noisy

    table = models.unwrapped(edit.model).get_input_embeddings().weight
    tables = [m for m in edit.model.modules() if isinstance(m, nn.Embedding) and m.weight is table]  # T5: one a stack
    handles = [m.register_forward_hook(add) for m in tables]
    try:
        yield squares
    finally:
        for handle in handles:
            handle.remove()
