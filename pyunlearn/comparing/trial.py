"""One method of a comparison: its run, the mixing to equal utility, the measuring, and the restoring of the weights."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pyunlearn.comparing.config import CompareConfig
from pyunlearn.comparing.measurement import Criterion
from pyunlearn.comparing.peak_memory import PeakMemory
from pyunlearn.comparing.result import Row
from pyunlearn.edits import calibrate_by_mixing
from pyunlearn.errors import ModelError, TrainingError
from pyunlearn.models.condition import require_trainable, to_device
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import evaluation_mode
from pyunlearn.progress import Progress, without_lines
from pyunlearn.unlearning.api import unlearn
from pyunlearn.unlearning.config import UnlearnConfig
from pyunlearn.unlearning.result import Result

_EQUAL = 0.01
"""Share of the original's utility above tau from which a mixture is not at equal utility."""


class Restored:
    """Context manager that puts a model on the device of `unlearn`, without dropout, and restores it bit for bit."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm, self.model = lm, lm.module
        require_trainable(self.model)
        parameters = dict(self.model.named_parameters())
        self.weights = {n: p.detach().to("cpu", copy=True) for n, p in parameters.items() if p.requires_grad}
        self.train = {n: p.requires_grad for n, p in parameters.items()}
        if any(bool(v.any()) for n, v in self.weights.items() if "lora_B" in n):
            raise ModelError(
                "an adapter is mixed by scaling, which needs one that starts from zero: "
                "merge it into the weights first (merge_and_unload)"
            )

    def __enter__(self) -> Restored:
        from accelerate import PartialState

        self.device = self.lm.device
        self.evaluation = evaluation_mode(self.model)
        self.evaluation.__enter__()
        to_device(self.model, PartialState().device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()
        to_device(self.model, self.device)
        self.evaluation.__exit__(kind, error, trace)

    @torch.no_grad()
    def restore(self) -> None:
        """Put back the original weights and which of them train: a method that breaks may have frozen some."""
        parameters = dict(self.model.named_parameters())
        for name, trains in self.train.items():
            parameters[name].requires_grad_(trains)
        for name, value in self.weights.items():
            parameters[name].copy_(value)
            parameters[name].grad = None

    def original_weights(self) -> dict[str, Tensor]:
        """Return name -> the original value of each parameter; a frozen parameter is returned itself."""
        return {n: self.weights.get(n, p) for n, p in self.model.named_parameters()}


def run_method(
    name: str, start: Restored, criterion: Criterion, config: CompareConfig, inputs: Mapping[str, Any]
) -> Row:
    """Run a method, mix its result with the original until tau of the utility is retained, and measure both.

    The model has its original weights again afterwards, also after an error.

    Args:
        name: of the method.
        start: the model with its original weights.
        criterion: measures the model.
        config: the settings of the comparison.
        inputs: the keywords of `unlearn` that are no settings: forget, retain, holdout, tokenizer, progress, ...

    Raises KeyboardInterrupt when the run was interrupted; the errors of `unlearn`.
    """
    try:
        with PeakMemory({p.device for p in start.model.parameters()}) as peak:
            began = time.perf_counter()
            with without_lines():
                result = run_unlearn(start.model, config.for_method(name), inputs)
            seconds = time.perf_counter() - began
        if result.stopped == "interrupted":  # the loop has caught the Ctrl-C and ended in good order
            raise KeyboardInterrupt
        bar = Progress(inputs.get("progress"), name)
        try:
            bar.say("measuring")
            uncalibrated = criterion.measure()
            bar.say("mixing with the original, to equal utility")
            mixed = calibrate_by_mixing(
                start.original_weights(), start.model, lambda _: criterion.utility(), tau=config.tau
            )
            calibrated = criterion.measure(bar)
        finally:
            bar.close()
        before = criterion.original.utility
        if not math.isclose(mixed.original, before, rel_tol=1e-4):
            raise TrainingError(
                f"the original's utility was {before:.6g} and is {mixed.original:.6g} now: "
                "the method has changed more of the model than its weights"
            )
        return Row(
            method=name,
            status="done",
            calibrated=calibrated,
            uncalibrated=uncalibrated,
            weight=mixed.weight,
            monotone=mixed.monotone,
            equalized=calibrated.utility / before - config.tau < _EQUAL,
            steps=len(result.history),
            stopped=result.stopped,
            seconds=seconds,
            peak_memory=peak.bytes,
        )
    finally:
        start.restore()


def run_unlearn(model: Any, config: UnlearnConfig, inputs: Mapping[str, Any]) -> Result:
    """Call `pyunlearn.unlearn` with these settings."""
    return unlearn(model, config=config, **inputs)
