"""AdamW on the trained weights, with masks, float32 copies of 16-bit weights and rollback."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NO_MOMENTUM = 0.0  # earlier steps must not move an example that has stopped


def _adam(parameters: Iterable[Tensor], lr: float, momentum: float = _NO_MOMENTUM) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=lr, betas=(momentum, 0.999), weight_decay=0.0)


class MasterWeights(torch.optim.Optimizer):
    """AdamW with a float32 copy of 16-bit parameters.

    At unlearning's learning rates an update is smaller than half the gap between two bfloat16 numbers, so without
    the copy most updates would round to zero.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = _NO_MOMENTUM) -> None:
        self.narrow = [p for p in parameters if p.requires_grad]
        self.wide = [
            p.detach().float().clone().requires_grad_() if p.dtype != torch.float64 else p for p in self.narrow
        ]
        self.inner = _adam(self.wide, lr, momentum)
        super().__init__(self.narrow, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one AdamW step on the float32 copies, then round them into the parameters."""
        for group in self.inner.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        for narrow, wide in zip(self.narrow, self.wide, strict=True):
            wide.grad = None if narrow.grad is None else narrow.grad.to(wide.dtype)
        self.inner.step()
        for narrow, wide in zip(self.narrow, self.wide, strict=True):
            narrow.copy_(wide)


class TrainedWeights:
    """Trained parameters and their optimizer, with rollback to the last accepted weights.

    Args:
        model: whose parameters that require a gradient are trained.
        learning_rate: of AdamW.
        resumable: True stores the accepted optimizer state for checkpoints: twice the memory of the trained weights.
        mask: name -> bool tensor, False where a weight must keep its bits.
        momentum: beta1 of AdamW.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        *,
        resumable: bool = False,
        mask: dict[str, Tensor] | None = None,
        momentum: float = _NO_MOMENTUM,
    ) -> None:
        self.mask = mask or {}
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        narrow = any(p.dtype in (torch.bfloat16, torch.float16) for p in self.parameters.values())
        parameters = list(self.parameters.values())
        self.optimizer: torch.optim.Optimizer = (
            MasterWeights(parameters, learning_rate, momentum) if narrow else _adam(parameters, learning_rate, momentum)
        )
        self._accepted: list[Tensor] = []
        self._accepted_moments: dict[str, Any] | None = {} if resumable else None
        self.accept()

    @property
    def _adam(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "inner", self.optimizer)

    @property
    def _weights(self) -> list[Tensor]:
        return list(getattr(self.optimizer, "wide", self.parameters.values()))

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the gradients where the mask is False, before clipping."""
        for name, mask in self.mask.items():
            if (gradient := self.parameters[name].grad) is not None:
                gradient.masked_fill_(~mask, 0)

    @torch.no_grad()
    def shrink(self, strength: float) -> None:
        """Apply the proximal step of an l1 penalty: move every weight towards 0 by learning rate * strength.

        It is decoupled from the optimizer, as AdamW's decay is: AdamW would normalize the penalty's gradient, so that
        its strength had no effect.
        """
        amount = strength * self.optimizer.param_groups[0]["lr"]
        if amount <= 0:
            return
        for narrow, wide in zip(self.parameters.values(), self._weights, strict=True):
            wide.copy_(torch.nn.functional.softshrink(wide, amount))
            if narrow is not wide:
                narrow.copy_(wide)

    @torch.no_grad()
    def restore_masked(self) -> None:
        """Restore the weights where the mask is False: momentum and decay change weights without a gradient too."""
        if not self.mask:
            return
        for (name, narrow), wide, accepted in zip(self.parameters.items(), self._weights, self._accepted, strict=True):
            if name in self.mask:
                wide.copy_(torch.where(self.mask[name], wide, accepted))
                if narrow is not wide:
                    narrow.copy_(wide)

    @torch.no_grad()
    def accept(self) -> None:
        """Store the present weights for a rollback."""
        if not self._accepted:
            self._accepted = [p.detach().clone() for p in self._weights]
        for accepted, p in zip(self._accepted, self._weights, strict=True):
            accepted.copy_(p)
        self._copy_moments()

    def rollback(self) -> None:
        """Return to the last accepted weights and clear the optimizer's moments."""
        self._restore()
        self._adam.state.clear()
        self._copy_moments()

    def rewind(self) -> None:
        """Return to the last accepted weights and moments: the state from which an interrupted run resumes."""
        self._restore()
        if self._accepted_moments is not None:
            self._adam.load_state_dict(copy.deepcopy(self._accepted_moments))

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of every group."""
        for optimizer in (self.optimizer, self._adam):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

    def state_dict(self) -> dict[str, Any]:
        """Return weights, moments and mask, as a checkpoint stores them."""
        weights = dict(zip(self.parameters, self._weights, strict=True))
        return {"weights": weights, "optimizer": self._adam.state_dict(), "mask": self.mask}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        for (name, narrow), p in zip(self.parameters.items(), self._weights, strict=True):
            p.copy_(state["weights"][name])
            if narrow is not p:
                narrow.copy_(p)
        self._adam.load_state_dict(state["optimizer"])
        self.mask = {name: mask.to(self.parameters[name].device) for name, mask in state["mask"].items()}
        self.accept()

    @torch.no_grad()
    def _restore(self) -> None:
        for accepted, p, narrow in zip(self._accepted, self._weights, self.parameters.values(), strict=True):
            p.copy_(accepted)
            if narrow is not p:
                narrow.copy_(accepted)

    def _copy_moments(self) -> None:
        if self._accepted_moments is not None:
            self._accepted_moments = copy.deepcopy(self._adam.state_dict())
