"""Calibration by mixing: as much of the unlearned model as the retain metric allows, so that methods can be compared at equal utility."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from pyunlearn.edits.base import EditResult, Kept, keep_difference, put_back, wide
from pyunlearn.errors import ArgumentError, ModelError

_GRID = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, eq=False)
class Mixed:
    """A mixture, left in the model.

    `model`     the unlearned model, which now holds the mixture
    `weight`    the unlearned model's weight in it, 0 to 1
    `original`  the metric of the original model
    `value`     the metric of the mixture, tau * original or more
    `curve`     (weight, metric) of every mixture tried, in order of weight
    `monotone`  whether the metric nowhere rises with the weight, among those tried; where it does, a larger weight may exist than the one found
    """

    model: Any = field(repr=False)
    weight: float
    original: float
    value: float
    curve: list[tuple[float, float]]
    monotone: bool
    kept: dict[str, Kept] = field(repr=False)

    def undo(self) -> Any:
        """Puts the unlearned weights back bit for bit, and returns the model."""
        parameters = dict(self.model.named_parameters())
        for name, kept in self.kept.items():
            put_back(parameters[name], kept)
        return self.model


def calibrate_by_mixing(
    original: Any,
    unlearned_model: Any,
    metric: Callable[[Any], float],
    *,
    tau: float = 0.95,
    tolerance: float = 1 / 128,
) -> Mixed:
    """The largest weight of the unlearned model whose mixture with the original keeps the metric.

        theta_a = (1 - a) theta_original + a theta_unlearned;   the largest a with metric(theta_a) >= tau metric(theta_original)

    Found by bisection above the largest of 1/4, 1/2, 3/4, 1 that keeps it. The mixture is computed in float32 and left in the unlearned model; at a = 0 and
    a = 1 it has the bits of the one or the other. Each try costs one call of the metric. Beside the model stand the original's and
    the unlearned model's parameters, of those alone that differ, in main memory.

    Args:
        original: the model before, its state dict, the `EditResult` that made the unlearned model, or, for a LoRA adapter (PEFT) trained from zero, None: the model
            without it. A LoRA adapter is mixed by scaling its B, which scales its whole update; mixing A and B alike would square the weight.
        unlearned_model: of the same parameters; changed in place.
        metric: metric(model) -> a number above 0, higher = more is kept: the mean over the retain set of extraction strength, in the source. Not a
            log-likelihood: 0.95 of a negative number is more than that number.
        tau: the share to keep, 0 to 1.
        tolerance: the weight found is within this of the largest, between the neighbours tried.

    Returns:
        Mixed. Weight 1 where the unlearned model itself keeps the metric.

    Raises:
        ArgumentError: tau, tolerance, an original with other parameters, or a metric that is not finite or not above 0 for the original; the unlearned weights are then
            put back, as they are where the metric raises. ModelError: an adapter that cannot be mixed by scaling.

    Source: Wang et al. 2024, arXiv 2406.09179, section 4 (UWC).
    """
    if not 0 < tau <= 1 or not 0 < tolerance < 1:
        raise ArgumentError(f"tau and tolerance must lie between 0 and 1, got {tau!r} and {tolerance!r}")
    parameters = dict(unlearned_model.named_parameters())
    before = _originals(original, unlearned_model, parameters)
    after = {name: parameters[name].detach().to("cpu", copy=True) for name in before}

    @torch.no_grad()
    def mix(weight: float) -> None:
        for name, p in ((n, parameters[n]) for n in before):
            if weight in (0.0, 1.0):
                p.copy_(after[name] if weight else before[name])
            else:
                p.copy_(torch.lerp(wide(before[name]), wide(after[name]).to(wide(before[name]).dtype), weight))

    tried: dict[float, float] = {}

    def measure(weight: float) -> float:
        mix(weight)
        tried[weight] = value = float(metric(unlearned_model))
        if not isfinite(value) or (weight == 0.0 and value <= 0):
            which = "the original" if weight == 0.0 else f"the mixture of weight {weight:g}"
            raise ArgumentError(
                f"metric must give a finite number, above 0 for the original, and gave {value!r} for {which}: take extraction strength, say"
            )
        return value

    try:
        goal = tau * measure(0.0)
        low = max((a for a in _GRID if measure(a) >= goal), default=0.0)
        high = min((a for a in _GRID if a > low), default=1.0)
        while low < 1.0 and high - low > tolerance:
            middle = (low + high) / 2
            low, high = (middle, high) if measure(middle) >= goal else (low, middle)
        mix(low)
    except BaseException:
        mix(1.0)
        raise
    curve = sorted(tried.items())
    monotone = all(b <= a for (_, a), (_, b) in pairwise(curve))
    kept = {n: d[0] for n in before if (d := keep_difference(after[n], parameters[n].detach().cpu())) is not None}
    return Mixed(unlearned_model, low, tried[0.0], tried[low], curve, monotone, kept)


def _originals(original: Any, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """name -> what is mixed in, for the parameters that differ; of an adapter, B alone, as zeros."""
    if original is None:
        names = [n for n, p in parameters.items() if p.requires_grad]
        if not names or not all("lora_A" in n or "lora_B" in n for n in names):
            raise ModelError(
                "original can be None only for a model whose LoRA adapters alone train: give the original model or its state dict"
            )
        return {n: torch.zeros_like(parameters[n], device="cpu") for n in names if "lora_B" in n}
    if isinstance(original, EditResult):
        found = original.before()
    else:
        state = dict(original.named_parameters()) if isinstance(original, nn.Module) else original
        if original is model or not isinstance(state, Mapping):
            raise ArgumentError(
                f"original must be another model than the unlearned one, a state dict or an EditResult, got {type(original).__name__}"
            )
        wrong = next((n for n, p in parameters.items() if n not in state or state[n].shape != p.shape), None)
        if wrong is not None:
            raise ArgumentError(f"original must have the unlearned model's parameters, and has no {wrong} of its shape")
        found = {
            n: state[n].detach().to("cpu", copy=True)
            for n, p in parameters.items()
            if not torch.equal(state[n].to(p.device), p)
        }
    if any("lora_" in n for n in found):
        if any(bool(v.any()) for n, v in found.items() if "lora_B" in n) or not all(
            "lora_A" in n or "lora_B" in n for n in found
        ):
            raise ModelError(
                "an adapter is mixed by scaling, which needs an original whose lora_B is 0: merge it into the weights first (merge_and_unload)"
            )
        found = {n: v for n, v in found.items() if "lora_B" in n}
    return found
