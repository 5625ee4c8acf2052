"""Pruning: set to 0 the weights that the retain texts need least; a mask preserves the zeros in an unlearning run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyunlearn.data import Tokens
from pyunlearn.edits.base import Editing, EditResult, require_optional, wide
from pyunlearn.edits.config import EditConfig
from pyunlearn.edits.linear_layers import LinearLayer, by_block, even_batches, forward, layers_of
from pyunlearn.edits.weight_scores import largest
from pyunlearn.errors import ArgumentError, ModelError, TrainingError
from pyunlearn.models.scoring import evaluation_mode
from pyunlearn.options import Choice, Number, Text, accepts, require

SCORES = ("magnitude", "wanda", "forget-aware")
GROUPS = ("row", "layer", "model")

_ROLES = {"magnitude": (), "wanda": ("retain",), "forget-aware": ("retain", "forget")}  # whose inputs a score reads


@dataclass(frozen=True, eq=False)
class Pruned(EditResult):
    """An `EditResult` with the mask of the pruned weights, for `unlearn(..., mask=pruned.mask)`.

    `mask`  name -> bool tensor like the parameter, False where a weight was set to 0
    """

    mask: dict[str, Tensor] = field(repr=False)


@accepts(EditConfig)
def prune(
    model: Any,
    forget: Any = None,
    *,
    retain: Any = None,
    score: str = "magnitude",
    sparsity: float = 0.5,
    pattern: str | None = None,
    groups: str | None = None,
    tokenizer: Any = None,
    progress: bool | None = None,
    config: EditConfig | str | Path | None = None,
    **settings: Any,
) -> Pruned:
    """Set the weights of the smallest score to 0, in the linear layers of the model's blocks.

        magnitude      S_ij = |W_ij|
        wanda          S_ij = |W_ij| x_j                      x_j: root mean square of input j over the retain texts
        forget-aware   S_ij = |W_ij| x_j / (e + |W_ij| f_j)   f_j: the same over the forget texts, e: mean of |W_ij| f_j

    With text, the blocks are pruned one after the other, each by the inputs that the pruned blocks before it produce.
    Head, embeddings and norms are unchanged. The last score drops weights that the forget texts use more than the
    retain texts do; it is ours, untested outside this package. Nothing is random: `seed` has no effect.

    Args:
        model: a transformers language model, or a path; changed in place. Adapters (PEFT) are refused: merge them
            first.
        forget, retain: texts, in the forms that `pyunlearn.unlearn` takes; wanda needs retain, forget-aware both; other
            texts are measured, and nothing else.
        score: one of the three above.
        sparsity: share of the weights that become 0, above 0 and below 1.
        pattern: "2:4" (or n:m) in place of it: of each m consecutive inputs of an output, the n smallest become 0.
        groups: the weights that are compared with each other: the inputs of one output ("row"), a layer ("layer"), or
            all layers ("model", for magnitude alone). Default: row with text, layer without, as in the sources.
        tokenizer: the model's; None: loaded from where the model came from.
        progress: show a progress bar; None: on a terminal only.
        config: an EditConfig, or a file that holds one; the options below override it.
        {options}

    Returns:
        Pruned, an EditResult with `.mask`. `diagnostics`: `pruned`, weight -> number of elements set to 0; `sparsity`,
        all of them over all elements of these weights; `unread`, weights that saw no token (experts that the router
        never chose, where each has linear layers of its own), which are scored by magnitude.

    Raises:
        ArgumentError: an option out of range, or text that the score needs and that is missing. ModelError: adapters,
            rows that the pattern does not divide, or a parameter that stacks the matrices of experts (Mixtral and
            others since transformers 5). TrainingError: inputs that are not finite. DataError: as in
            `pyunlearn.unlearn`. After an error the weights are the original ones.

    Source: Jia et al. 2023, arXiv 2304.04934 (prune, then unlearn); Sun et al. 2024, arXiv 2306.11695 (Wanda).
    """
    config = EditConfig.of(config, settings, "prune")
    selection = _selection(score, sparsity, pattern, groups)
    sources = {"retain": retain} if forget is None else {"forget": forget, "retain": retain}
    needs = dict.fromkeys(_ROLES[score], f"by which {score} scores the weights")
    with Editing("prune", model, sources, tokenizer, config, progress=progress, needs=needs) as edit:
        if hasattr(edit.model, "peft_config"):
            raise ModelError(
                "prune works on whole weights, and the model has adapters: merge them first (merge_and_unload)"
            )
        layers = layers_of(edit)
        if selection.pattern:
            _require_divisible(edit, layers, selection.pattern[1])
        if selection.groups == "model":
            mask, unread = _prune_model(edit, layers, sparsity), list[str]()
        else:
            mask, unread = _prune_blocks(edit, layers, selection, _ROLES[score])
        pruned = {name: int((~m).sum()) for name, m in mask.items()}
        share = sum(pruned.values()) / sum(m.numel() for m in mask.values())
        return Pruned(**vars(edit.finish(pruned=pruned, sparsity=share, unread=unread)), mask=mask)


def _prune_model(edit: Editing, layers: Sequence[LinearLayer], sparsity: float) -> dict[str, Tensor]:
    """Prune all layers together by magnitude, and return the mask."""
    sizes = {layer.name: wide(edit.parameters[layer.name]).abs() for layer in layers}
    total = sum(s.numel() for s in sizes.values())
    mask = largest(sizes, total - int(total * sparsity))
    _write(edit, mask)
    return mask


def _prune_blocks(
    edit: Editing, layers: Sequence[LinearLayer], selection: _Selection, roles: Sequence[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Prune block by block, and return (the mask, the weights that saw no token of a role)."""
    mask: dict[str, Tensor] = {}
    unread: list[str] = []
    blocks = by_block(layers)
    edit.progress.begin("blocks", len(blocks))
    for block in blocks:
        inputs = {role: input_norms(edit, edit.tokens[role], block) for role in roles}
        for layer in block:
            w = layer.matrix(wide(edit.parameters[layer.name])).abs()
            x = [inputs[role].get(layer.name) for role in roles]
            unread += [layer.name] if any(v is None for v in x) else []
            remains = selection(_scores(w, [v for v in x if v is not None] if layer.name not in unread else []))
            mask[layer.name] = layer.matrix(remains).contiguous()
        _write(edit, {layer.name: mask[layer.name] for layer in block})
        edit.progress.advance(1)
    return mask, unread


