"""The trainable state of a run: the optimizer, the last good weights, and the checkpoint on disk."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyunlearn.errors import DataError


def _adam(parameters: Iterable[Tensor], lr: float) -> torch.optim.AdamW:
    """AdamW without momentum: an example that has been let go must not be carried further by the steps that made it go."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.0, 0.999), weight_decay=0.0)


class MasterWeights(torch.optim.Optimizer):
    """AdamW that keeps a float32 copy of 16-bit parameters.

    At unlearning's learning rates an update is smaller than half the distance of two bfloat16 numbers, so without the copy most would round to
    nothing and the run would silently do nothing.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        self.narrow = [p for p in parameters if p.requires_grad]
        self.wide = [
            p.detach().float().clone().requires_grad_() if p.dtype != torch.float64 else p for p in self.narrow
        ]
        self.inner = _adam(self.wide, lr)
        super().__init__(self.narrow, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One AdamW step on the float32 copies, then the copies rounded into the parameters."""
        for group in self.inner.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        for narrow, wide in zip(self.narrow, self.wide, strict=True):
            wide.grad = None if narrow.grad is None else narrow.grad.to(wide.dtype)
        self.inner.step()
        for narrow, wide in zip(self.narrow, self.wide, strict=True):
            narrow.copy_(wide)


class State:
    """The trainable parameters and their optimizer, with the last good weights to go back to.

    mask: name -> bool tensor, False where a weight must keep its bits.
    """

    def __init__(
        self, model: nn.Module, learning_rate: float, *, resumable: bool = False, mask: dict[str, Tensor] | None = None
    ) -> None:
        self.mask = mask or {}
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        narrow = any(p.dtype in (torch.bfloat16, torch.float16) for p in self.parameters.values())
        every = list(self.parameters.values())
        self.optimizer: torch.optim.Optimizer = (
            MasterWeights(every, learning_rate) if narrow else _adam(every, learning_rate)
        )
        self.good: list[Tensor] = []
        self.good_moments: dict[str, Any] | None = {} if resumable else None
        self.keep()

    @property
    def _adam(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "inner", self.optimizer)

    @property
    def _weights(self) -> list[Tensor]:
        return list(getattr(self.optimizer, "wide", self.parameters.values()))

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Leaves no gradient where the mask is False: neither the clipping nor the optimizer sees it."""
        for name, mask in self.mask.items():
            if (gradient := self.parameters[name].grad) is not None:
                gradient.masked_fill_(~mask, 0)

    @torch.no_grad()
    def shrink(self, strength: float) -> None:
        """The step of an l1 penalty: every weight goes towards 0 by learning rate times strength, and stops there (its proximal operator).

        Apart from the optimizer, as AdamW's decay is: inside it the penalty's gradient would be normalised to the same step whatever its strength.
        """
        amount = strength * self.optimizer.param_groups[0]["lr"]
        if amount <= 0:
            return
        for narrow, wide in zip(self.parameters.values(), self._weights, strict=True):
            wide.copy_(torch.nn.functional.softshrink(wide, amount))
            if narrow is not wide:
                narrow.copy_(wide)

    @torch.no_grad()
    def hold(self) -> None:
        """Puts back what a step moved where the mask is False: an optimizer moves weights without a gradient too, by momentum and by decay."""
        if not self.mask:
            return
        for (name, narrow), wide, good in zip(self.parameters.items(), self._weights, self.good, strict=True):
            if name in self.mask:
                wide.copy_(torch.where(self.mask[name], wide, good))
                if narrow is not wide:
                    narrow.copy_(wide)

    @torch.no_grad()
    def keep(self) -> None:
        """Takes the present weights as the last good ones."""
        if not self.good:
            self.good = [p.detach().clone() for p in self._weights]
        for g, p in zip(self.good, self._weights, strict=True):
            g.copy_(p)
        self._keep_moments()

    def go_back(self) -> None:
        """Puts the last good weights back, and drops the optimizer's memory of the way that led astray."""
        self._restore()
        self._adam.state.clear()
        self._keep_moments()

    def rewind(self) -> None:
        """Puts the last good weights back, and the optimizer as it was then: where an interrupted run goes on from."""
        self._restore()
        if self.good_moments is not None:
            self._adam.load_state_dict(copy.deepcopy(self.good_moments))

    @torch.no_grad()
    def _restore(self) -> None:
        for g, p, narrow in zip(self.good, self._weights, self.parameters.values(), strict=True):
            p.copy_(g)
            if narrow is not p:
                narrow.copy_(g)

    def _keep_moments(self) -> None:
        if self.good_moments is not None:  # for a checkpoint only: it takes twice the memory of what is trained
            self.good_moments = copy.deepcopy(self._adam.state_dict())

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets the learning rate of every group."""
        for optimizer in (self.optimizer, self._adam):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

    def save(self, path: Path, progress: dict[str, Any]) -> None:
        """Writes the weights, the optimizer and the loop's own progress; beside, then renamed."""
        beside = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = dict(zip(self.parameters, self._weights, strict=True))
        kept = {"weights": weights, "optimizer": self._adam.state_dict(), "progress": progress, "mask": self.mask}
        torch.save(kept, beside)
        os.replace(beside, path)

    def read(self, path: Path) -> dict[str, Any]:
        """A saved state, checked against this model and not taken up yet. Raises DataError when it belongs to another."""
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        shapes = {name: tuple(w.shape) for name, w in saved["weights"].items()}
        if shapes != {name: tuple(p.shape) for name, p in self.parameters.items()}:
            raise DataError(
                f"the checkpoint {path} belongs to another model: delete it, or give the model it was made with"
            )
        return saved

    @staticmethod
    def progress(path: Path) -> dict[str, Any]:
        """The loop's own progress alone."""
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["progress"]
        return found

    @torch.no_grad()
    def take(self, saved: dict[str, Any]) -> None:
        """Takes up what `read` returned."""
        for (name, narrow), p in zip(self.parameters.items(), self._weights, strict=True):
            p.copy_(saved["weights"][name])
            if narrow is not p:
                narrow.copy_(p)
        self._adam.load_state_dict(saved["optimizer"])
        self.mask = {name: mask.to(self.parameters[name].device) for name, mask in saved["mask"].items()}
        self.keep()
