"""One method: its run, the mixing, the measuring; and the way back to where it started."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pyunlearn.comparing.measurement import Yardstick
from pyunlearn.comparing.peak_memory import PeakMemory
from pyunlearn.comparing.result import Row
from pyunlearn.edits import calibrate_by_mixing
from pyunlearn.errors import ModelError, TrainingError
from pyunlearn.models.scoring import evaluation_mode
from pyunlearn.progress import Progress
from pyunlearn.unlearning.api import _unlearn as unlearn


class Restored:
    """`with Restored(model) as start`: on the device that `unlearn` takes, without dropout; afterwards as it came, bit for bit."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.weights = {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters() if p.requires_grad}
        self.train = {n: p.requires_grad for n, p in model.named_parameters()}
        if not self.weights:
            raise ModelError(
                "no parameter of the model requires a gradient, so no method can change it: unfreeze it, or an adapter, first"
            )
        if any(bool(v.any()) for n, v in self.weights.items() if "lora_B" in n):
            raise ModelError(
                "an adapter is mixed by scaling, which needs one that starts from zero: merge it into the weights first (merge_and_unload)"
            )

    def __enter__(self) -> Restored:
        from accelerate import PartialState

        self.home = next(self.model.parameters()).device
        self.settled = evaluation_mode(self.model)
        self.settled.__enter__()
        self.model.to(PartialState().device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.put_back()
        self.model.to(self.home)
        self.settled.__exit__(kind, error, trace)

    @torch.no_grad()
    def put_back(self) -> None:
        """The weights as they came, and which of them train: a method that breaks may have frozen some."""
        parameters = dict(self.model.named_parameters())
        for name, trains in self.train.items():
            parameters[name].requires_grad_(trains)
        for name, value in self.weights.items():
            parameters[name].copy_(value)
            parameters[name].grad = None

    def every_weight(self) -> dict[str, Tensor]:
        """name -> the parameter as it came: of what does not train, itself."""
        return {n: self.weights.get(n, p) for n, p in self.model.named_parameters()}


def run_method(name: str, start: Restored, yardstick: Yardstick, tau: float, run: dict[str, Any]) -> Row:
    """Runs a method, mixes its result with the original until the utility is tau of it, and measures both. The start is put back, whatever happens.

    Raises KeyboardInterrupt when the run was interrupted; what `unlearn` raises.
    """
    try:
        with PeakMemory(yardstick.device) as peak:
            began = time.perf_counter()
            result = unlearn(start.model, method=name, **run)
            seconds = time.perf_counter() - began
        if result.stopped == "interrupted":  # the loop has noted the Ctrl-C and ended in good order
            raise KeyboardInterrupt
        bar = Progress(run["progress"], name)
        try:
            bar.say("measuring")
            uncalibrated = yardstick.measure()
            bar.say("mixing with the original, to equal utility")
            mixed = calibrate_by_mixing(start.every_weight(), start.model, lambda _: yardstick.utility(), tau=tau)
            calibrated = yardstick.measure()
        finally:
            bar.close()
        was = yardstick.original.utility
        if not math.isclose(mixed.original, was, rel_tol=1e-4):
            raise TrainingError(
                f"the original's utility was {was:.6g} and is {mixed.original:.6g} now: the method has changed more of the model than its weights"
            )
        return Row(
            name, "done", None, calibrated, uncalibrated, mixed.weight, mixed.monotone, len(result.history), result.stopped, seconds, peak.bytes,
        )  # fmt: skip
    finally:
        start.put_back()