@dataclass(frozen=True)
class _Selection:
    """The function from scores (out, in) to a bool tensor that is True at the weights that stay.

    >>> _Selection(0.5, (2, 4), "row")(torch.tensor([[4.0, 1.0, 3.0, 2.0]]))
    tensor([[ True, False,  True, False]])
    """

    sparsity: float
    pattern: tuple[int, int] | None
    groups: str

    def __call__(self, scores: Tensor) -> Tensor:
        if self.pattern:
            n, m = self.pattern
            return _all_but_smallest(scores.reshape(-1, m), n).view(scores.shape)
        if self.groups == "row":
            return _all_but_smallest(scores, int(scores.shape[1] * self.sparsity))
        return largest({0: scores}, scores.numel() - int(scores.numel() * self.sparsity))[0]


def _selection(score: str, sparsity: float, pattern: str | None, groups: str | None) -> _Selection:
    """Check the options of `prune` and return its selection. Raises ArgumentError."""
    require(Choice(SCORES), score=score)
    require(Number(above=0, below=1), sparsity=sparsity)
    require_optional(Choice(GROUPS), groups=groups)
    require_optional(Text('a string "n:m" with n below m, such as "2:4"'), pattern=pattern)
    numbers = re.fullmatch(r"(\d+):(\d+)", pattern) if pattern else None
    if pattern and (numbers is None or not 0 < int(numbers[1]) < int(numbers[2])):
        raise ArgumentError(f'pattern must be a string "n:m" with n below m, such as "2:4", got {pattern!r}')
    groups = groups or ("layer" if score == "magnitude" else "row")
    if groups == "model" and (score != "magnitude" or pattern):
        raise ArgumentError(
            f'groups must be "row" or "layer", or "model" with magnitude and without a pattern, got {groups!r}'
        )
    return _Selection(sparsity, (int(numbers[1]), int(numbers[2])) if numbers else None, groups)


def _all_but_smallest(scores: Tensor, count: int) -> Tensor:
    """Return (rows, n), False at the `count` smallest of each row; of equal ones at the first."""
    smallest = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, smallest, False)


def _scores(w: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Return the scores of |W| (out, in) with the norms (in,) of no inputs, the retain texts', or both texts'."""
    if not inputs:
        return w
    if len(inputs) == 1:
        return w * inputs[0]
    forget_use = w * inputs[1]
    return w * inputs[0] / (forget_use.mean() + forget_use + torch.finfo(w.dtype).tiny)


def _require_divisible(edit: Editing, layers: Sequence[LinearLayer], m: int) -> None:
    """Raise ModelError unless m divides the number of inputs of every layer."""
    for layer in layers:
        inputs = layer.matrix(edit.parameters[layer.name]).shape[1]
        if inputs % m:
            raise ModelError(
                f"the inputs of {layer.name} are {inputs}, which {m} does not divide: take another pattern"
            )


def _write(edit: Editing, mask: dict[str, Tensor]) -> None:
    """Write 0 where the mask is False."""
    for name, remains in mask.items():
        p = edit.parameters[name].detach()
        edit.write(name, torch.where(remains, p, torch.zeros_like(p)))


class _Reached(Exception):
    """Signal that the forward pass has reached the end of the block."""


@torch.no_grad()
def input_norms(edit: Editing, tokens: Sequence[Tokens], block: Sequence[LinearLayer]) -> dict[str, Tensor]:
    """Return weight -> (in,) root mean square of its inputs over all tokens, for the layers that saw a token.

    The forward pass ends with the block. Raises TrainingError where an input is not finite.
    """
    squares: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def take(layer: LinearLayer, inputs: tuple[Tensor, ...]) -> None:
        x = wide(inputs[0]).flatten(0, -2)
        if len(x):
            squares[layer.name] = squares.get(layer.name, 0) + x.square().sum(0)
            counts[layer.name] = counts.get(layer.name, 0) + len(x)

    def stop(*_: Any) -> None:
        raise _Reached

    hooks = [layer.module.register_forward_pre_hook(lambda _, inputs, at=layer: take(at, inputs)) for layer in block]
    hooks.append(edit.model.get_submodule(block[0].block).register_forward_hook(stop))
    try:
        with evaluation_mode(edit.model):
            for _, batch in even_batches(edit, tokens):
                with suppress(_Reached):
                    forward(edit, batch)
    finally:
        for hook in hooks:
            hook.remove()
    norms = {name: (s / counts[name]).sqrt() for name, s in squares.items()}
    if bad := next((n for n, x in norms.items() if not bool(torch.isfinite(x).all())), None):
        raise TrainingError(
            f"prune met inputs of {bad} that are infinite or NaN, and nothing was changed: the model is broken"
        )
    return norms
