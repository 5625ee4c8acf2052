"""Task-vector negation: away from the weights that know the forget set better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyunlearn.data import Tokens
from pyunlearn.edits.base import Editing, EditResult, gradients_of, require_positive, wide
from pyunlearn.errors import ArgumentError

Train = Callable[[Any, Sequence[Tokens]], object]


def task_vector(
    model: Any, forget: Any, *, fine_tuned: Any, alpha: float = 1.0, retain: Any = None, tokenizer: Any = None, batch_size: int = 8,
    truncate: bool = False, workspace: int | None = None, seed: int = 0, progress: bool | None = None,
) -> EditResult:  # fmt: skip
    """Subtracts what fine-tuning on the forget set adds to the weights.

        theta_u = theta - alpha (theta_ft - theta)

    theta_ft is theta trained further on the forget set, well into overfitting: the better it knows the texts, the better the direction.

    Args:
        model: a transformers language model, or a path; changed in place. Of adapters (PEFT) those that train, which `fine_tuned` must have too.
        forget: texts, in the forms that `pyunlearn.unlearn` takes.
        fine_tuned: theta_ft: a model of the same parameters, or a function `train(model, tokens)` that trains the model given, in place, on the
            encoded forget texts; it is called once, with `seed` set. Then the original weights wait in main memory.
        alpha: how far, above 0; MUSE searches powers of two up to where utility breaks.
        retain: texts that are only measured.
        tokenizer, truncate, workspace: as in `pyunlearn.unlearn`.
        batch_size: texts in one forward pass.
        seed: of torch's generator, while the function trains.
        progress: as in `pyunlearn.unlearn`.

    Returns:
        EditResult; `diagnostics`: `vector_norm`, ||theta_ft - theta||_2, and `relative_norm`, that over ||theta||_2.

    Raises:
        ArgumentError: alpha, or a theta_ft that is the model itself, has other parameters, or other shapes, or has learned nothing.
        DataError, ModelError, TrainingError: as in `pyunlearn.unlearn`; the weights are then what they were.

    Source: Ilharco et al. 2023, arXiv 2212.04089, section 3 (forgetting via negation); as used for language models in MUSE, arXiv 2407.06460.
    """
    require_positive(alpha=alpha)
    sources = {"forget": forget, "retain": retain}
    with Editing("task_vector", model, sources, tokenizer, batch_size=batch_size, truncate=truncate, workspace=workspace, progress=progress) as edit:  # fmt: skip
        model = edit.model
        if fine_tuned is model:
            raise ArgumentError(
                "fine_tuned must be another model than the one to edit, or a function that trains it, and is the same object"
            )
        trains = not isinstance(fine_tuned, torch.nn.Module)
        if trains and not callable(fine_tuned):
            raise ArgumentError(
                f"fine_tuned must be a model or a function train(model, tokens), got {type(fine_tuned).__name__}: load the model first"
            )
        if trains:
            edit.hold()
            _train(edit, fine_tuned, seed)
        theirs = dict((model if trains else fine_tuned).named_parameters())
        for name, p in edit.parameters.items():
            if name not in theirs or theirs[name].shape != p.shape:
                has = tuple(theirs[name].shape) if name in theirs else "none"
                raise ArgumentError(
                    f"fine_tuned must have the model's parameters: {name} is {tuple(p.shape)} here, and there {has}"
                )
        square = weight = 0.0
        for name, p in edit.parameters.items():
            theta = wide(edit.whole[name].to(p.device) if trains else p)
            vector = wide(theirs[name]).to(theta.device, theta.dtype) - theta
            square, weight = (
                square + float(vector.double().square().sum()),
                weight + float(theta.double().square().sum()),
            )
            edit.write(name, theta - alpha * vector)
        if square == 0:
            raise ArgumentError(
                "fine_tuned must differ from the model, and has the same weights: train it on the forget set first"
            )
        return edit.done(vector_norm=square**0.5, relative_norm=(square / max(weight, 1e-300)) ** 0.5)


def _train(edit: Editing, train: Train, seed: int) -> None:
    """Lets the caller's function train the model; mode, gradients and the generator are afterwards what they were."""
    model, before = edit.model, gradients_of(edit.model)
    modes = {module: module.training for module in model.modules()}
    for p in model.parameters():
        p.grad = None
    try:
        devices = [p.device for p in list(edit.parameters.values())[:1] if p.device.type == "cuda"]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            train(model, edit.tokens["forget"])
    finally:
        for name, p in model.named_parameters():
            p.grad = before[name]
        for module, training in modes.items():
            module.training = training
