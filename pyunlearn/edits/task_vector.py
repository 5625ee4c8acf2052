"""Task-vector negation: move the weights away from those of a model that knows the forget set better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyunlearn import models
from pyunlearn.data import Tokens
from pyunlearn.edits.base import POSITIVE, Editing, EditResult, gradients_of, wide
from pyunlearn.edits.config import EditConfig
from pyunlearn.errors import ArgumentError
from pyunlearn.models.devices import seeded
from pyunlearn.ops._portable import to_float64
from pyunlearn.options import accepts, require

Train = Callable[[Any, Sequence[Tokens]], object]


@accepts(EditConfig)
def task_vector(
    model: Any,
    forget: Any,
    *,
    fine_tuned: Any,
    alpha: float = 1.0,
    retain: Any = None,
    tokenizer: Any = None,
    progress: bool | None = None,
    config: EditConfig | str | Path | None = None,
    **settings: Any,
) -> EditResult:
    """Subtract from the weights what fine-tuning on the forget set adds to them.

        theta_u = theta - alpha (theta_ft - theta)

    theta_ft is theta trained further on the forget set, well into overfitting: the better it knows the texts, the
    better the direction.

    Args:
        model: a transformers language model, or a path; changed in place. With adapters (PEFT) only these change, and
            `fine_tuned` must have them too.
        forget: texts, in the forms that `pyunlearn.unlearn` takes.
        fine_tuned: theta_ft: a model of the same parameters, the path of one, or a function `train(model, tokens)` that
            trains the model in place on the encoded forget texts. The function is called once, with torch's generator
            set to `seed`; meanwhile the original weights are in main memory.
        alpha: length of the step, above 0; MUSE tries powers of two up to where utility breaks.
        retain: texts that are measured, and nothing else.
        tokenizer: the model's; None: loaded from where the model came from.
        progress: show a progress bar; None: on a terminal only.
        config: an EditConfig, or a file that holds one; the options below override it.
        {options}

    Returns:
        EditResult. `diagnostics`: `vector_norm`, ||theta_ft - theta||_2, and `relative_norm`, that over ||theta||_2.

    Raises:
        ArgumentError: alpha, or a theta_ft that is the model itself, has other parameters, or other shapes, or has
            learned nothing. DataError, ModelError, TrainingError: as in `pyunlearn.unlearn`; the weights are then the
            original ones.

    Source: Ilharco et al. 2023, arXiv 2212.04089, section 3 (forgetting via negation); as used for language models in
    MUSE, arXiv 2407.06460.
    """
    config = EditConfig.of(config, settings, "task_vector")
    require(POSITIVE, alpha=alpha)
    fine_tuned = _require_fine_tuned(fine_tuned, model)
    with Editing(
        "task_vector", model, {"forget": forget, "retain": retain}, tokenizer, config, progress=progress
    ) as edit:
        if isinstance(fine_tuned, torch.nn.Module):
            theirs = dict(fine_tuned.named_parameters())
        else:
            edit.back_up()
            _train(edit, fine_tuned)
            theirs = dict(edit.model.named_parameters())
        _require_same_parameters(edit, theirs)
        square = size = 0.0
        for name, p in edit.parameters.items():
            theta = wide(edit.backups[name].to(p.device) if edit.backups else p)
            vector = wide(theirs[name]).to(theta.device, theta.dtype) - theta
            square += float(to_float64(vector).square().sum())
            size += float(to_float64(theta).square().sum())
            edit.write(name, theta - alpha * vector)
        if square == 0:
            raise ArgumentError(
                "fine_tuned must differ from the model, and has the same weights: train it on the forget set first"
            )
        return edit.finish(vector_norm=square**0.5, relative_norm=(square / max(size, 1e-300)) ** 0.5)


def _require_fine_tuned(fine_tuned: Any, model: Any) -> Any:
    """Return the fine-tuned model, loaded if it is a path, or the function that trains. Raises ArgumentError."""
    if fine_tuned is model:
        raise ArgumentError(
            "fine_tuned must be another model than the one to edit, or a function that trains it, "
            "and is the same object"
        )
    if isinstance(fine_tuned, (str, Path)):
        return models.load(fine_tuned)[0]
    if not callable(fine_tuned):
        raise ArgumentError(
            "fine_tuned must be a model, its path, or a function train(model, tokens), "
            f"got {type(fine_tuned).__name__}: load the model first"
        )
    return fine_tuned


def _require_same_parameters(edit: Editing, theirs: Mapping[str, Tensor]) -> None:
    """Raise ArgumentError unless every trainable parameter of the model is in `theirs`, in the same shape."""
    for name, p in edit.parameters.items():
        if name not in theirs or theirs[name].shape != p.shape:
            has = tuple(theirs[name].shape) if name in theirs else "none"
            raise ArgumentError(
                f"fine_tuned must have the model's parameters: {name} is {tuple(p.shape)} here, and there {has}"
            )


def _train(edit: Editing, train: Train) -> None:
    """Call the user's function; mode, gradients and the random generator are restored afterwards."""
    model, before = edit.model, gradients_of(edit.model)
    modes = {module: module.training for module in model.modules()}
    for p in model.parameters():
        p.grad = None
    try:
        with seeded(edit.config.seed, edit.lm.device):
            train(model, edit.tokens["forget"])
    finally:
        for name, p in model.named_parameters():
            p.grad = before[name]
        for module, training in modes.items():
            module.training = training
