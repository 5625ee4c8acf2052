"""Zero-shot smoothing (JiT): make the model smooth around the forget texts, by noise on their embeddings alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyunlearn.data import TokenBatch
from pyunlearn.edits.base import COUNT, POSITIVE, Editing, EditResult, wide
from pyunlearn.edits.config import EditConfig
from pyunlearn.edits.curvature import wide_logits, widened
from pyunlearn.edits.linear_layers import even_batches
from pyunlearn.errors import TrainingError
from pyunlearn.models.scoring import evaluation_mode
from pyunlearn.options import Flag, accepts, require
from pyunlearn.probes.gradients import visited


@accepts(EditConfig)
def zero_shot_smoothing(
    model: Any,
    forget: Any,
    *,
    retain: Any = None,
    tokenizer: Any = None,
    sigma: float = 0.5,
    rate: float = 0.01,
    samples: int = 25,
    passes: int = 1,
    two_sided: bool = True,
    progress: bool | None = None,
    config: EditConfig | str | Path | None = None,
    **settings: Any,
) -> EditResult:
    """Descend on how far noise on a forget text's embeddings moves the logits, relative to the noise.

        L = mean over texts and N samples of  [ 1/T sum over tokens t of || f(x)_t - f(x + xi)_t ||_2 ] / || xi ||_2
        theta <- theta - rate grad L,   once for each batch;   xi ~ N(0, (sigma r)^2)

    f are the logits of the T scored tokens, r is the root mean square of the embedding table, and || xi ||_2 is over
    all embeddings of the text, prompt included. Nothing is clamped, since embeddings have no range; each batch starts
    with no gradient. Texts of the same length share a step of `batch_size` texts. `seed` draws the noise.

    Args:
        model: a transformers language model, or a path; changed in place. With adapters (PEFT) only these change; to
            change a few layers alone, freeze the others. 16-bit weights are float32 during the computation.
        forget: texts, in the forms that `pyunlearn.unlearn` takes.
        retain: texts that are measured, and nothing else.
        tokenizer: the model's; None: loaded from where the model came from.
        sigma: standard deviation of the noise, in root mean squares of the embedding table, above 0.
        rate: of plain gradient descent, above 0.
        samples: N, draws of noise for each text.
        passes: over the forget set; 1 in the source.
        two_sided: differentiate f(x + xi) too, at N more backward passes. False is the source's algorithm, which on
            language models need not lower L at all: f(x) is moved to where f(x + xi) was.
        progress: show a progress bar; None: on a terminal only.
        config: an EditConfig, or a file that holds one; the options below override it.
        {options}

    Returns:
        EditResult. `diagnostics`: `sensitivity`, L of each step, and `steps`.

    Raises:
        ArgumentError: an option out of range. TrainingError: L is not finite. DataError, ModelError: as in
            `pyunlearn.unlearn`. After an error the weights are the original ones.

    Source: Foster et al. 2024, arXiv 2402.01401, algorithm 1, for images; the version for embeddings is ours.
    """
    config = EditConfig.of(config, settings, "zero_shot_smoothing")
    require(POSITIVE, sigma=sigma, rate=rate)
    require(COUNT, samples=samples, passes=passes)
    require(Flag(), two_sided=two_sided)
    sources = {"forget": forget, "retain": retain}
    with Editing("zero_shot_smoothing", model, sources, tokenizer, config, progress=progress) as edit:
        generator, sensitivity = torch.Generator().manual_seed(config.seed), list[float]()
        deviation = sigma * float(wide(edit.lm.inner.get_input_embeddings().weight).square().mean().sqrt())
        edit.progress.begin("smoothing", passes * len(edit.tokens["forget"]))
        edit.back_up()
        with widened(edit.model), evaluation_mode(edit.model):
            for _ in range(passes):
                for indices, batch in even_batches(edit, edit.tokens["forget"]):
                    gradient: dict[str, Tensor] = {}
                    with visited(edit.parameters, _adding(gradient)):
                        sensitivity.append(_sensitivity(edit, batch, deviation, samples, two_sided, generator))
                    _require_finite(sensitivity)
                    for name, g in gradient.items():
                        edit.parameters[name].data.sub_(g, alpha=rate)
                    edit.progress.advance(len(indices))
            after = {name: p.detach() for name, p in edit.parameters.items()}
        for name, values in after.items():
            edit.write(name, values)
        return edit.finish(sensitivity=sensitivity, steps=len(sensitivity))


def _require_finite(sensitivity: list[float]) -> None:
    """Raise TrainingError unless the last step's L is finite."""
    if not isfinite(sensitivity[-1]):
        raise TrainingError(
            f"the sensitivity is {sensitivity[-1]} in step {len(sensitivity)}, and nothing was changed: "
            "take a smaller rate, or a model that is finite"
        )


def _adding(gradient: dict[str, Tensor]) -> Callable[[str, Tensor], None]:
    """Return a function that adds a parameter's gradient to the dict."""

    def visit(name: str, part: Tensor) -> None:
        gradient[name] = gradient[name].add_(part) if name in gradient else part

    return visit


def _sensitivity(
    edit: Editing, batch: TokenBatch, deviation: float, samples: int, two_sided: bool, generator: torch.Generator
) -> float:
    """Return L of a batch, and add its gradient to the parameters' gradients.

    The gradient of the logits is summed by hand, so that the graph of one noisy pass exists at a time.
    """
    logits = wide_logits(edit, batch)  # (n, V)
    clean, total = logits.detach(), 0.0
    d_logits = torch.zeros_like(clean)
    per_token = 1 / (samples * len(batch.counts) * batch.counts[batch.example].to(clean.dtype))  # (n,)
    for _ in range(samples):
        with torch.set_grad_enabled(two_sided), _noise(edit, deviation, generator) as squares:
            noisy = wide_logits(edit, batch)
        apart = clean - noisy.detach()
        size = torch.linalg.vector_norm(apart, dim=1)  # (n,)
        weight = per_token / torch.stack(squares).sum(0).sqrt().to(clean.device)[batch.example]
        total += float((weight * size).sum())
        d_clean = (weight / size.clamp_min(torch.finfo(size.dtype).tiny))[:, None] * apart
        d_logits += d_clean
        if two_sided:
            noisy.backward(-d_clean)
    logits.backward(d_logits)
    return total


@contextmanager
def _noise(edit: Editing, deviation: float, generator: torch.Generator) -> Iterator[list[Tensor]]:
    """Add noise to the embeddings inside the block.

    The list that it yields holds the squared norm of each text's noise, (b,), once for each read of the table (encoder,
    decoder).
    """
    squares: list[Tensor] = []

    def add(_: Any, __: Any, output: Tensor) -> Tensor:
        noisy = output + deviation * torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
        squares.append((noisy - output).detach().square().sum((1, 2)))  # of the added noise as it was rounded
        return noisy

    table = edit.lm.inner.get_input_embeddings().weight
    tables = [m for m in edit.model.modules() if isinstance(m, nn.Embedding) and m.weight is table]  # T5: one a stack
    handles = [m.register_forward_hook(add) for m in tables]
    try:
        yield squares
    finally:
        for handle in handles:
            handle.remove()
