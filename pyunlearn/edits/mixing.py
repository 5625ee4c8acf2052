"""Calibration by mixing: the largest weight of the unlearned model that keeps a metric, for equal utility."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from pyunlearn.edits.base import EditResult, SavedValues, restore, saved_difference, wide
from pyunlearn.errors import ArgumentError, ModelError
from pyunlearn.options import Number, require

_GRID = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, eq=False)
class Mixed:
    """A mixture of an original and an unlearned model, left in the unlearned model.

    `model`     the unlearned model, which now holds the mixture
    `weight`    the unlearned model's weight in it, 0 to 1
    `original`  the metric of the original model
    `value`     the metric of the mixture, tau * original or more
    `curve`     (weight, metric) of every mixture tried, in order of weight
    `monotone`  True where the metric never rises with the weight, among those tried; else a larger weight than the one
                returned may keep the metric too
    """

    model: Any = field(repr=False)
    weight: float
    original: float
    value: float
    curve: list[tuple[float, float]]
    monotone: bool
    saved: dict[str, SavedValues] = field(repr=False)

    def undo(self) -> Any:
        """Restore the weights from before the mixing bit for bit, and return the model."""
        parameters = dict(self.model.named_parameters())
        for name, saved in self.saved.items():
            restore(parameters[name], saved)
        return self.model


def calibrate_by_mixing(
    original: Any,
    unlearned_model: Any,
    metric: Callable[[Any], float],
    *,
    tau: float = 0.95,
    tolerance: float = 1 / 128,
) -> Mixed:
    """Find the largest weight of the unlearned model whose mixture with the original keeps the metric.

        theta_a = (1 - a) theta_original + a theta_unlearned
        the largest a with metric(theta_a) >= tau metric(theta_original)

    By bisection above the largest of 1/4, 1/2, 3/4, 1 that keeps it. The mixture is computed in float32 and left in the
    unlearned model; at a = 0 and a = 1 it has the bits of the one or the other. Each try costs one call of the metric.
    The parameters in which the models differ are copied to main memory, from both.

    Args:
        original: the model before unlearning, its state dict, the `EditResult` that made the unlearned model, or, for a
            LoRA adapter (PEFT) trained from zero, None: the model without it. A LoRA adapter is mixed by scaling its B,
            which scales its whole update; mixing A and B alike would square the weight.
        unlearned_model: a model of the same parameters; changed in place.
        metric: metric(model) -> a number above 0, higher = more is preserved: the mean over the retain set of
            extraction strength, in the source. Not a log-likelihood: 0.95 of a negative number is more than that
            number.
        tau: the share to keep, above 0 and at most 1.
        tolerance: largest difference between the weight returned and the next larger one tried, above 0 and below 1.

    Returns:
        Mixed. Weight 1 where the unlearned model itself keeps the metric.

    Raises:
        ArgumentError: tau, tolerance, an original with other parameters, or a metric that is not finite or not above 0
            for the original; the unlearned weights are then restored, as they are where the metric raises.
        ModelError: an adapter that cannot be mixed by scaling.

    Source: Wang et al. 2024, arXiv 2406.09179, section 4 (UWC).
    """
    require(Number(above=0, maximum=1), tau=tau)
    require(Number(above=0, below=1), tolerance=tolerance)
    if not isinstance(unlearned_model, nn.Module):
        raise ModelError(f"unlearned_model must be a model, got {type(unlearned_model).__name__}: load the model first")
    if not callable(metric):
        raise ArgumentError(f"metric must be a function of a model, got {type(metric).__name__}: give metric(model)")
    mixer = _Mixer(original, unlearned_model)
    curve: dict[float, float] = {}

    def measure(weight: float) -> float:
        mixer.mix(weight)
        curve[weight] = value = _checked(metric(unlearned_model), weight)
        return value

    try:
        threshold = tau * measure(0.0)
        low = max((a for a in _GRID if measure(a) >= threshold), default=0.0)
        high = min((a for a in _GRID if a > low), default=1.0)
        while low < 1.0 and high - low > tolerance:
            middle = (low + high) / 2
            low, high = (middle, high) if measure(middle) >= threshold else (low, middle)
        mixer.mix(low)
    except BaseException:
        mixer.mix(1.0)
        raise
    points = sorted(curve.items())
    monotone = all(b <= a for (_, a), (_, b) in pairwise(points))
    return Mixed(unlearned_model, low, curve[0.0], curve[low], points, monotone, mixer.difference())


class _Mixer:
    """The parameters of both models, and the mixture of any weight written into the unlearned one."""

    def __init__(self, original: Any, unlearned_model: nn.Module) -> None:
        self.parameters = dict(unlearned_model.named_parameters())
        self.before = _originals(original, unlearned_model, self.parameters)
        self.after = {name: self.parameters[name].detach().to("cpu", copy=True) for name in self.before}

    @torch.no_grad()
    def mix(self, weight: float) -> None:
        """Write (1 - weight) * original + weight * unlearned into the model; bit for bit at weights 0 and 1."""
        for name, before in self.before.items():
            p, after = self.parameters[name], self.after[name]
            if weight in (0.0, 1.0):
                p.copy_(after if weight else before)
            else:
                p.copy_(torch.lerp(wide(before), wide(after).to(wide(before).dtype), weight))

    def difference(self) -> dict[str, SavedValues]:
        """Return name -> the unlearned model's values, of the parameters that differ from the original's."""
        differences = {n: saved_difference(a, self.parameters[n].detach().cpu()) for n, a in self.after.items()}
        return {name: difference[0] for name, difference in differences.items() if difference is not None}


def _checked(value: Any, weight: float) -> float:
    """Return the metric as a float. Raises ArgumentError unless it is finite, and above 0 for the original."""
    which = "the original" if weight == 0.0 else f"the mixture of weight {weight:g}"
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ArgumentError(f"metric must return a number, and returned {value!r:.60} for {which}") from None
    if not isfinite(number) or (weight == 0.0 and number <= 0):
        raise ArgumentError(
            f"metric must return a finite number, above 0 for the original, and returned {number!r} for {which}: "
            "take extraction strength, for example"
        )
    return number


def _originals(original: Any, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return name -> the original's values, of the parameters that differ; of an adapter, those of B alone: zeros."""
    if original is None:
        names = [n for n, p in parameters.items() if p.requires_grad]
        if not names or not all("lora_A" in n or "lora_B" in n for n in names):
            raise ModelError(
                "original can be None only for a model in which nothing but LoRA adapters is trainable: "
                "give the original model or its state dict"
            )
        return {n: torch.zeros_like(parameters[n], device="cpu") for n in names if "lora_B" in n}
    if isinstance(original, EditResult):
        values = original.before()
    else:
        values = _differing(original, model, parameters)
    if any("lora_" in n for n in values):
        nonzero = any(bool(v.any()) for n, v in values.items() if "lora_B" in n)
        if nonzero or not all("lora_A" in n or "lora_B" in n for n in values):
            raise ModelError(
                "an adapter is mixed by scaling, which needs an original whose lora_B is 0: "
                "merge it into the weights first (merge_and_unload)"
            )
        values = {n: v for n, v in values.items() if "lora_B" in n}
    return values


def _differing(original: Any, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return name -> the value in a model or state dict, of the parameters that differ. Raises ArgumentError."""
    state = dict(original.named_parameters()) if isinstance(original, nn.Module) else original
    if original is model or not isinstance(state, Mapping):
        raise ArgumentError(
            "original must be another model than the unlearned one, a state dict or an EditResult, "
            f"got {type(original).__name__}"
        )
    wrong = next((n for n, p in parameters.items() if n not in state or state[n].shape != p.shape), None)
    if wrong is not None:
        raise ArgumentError(f"original must have the unlearned model's parameters, and has no {wrong} of its shape")
    return {
        n: state[n].detach().to("cpu", copy=True)
        for n, p in parameters.items()
        if not torch.equal(state[n].to(p.device), p)
    }
