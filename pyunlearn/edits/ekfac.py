"""EK-FAC: a step along the inverse Fisher information of each linear layer, diagonal in the eigenbasis of its Kronecker factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyunlearn.edits.base import Editing, EditResult, require_positive, require_retain, wide
from pyunlearn.edits.curvature import norm, widened
from pyunlearn.edits.fisher_information import DAMPING, direction, drawn_loss
from pyunlearn.edits.linear_layers import LinearLayer, even_batches, layers_of
from pyunlearn.errors import TrainingError
from pyunlearn.models.scoring import evaluation_mode
from pyunlearn.probes.gradients import visited

Take = Callable[[LinearLayer, Tensor, Tensor], None]


def ekfac_step(
    model: Any, forget: Any, *, retain: Any = None, tokenizer: Any = None, rate: float = 0.01, damping: float | None = None,
    training_texts: int | None = None, samples: int = 1, batch_size: int = 8, truncate: bool = False, workspace: int | None = None,
    seed: int = 0, progress: bool | None = None,
) -> EditResult:  # fmt: skip
    """One step away from the forget texts in the linear layers of the blocks, along EK-FAC's inverse Fisher information.

        A = E a a^T, S = E g g^T     a: a layer's input at a token, with a 1 for the bias; g: gradient at its output, of labels drawn from the model
        A = Qa La Qa^T,  S = Qs Ls Qs^T,   Lambda_ij = E over texts of (Qs^T G Qa)_ij^2,   G: gradient of one text's `drawn_loss`
        W' = W + rate Qs [ (Qs^T V Qa) / (Lambda + damping) ] Qa^T,   V: the layer's part of v in `fisher_step`

    Head, embeddings, norms and all that lies outside the blocks keep their weights.

    Args:
        model, forget, retain, tokenizer, rate, training_texts, samples, truncate, workspace, seed, progress: as in `fisher_step`.
        damping: added to Lambda, above 0; default 0.1 of its mean, layer by layer.
        batch_size: texts in one pass; those of one length go together, so that no padding enters A.

    Returns:
        EditResult; `diagnostics`: `step_norm`, ||theta' - theta||_2, `damping`, weight -> its damping, and `unread`, layers that no text came through or
        no gradient reaches, left as they are.

    Raises:
        ArgumentError: no retain, or a number out of range. ModelError: no linear layer in a block trains. TrainingError: a factor is not finite. DataError: as in
            `pyunlearn.unlearn`. The weights are then what they were.

    Source: Grosse et al. 2023, arXiv 2308.03296, section 2.2 and appendix A (damping); George et al. 2018, arXiv 1806.03884.
    """
    given = {"training_texts": training_texts, "damping": damping}
    require_positive(rate=rate, samples=samples, **{k: v for k, v in given.items() if v is not None})
    sources = {"forget": forget, "retain": retain}
    with Editing("ekfac_step", model, sources, tokenizer, batch_size=batch_size, truncate=truncate, workspace=workspace, progress=progress) as edit:  # fmt: skip
        require_retain(edit.tokens, edit.name, "on which the Fisher information is taken")
        layers = layers_of(edit)
        with widened(edit.model):
            v = direction(edit, training_texts)
            edit.progress.begin("factors and eigenvalues", 2 * int(samples) * len(edit.tokens["retain"]))
            generator = torch.Generator().manual_seed(seed)
            bases = _bases(edit, layers, int(samples), generator)
            read = [layer for layer in layers if layer.name in bases]
            eigenvalues = _eigenvalues(edit, read, bases, int(samples), generator)
        dampings, steps = {}, []
        unread = [layer.name for layer in layers if layer not in read]
        for layer in read:
            (q_a, q_s), spectrum, both = bases.pop(layer.name), eigenvalues.pop(layer.name), _joined(edit, layer, v)
            if not (spectrum.any() or both.any()):  # as of lora_A where lora_B is still 0
                unread.append(layer.name)
                continue
            dampings[layer.name] = added = DAMPING * float(spectrum.mean()) if damping is None else damping
            if not 0 < added < float("inf"):
                raise TrainingError(
                    f"the Fisher information of {layer.name} is {added}, and nothing was changed: give a damping"
                )
            step = q_s @ (q_s.T @ both @ q_a / (spectrum + added)) @ q_a.T
            steps.append(step)
            weight, bias = step.split([layer.matrix(v[layer.name]).shape[1], int(layer.bias in edit.parameters)], dim=1)
            edit.add(layer.name, layer.matrix(weight), rate)
            if layer.bias in edit.parameters:
                edit.add(layer.bias, bias[:, 0], rate)
        return edit.done(step_norm=rate * norm(steps), damping=dampings, unread=unread)


def _joined(edit: Editing, layer: LinearLayer, v: dict[str, Tensor]) -> Tensor:
    """(out, in), or (out, in + 1) with the bias, of what is stored like the parameters."""
    weight = layer.matrix(v[layer.name])
    return torch.cat([weight, v[layer.bias][:, None]], dim=1) if layer.bias in edit.parameters else weight


def _bases(
    edit: Editing, layers: Sequence[LinearLayer], samples: int, generator: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    """weight -> (Qa, Qs), for the layers that a text came through."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}

    def take(layer: LinearLayer, a: Tensor, g: Tensor) -> None:
        a, g = a.flatten(0, 1), g.flatten(0, 1)
        if layer.name not in factors:
            factors[layer.name] = (a.T @ a, g.T @ g)
        else:
            factors[layer.name][0].addmm_(a.T, a)
            factors[layer.name][1].addmm_(g.T, g)

    _backward(edit, layers, take, samples, generator)
    found = {}
    for name in list(factors):
        pair = factors.pop(name)
        if not all(bool(torch.isfinite(f).all()) for f in pair):
            raise TrainingError(
                f"the inputs or gradients of {name} are not finite, and nothing was changed: the model is broken"
            )
        found[name] = (torch.linalg.eigh(pair[0]).eigenvectors, torch.linalg.eigh(pair[1]).eigenvectors)
    return found


