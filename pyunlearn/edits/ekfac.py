"""EK-FAC step: one step along the inverse Fisher information of each linear layer, in its Kronecker eigenbasis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyunlearn.edits.base import COUNT, POSITIVE, Editing, EditResult, require_optional, wide
from pyunlearn.edits.config import EditConfig
from pyunlearn.edits.curvature import widened
from pyunlearn.edits.fisher_information import DAMPING, NEEDS, direction, drawn_loss
from pyunlearn.edits.linear_layers import LinearLayer, even_batches, layers_of
from pyunlearn.errors import TrainingError
from pyunlearn.models.scoring import evaluation_mode
from pyunlearn.ops._portable import eigenvectors
from pyunlearn.options import accepts, require
from pyunlearn.probes.gradients import visited

Take = Callable[[LinearLayer, Tensor, Tensor], None]


@accepts(EditConfig)
def ekfac_step(
    model: Any,
    forget: Any,
    *,
    retain: Any = None,
    tokenizer: Any = None,
    rate: float = 0.01,
    damping: float | None = None,
    training_texts: int | None = None,
    samples: int = 1,
    progress: bool | None = None,
    config: EditConfig | str | Path | None = None,
    **settings: Any,
) -> EditResult:
    """Take one step away from the forget texts in the linear layers of the blocks, by EK-FAC's inverse Fisher matrix.

        A = E a a^T,   a: a layer's input at a token, with a 1 for the bias
        S = E g g^T,   g: gradient at the layer's output, of labels drawn from the model
        A = Qa La Qa^T,  S = Qs Ls Qs^T
        Lambda_ij = E over texts of (Qs^T G Qa)_ij^2,   G: gradient of one text's `drawn_loss`
        W' = W + rate Qs [ (Qs^T V Qa) / (Lambda + damping) ] Qa^T,   V: the layer's part of v in `fisher_step`

    Head, embeddings, norms and everything else outside the blocks keep their weights. Texts of the same length share a
    pass, so that no padding enters A.

    Args:
        model, forget, retain, tokenizer, rate, training_texts, samples, progress, config: as in `fisher_step`.
        damping: added to Lambda, above 0; default 0.1 times its mean, layer by layer.
        {options}

    Returns:
        EditResult. `diagnostics`: `step_norm`, ||theta' - theta||_2 as the weights were written, `damping`, weight ->
        its damping, and `unread`, the layers that saw no token or no gradient and are left unchanged.

    Raises:
        ArgumentError: no retain, or an option out of range. ModelError: no linear layer in a block is trainable, or
            a parameter stacks those of experts (Mixtral and others since transformers 5). TrainingError: a factor is
            not finite. DataError: as in `pyunlearn.unlearn`. After an error the weights are the original ones.

    Source: Grosse et al. 2023, arXiv 2308.03296, section 2.2 and appendix A (damping); George et al. 2018,
    arXiv 1806.03884.
    """
    config = EditConfig.of(config, settings, "ekfac_step")
    require(POSITIVE, rate=rate)
    require(COUNT, samples=samples)
    require_optional(POSITIVE, damping=damping)
    require_optional(COUNT, training_texts=training_texts)
    sources = {"forget": forget, "retain": retain}
    with Editing("ekfac_step", model, sources, tokenizer, config, progress=progress, needs=NEEDS) as edit:
        layers = layers_of(edit)
        with widened(edit.model):
            v = direction(edit, training_texts)
            edit.progress.begin("factors and eigenvalues", 2 * samples * len(edit.tokens["retain"]))
            generator = torch.Generator().manual_seed(config.seed)
            bases = _bases(edit, layers, samples, generator)
            read = [layer for layer in layers if layer.name in bases]
            eigenvalues = _eigenvalues(edit, read, bases, samples, generator)
        dampings = {}
        unread = [layer.name for layer in layers if layer not in read]
        for layer in read:
            basis, spectrum, gradient = bases.pop(layer.name), eigenvalues.pop(layer.name), _joined(edit, layer, v)
            if not (spectrum.any() or gradient.any()):  # lora_A has no gradient while lora_B is 0
                unread.append(layer.name)
                continue
            dampings[layer.name] = DAMPING * float(spectrum.mean()) if damping is None else damping
            _write(edit, layer, _layer_step(layer, basis, spectrum, gradient, dampings[layer.name]), rate)
        return edit.finish(step_norm=edit.step_norm, damping=dampings, unread=unread)


def _layer_step(
    layer: LinearLayer, basis: tuple[Tensor, Tensor], spectrum: Tensor, gradient: Tensor, damping: float
) -> Tensor:
    """Return (out, in) or (out, in + 1): (the layer's Fisher matrix + damping I)^-1 times its gradient."""
    if not 0 < damping < float("inf"):
        raise TrainingError(
            f"the Fisher information of {layer.name} is {damping}, and nothing was changed: give a damping"
        )
    q_a, q_s = basis
    return q_s @ (q_s.T @ gradient @ q_a / (spectrum + damping)) @ q_a.T


def _write(edit: Editing, layer: LinearLayer, step: Tensor, rate: float) -> None:
    """Add rate * step to the layer's weight, and its last column to the bias where that is trainable."""
    has_bias = layer.bias in edit.parameters
    weight, bias = step.split([step.shape[1] - has_bias, int(has_bias)], dim=1)
    edit.add(layer.name, layer.matrix(weight), rate)
    if has_bias:
        edit.add(layer.bias, bias[:, 0], rate)


def _joined(edit: Editing, layer: LinearLayer, v: dict[str, Tensor]) -> Tensor:
    """Return the layer's part of v as one matrix: (out, in), or (out, in + 1) with the bias."""
    weight = layer.matrix(v[layer.name])
    return torch.cat([weight, v[layer.bias][:, None]], dim=1) if layer.bias in edit.parameters else weight


def _bases(
    edit: Editing, layers: Sequence[LinearLayer], samples: int, generator: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return weight -> (Qa, Qs), for the layers that saw a token."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}

    def take(layer: LinearLayer, a: Tensor, g: Tensor) -> None:
        a, g = a.flatten(0, 1), g.flatten(0, 1)
        if layer.name not in factors:
            factors[layer.name] = (a.T @ a, g.T @ g)
        else:
            factors[layer.name][0].addmm_(a.T, a)
            factors[layer.name][1].addmm_(g.T, g)

    _backward(edit, layers, take, samples, generator)
    bases = {}
    for name in list(factors):
        pair = factors.pop(name)
        if not all(bool(torch.isfinite(f).all()) for f in pair):
            raise TrainingError(
                f"the inputs or gradients of {name} are not finite, and nothing was changed: the model is broken"
            )
        bases[name] = (eigenvectors(pair[0]), eigenvectors(pair[1]))
    return bases


def _eigenvalues(
    edit: Editing,
    layers: Sequence[LinearLayer],
    bases: dict[str, tuple[Tensor, Tensor]],
    samples: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return a dict from weight to its EK-FAC eigenvalues Lambda, (out, in), or (out, in + 1) with a bias."""
    spectra: dict[str, Tensor] = {}
    count = samples * edit.count("retain")

    def take(layer: LinearLayer, a: Tensor, g: Tensor) -> None:
        q_a, q_s = bases[layer.name]
        # each text's gradient in the eigenbasis: summed over its tokens before it is squared
        rotated = torch.einsum("bto,bti->boi", g @ q_s, a @ q_a)
        squares = rotated.square().sum(0) / count
        spectra[layer.name] = spectra[layer.name].add_(squares) if layer.name in spectra else squares

    _backward(edit, layers, take, samples, generator)
    return spectra


def _backward(
    edit: Editing, layers: Sequence[LinearLayer], take: Take, samples: int, generator: torch.Generator
) -> None:
    """Call `take(layer, inputs, output gradients)` for each layer and batch of retain texts.

    Inputs are (b, T, in), with a column of ones where the layer's bias is trainable; output gradients are (b, T, out).
    """

    def hook(layer: LinearLayer) -> Callable[..., None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            a = _by_text(wide(inputs[0]))
            if layer.bias in edit.parameters:
                a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
            output.register_hook(lambda g: take(layer, a, _by_text(wide(g))))

        return see

    handles = [layer.module.register_forward_hook(hook(layer)) for layer in layers]
    try:
        with evaluation_mode(edit.model), visited(edit.parameters, lambda *_: None):
            for _ in range(samples):
                for indices, batch in even_batches(edit, edit.tokens["retain"]):
                    shares = [edit.shares["retain"][i] for i in indices]
                    drawn_loss(edit, batch, shares, generator).backward()  # type: ignore[no-untyped-call]
                    edit.progress.advance(len(indices))
    finally:
        for handle in handles:
            handle.remove()


def _by_text(x: Tensor) -> Tensor:
    """Return (b, T, n). A mixture of experts passes tokens without their text: each then counts as one text.

    On average the squares are the same.

    >>> _by_text(torch.zeros(7, 3)).shape, _by_text(torch.zeros(2, 5, 3)).shape
    (torch.Size([7, 1, 3]), torch.Size([2, 5, 3]))
    """
    return x[:, None] if x.dim() == 2 else x.flatten(1, -2)
