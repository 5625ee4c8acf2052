"""Where the time of a step goes, on either side, by hooks: and the gate through which a parent process lets it pass."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.memory import resident

PHASES = ("trunk forward", "reference forward", "head and loss", "trunk backward", "clip and optimizer", "rest")


class Clock:
    """Seconds: of the process's processor time on one thread of a CPU, of the wall clock elsewhere."""

    def __init__(self, device: str, threads: int) -> None:
        self.gpu = device == "cuda"
        self.now: Callable[[], float] = time.perf_counter if self.gpu or threads > 1 else time.process_time

    def __call__(self) -> float:
        """Return the present time, once the device is done."""
        if self.gpu:
            torch.cuda.synchronize()
        return self.now()


class Phases:
    """Seconds of a step by phase. The hooks do nothing unless `active`.

    Everything between the model's last hidden states and the loss, forward and backward, is "head and loss".
    """

    def __init__(self, clock: Clock) -> None:
        self.clock, self.active = clock, False
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since = "rest", 0.0

    def start(self) -> None:
        """Begin a step."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since = "rest", self.clock() if self.active else 0.0

    def mark(self, phase: str) -> None:
        """End the present phase and begin another."""
        if self.active:
            now = self.clock()
            self.seconds[self._phase] += now - self._since
            self._phase, self._since = phase, now

    def watch_model(self, module: nn.Module, head: nn.Module) -> None:
        """Follow the forward passes of a model; those without gradients are the reference's."""

        def on_forward(*_: Any) -> None:
            self.mark("trunk forward" if torch.is_grad_enabled() else "reference forward")

        def on_head(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                self.mark("head and loss")
                if self.active and inputs[0].requires_grad:
                    inputs[0].register_hook(lambda _: self.mark("trunk backward"))

        module.register_forward_pre_hook(on_forward)
        head.register_forward_pre_hook(on_head)
        module.register_forward_hook(lambda *_: self.mark("head and loss"))

    def term(self, loss: Tensor) -> Tensor:
        """Return a term of the loss; its backward pass begins with the head."""
        if self.active:
            loss.register_hook(lambda _: self.mark("head and loss"))
        return loss

    def watch_update(self, accelerator: Any, optimizer: torch.optim.Optimizer) -> None:
        """Follow the backward pass, the clipping and the optimizer."""
        for name, phase in (("backward", "head and loss"), ("clip_grad_norm_", "clip and optimizer")):
            setattr(accelerator, name, self._marked(getattr(accelerator, name), phase))
        optimizer.register_step_pre_hook(lambda *_: self.mark("clip and optimizer"))
        optimizer.register_step_post_hook(lambda *_: self.mark("rest"))

    def _marked(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def marked(*arguments: Any, **options: Any) -> Any:
            self.mark(phase)
            output = function(*arguments, **options)
            self.mark("rest")
            return output

        return marked


class Gate:
    """Lets a side take one step for each message of the parent process, and reports the step.

    Messages: "time" and "phases" (take a step), a path (save the trained weights there), None (stop).
    """

    def __init__(self, connection: Any, clock: Clock, phases: Phases, weights: Callable[[], dict[str, Tensor]]) -> None:
        self.connection, self.clock, self.phases, self.weights = connection, clock, phases, weights
        self.began, self.memory = 0.0, Memory(clock.gpu)

    def opens(self) -> bool:
        """Wait for the parent; return False where there are no more steps."""
        while True:
            message = self.connection.recv()
            if message is None:
                return False
            if message in ("time", "phases"):
                self.phases.active = message == "phases"
                self.phases.start()
                self.began = self.clock()
                return True
            torch.save({name: p.detach().cpu() for name, p in self.weights().items()}, message)
            self.connection.send({})

    def report(self, **numbers: Any) -> None:
        """Send what a step took."""
        self.phases.mark("rest")
        seconds = self.clock() - self.began
        numbers |= {"seconds": seconds, "peak": self.memory.peak(), "phases": dict(self.phases.seconds)}
        self.connection.send(numbers)


class Memory:
    """Peak memory of this process in bytes since it was made, less than `before`: a GPU's, or the resident set."""

    def __init__(self, gpu: bool) -> None:
        self.gpu = gpu
        gc.collect()
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present size

    def peak(self) -> int:
        """Return the peak."""
        return int(torch.cuda.max_memory_allocated()) if self.gpu else resident("VmHWM")