def _eigenvalues(
    edit: Editing, layers: Sequence[LinearLayer], bases: dict[str, tuple[Tensor, Tensor]], samples: int, generator: torch.Generator
) -> dict[str, Tensor]:  # fmt: skip
    """weight -> Lambda (out, in) or (out, in + 1)."""
    found: dict[str, Tensor] = {}
    count = samples * len(edit.tokens["retain"])

    def take(layer: LinearLayer, a: Tensor, g: Tensor) -> None:
        q_a, q_s = bases[layer.name]
        rotated = torch.einsum(
            "bto,bti->boi", g @ q_s, a @ q_a
        )  # each text's gradient: squared when its tokens are summed
        squares = rotated.square().sum(0) / count
        found[layer.name] = found[layer.name].add_(squares) if layer.name in found else squares

    _backward(edit, layers, take, samples, generator)
    return found


def _backward(
    edit: Editing, layers: Sequence[LinearLayer], take: Take, samples: int, generator: torch.Generator
) -> None:
    """Hands each layer's inputs (b, T, in), with a column of ones where its bias trains, and output gradients (b, T, out) to `take`, batch by batch."""

    def hook(layer: LinearLayer) -> Callable[..., None]:
        def see(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            a = _by_text(wide(given[0]))
            if layer.bias in edit.parameters:
                a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
            output.register_hook(lambda g: take(layer, a, _by_text(wide(g))))

        return see

    handles = [layer.module.register_forward_hook(hook(layer)) for layer in layers]
    try:
        with evaluation_mode(edit.model), visited(edit.parameters, lambda *_: None):
            for _ in range(samples):
                for places, batch in even_batches(edit, edit.tokens["retain"]):
                    drawn_loss(edit, batch, generator).backward()  # type: ignore[no-untyped-call]
                    edit.progress.advance(len(places))
    finally:
        for handle in handles:
            handle.remove()


def _by_text(x: Tensor) -> Tensor:
    """(b, T, n). Tokens that come without their text, as to an expert, are each taken for one: on average the squares are the same."""
    return x[:, None] if x.dim() == 2 else x.flatten(1, -2)
