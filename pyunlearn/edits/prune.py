"""Pruning: the weights that text to keep needs least become 0, and stay so while a run unlearns with the mask."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyunlearn.data import Tokens
from pyunlearn.edits.base import Editing, EditResult, require_retain, wide
from pyunlearn.edits.linear_layers import LinearLayer, by_block, even_batches, forward, layers_of
from pyunlearn.edits.weight_scores import largest
from pyunlearn.errors import ArgumentError, ModelError, TrainingError
from pyunlearn.models.scoring import evaluation_mode

SCORES = ("magnitude", "wanda", "forget-aware")
GROUPS = ("row", "layer", "model")


@dataclass(frozen=True, eq=False)
class Pruned(EditResult):
    """An `EditResult` with `mask`: name -> bool tensor like the parameter, False where a weight was set to 0. For `unlearn(..., mask=pruned.mask)`."""

    mask: dict[str, Tensor] = field(repr=False)


def prune(
    model: Any, forget: Any = None, *, retain: Any = None, score: str = "magnitude", sparsity: float = 0.5, pattern: str | None = None,
    groups: str | None = None, tokenizer: Any = None, batch_size: int = 8, truncate: bool = False, workspace: int | None = None,
    seed: int = 0, progress: bool | None = None,
) -> Pruned:  # fmt: skip
    """Sets the weights of the smallest score to 0, in the linear layers of the model's blocks.

        magnitude      S_ij = |W_ij|
        wanda          S_ij = |W_ij| x_j                           x_j: root mean square of input j over all tokens of the retain texts
        forget-aware   S_ij = |W_ij| x_j / (e + |W_ij| f_j)        f_j: the same over the forget texts, e the layer's mean of |W_ij| f_j

    With text, the blocks are pruned one after the other, each by the inputs that the pruned blocks before it give. Head, embeddings and norms
    stay. The last score drops weights that the forget texts use more than the retain texts do; it is ours, untested beyond this package.

    Args:
        model: a transformers language model, or a path; changed in place. Adapters (PEFT) are refused: merge them first.
        forget, retain: texts, in the forms that `pyunlearn.unlearn` takes; wanda needs retain, forget-aware both; else they are only measured.
        score: as above.
        sparsity: share of the weights that become 0, above 0 and below 1.
        pattern: "2:4" (or n:m) in place of it: of each m consecutive inputs of an output, the n smallest.
        groups: what is compared: the inputs of one output ("row"), a layer, or all layers of the "model" (magnitude alone). Default: row with text, layer
            without, as in the sources.
        tokenizer, truncate, workspace: as in `pyunlearn.unlearn`.
        batch_size: texts in one pass.
        seed: unused, for nothing is drawn.
        progress: as in `pyunlearn.unlearn`.

    Returns:
        Pruned, an EditResult with `.mask`; `diagnostics`: `pruned`, weight -> elements set to 0; `sparsity`, all of them over all elements of these weights; `unread`,
        weights that no text came through (experts never chosen), which are scored by magnitude.

    Raises:
        ArgumentError: an option out of range, or text that the score needs and that is missing. ModelError: adapters, or rows that the pattern does not
            divide. TrainingError: inputs that are not finite. DataError: as in `pyunlearn.unlearn`. The weights are then what they were.

    Source: Jia et al. 2023, arXiv 2304.04934 (prune, then unlearn); Sun et al. 2024, arXiv 2306.11695 (Wanda).
    """
    cut = _cut(score, sparsity, pattern, groups)
    sources = {"forget": forget, "retain": retain}
    with Editing("prune", model, sources, tokenizer, batch_size=batch_size, truncate=truncate, workspace=workspace, progress=progress) as edit:  # fmt: skip
        if hasattr(edit.model, "peft_config"):
            raise ModelError(
                "prune works on whole weights, and the model has adapters: merge them first (merge_and_unload)"
            )
        if score != "magnitude":
            require_retain(edit.tokens, "prune", f"by which {score} scores the weights")
        if score == "forget-aware" and "forget" not in edit.tokens:
            raise ArgumentError("forget-aware scores need the texts to forget: pass forget=")
        layers, mask, unread = layers_of(edit), {}, []
        if cut.pattern:
            _require_divisible(edit, layers, cut.pattern[1])
        if cut.groups == "model":
            sizes = {layer.name: wide(edit.parameters[layer.name]).abs() for layer in layers}
            total = sum(s.numel() for s in sizes.values())
            mask = largest(sizes, total - int(total * sparsity))
            _write(edit, mask)
            blocks: list[list[LinearLayer]] = []
        else:
            blocks = by_block(layers)
        roles = {"magnitude": (), "wanda": ("retain",), "forget-aware": ("retain", "forget")}[score]
        edit.progress.begin("blocks", len(blocks))
        for block in blocks:
            inputs = {role: input_norms(edit, edit.tokens[role], block) for role in roles}
            for layer in block:
                w = layer.matrix(wide(edit.parameters[layer.name])).abs()
                x = [inputs[role].get(layer.name) for role in roles]
                unread += [layer.name] if any(v is None for v in x) else []
                kept = cut(_scores(w, [v for v in x if v is not None] if layer.name not in unread else []))
                mask[layer.name] = layer.matrix(kept).contiguous()
            _write(edit, {layer.name: mask[layer.name] for layer in block})
            edit.progress.advance(1)
        pruned = {name: int((~m).sum()) for name, m in mask.items()}
        share = sum(pruned.values()) / sum(m.numel() for m in mask.values())
        return Pruned(**vars(edit.done(pruned=pruned, sparsity=share, unread=unread)), mask=mask)


@dataclass(frozen=True)
class _Cut:
    """Scores (out, in) -> True at those that stay."""

    sparsity: float
    pattern: tuple[int, int] | None
    groups: str

    def __call__(self, scores: Tensor) -> Tensor:
        if self.pattern:
            n, m = self.pattern
            parted = scores.reshape(-1, m)
            return _all_but_smallest(parted, n).view(scores.shape)
        if self.groups == "row":
            return _all_but_smallest(scores, int(scores.shape[1] * self.sparsity))
        return largest({0: scores}, scores.numel() - int(scores.numel() * self.sparsity))[0]


def _cut(score: str, sparsity: float, pattern: str | None, groups: str | None) -> _Cut:
    if score not in SCORES:
        raise ArgumentError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    if not isinstance(sparsity, (int, float)) or not 0 < sparsity < 1:
        raise ArgumentError(f"sparsity must be a number above 0 and below 1, got {sparsity!r}")
    groups = groups or ("layer" if score == "magnitude" else "row")
    if groups not in GROUPS or (groups == "model" and (score != "magnitude" or pattern)):
        raise ArgumentError(
            f'groups must be "row" or "layer", or "model" with magnitude and without a pattern, got {groups!r}'
        )
    found = re.fullmatch(r"(\d+):(\d+)", str(pattern)) if pattern else None
    if pattern and (found is None or not 0 < int(found[1]) < int(found[2])):
        raise ArgumentError(f'pattern must be "n:m" with n below m, such as "2:4", got {pattern!r}')
    return _Cut(sparsity, (int(found[1]), int(found[2])) if found else None, groups)


def _all_but_smallest(scores: Tensor, count: int) -> Tensor:
    """(rows, n) True, but for the `count` smallest of each row; of equal ones the first go."""
    smallest = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, smallest, False)


def _scores(w: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """|W| (out, in) with no inputs, one (in,), or two."""
    if not inputs:
        return w
    if len(inputs) == 1:
        return w * inputs[0]
    forgets = w * inputs[1]
    return w * inputs[0] / (forgets.mean() + forgets + torch.finfo(w.dtype).tiny)


def _require_divisible(edit: Editing, layers: Sequence[LinearLayer], m: int) -> None:
    for layer in layers:
        wide_by = layer.matrix(edit.parameters[layer.name]).shape[1]
        if wide_by % m:
            raise ModelError(
                f"the inputs of {layer.name} are {wide_by}, which {m} does not divide: take another pattern"
            )


def _write(edit: Editing, mask: dict[str, Tensor]) -> None:
    for name, kept in mask.items():
        p = edit.parameters[name].detach()
        edit.write(name, torch.where(kept, p, torch.zeros_like(p)))


class _Enough(Exception):
    """The block has been reached."""


@torch.no_grad()
def input_norms(edit: Editing, tokens: Sequence[Tokens], block: Sequence[LinearLayer]) -> dict[str, Tensor]:
    """weight -> (in,) root mean square of its inputs over all tokens, for the layers of one block that any token came through.

    The model runs no further than that block. Raises TrainingError where an input is not finite.
    """
    squares: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def take(layer: LinearLayer, given: tuple[Tensor, ...]) -> None:
        x = wide(given[0]).flatten(0, -2)
        if len(x):
            squares[layer.name] = squares.get(layer.name, 0) + x.square().sum(0)
            counts[layer.name] = counts.get(layer.name, 0) + len(x)

    def enough(*_: Any) -> None:
        raise _Enough

    hooks = [layer.module.register_forward_pre_hook(lambda _, given, at=layer: take(at, given)) for layer in block]
    hooks.append(edit.model.get_submodule(block[0].block).register_forward_hook(enough))
    try:
        with evaluation_mode(edit.model):
            for _, batch in even_batches(edit, tokens):
                with suppress(_Enough):
                    forward(edit, batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: (s / counts[name]).sqrt() for name, s in squares.items()}
    if bad := next((n for n, x in found.items() if not bool(torch.isfinite(x).all())), None):
        raise TrainingError(
            f"prune met inputs of {bad} that are infinite or NaN, and nothing was changed: the model is broken"
        )
    return found
