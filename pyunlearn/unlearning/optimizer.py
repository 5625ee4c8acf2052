"""The trained weights and their optimizer, with masks and rollback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyunlearn.models.sharding import drop_gathered, is_part, part, part_like
from pyunlearn.unlearning.adam import Adam, assign, exact

_NO_MOMENTUM = 0.0  # earlier steps must not move an example that has stopped


class TrainedWeights:
    """Trained parameters and their optimizer, with rollback to the last accepted weights.

    Accepted weights and moments are copied to the main memory, so that a GPU holds each only once.

    Args:
        model: whose parameters that require a gradient are trained.
        learning_rate: of AdamW.
        resumable: True stores the accepted optimizer state for checkpoints: 4 bytes more for each trained weight, or 1.
        mask: name -> bool tensor, False where a weight must keep its bits.
        momentum: beta1 of AdamW.
        offload: True holds moments and rests in the main memory during the steps too, see `Adam`.
        formats: parameter -> format of a GGUF file to which it is rounded already, and after each step.
        seed: of the unrounded numbers at first, and of the rounding of moments.
        clipped_to: bound on the gradients; second moments are then held in 8 bits, see `Adam`.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        *,
        resumable: bool = False,
        mask: dict[str, Tensor] | None = None,
        momentum: float = _NO_MOMENTUM,
        offload: bool = False,
        formats: Mapping[nn.Parameter, str] | None = None,
        seed: int = 0,
        clipped_to: float | None = None,
    ) -> None:
        drop_gathered(model)
        self.model, self.mask = model, mask or {}
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = Adam(
            self.parameters.values(), learning_rate, momentum, offload=offload, formats=formats, seed=seed,
            clipped_to=clipped_to,
        )  # fmt: skip
        self._accepted: dict[str, dict[str, Tensor]] = {"weights": {}, "rests": {}}
        self._accepted_moments: dict[str, Any] | None = {} if resumable else None
        self.accept()

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
        for p in self.parameters.values():
            self._assign(p, torch.nn.functional.softshrink(self._exact(p), amount))

    @torch.no_grad()
    def restore_masked(self) -> None:
        """Restore the weights where the mask is False: momentum and decay change weights without a gradient too."""
        for name, mask in self.mask.items():
            p = self.parameters[name]
            rest = self._accepted["rests"].get(name)
            accepted = exact(self._accepted["weights"][name], rest).to(p.device)
            self._assign(p, torch.where(mask, self._exact(p), accepted))

    @torch.no_grad()
    def accept(self) -> None:
        """Store the present weights for a rollback."""
        for kind, tensors in self._precise().items():
            _copy_into(self._accepted[kind], tensors)
        self._copy_moments()

    def rollback(self) -> None:
        """Return to the last accepted weights and clear the optimizer's moments."""
        self._restore(self._accepted)
        self.optimizer.state.clear()
        self._copy_moments()

    def rewind(self) -> None:
        """Return to the last accepted weights and moments: the state from which an interrupted run resumes."""
        self._restore(self._accepted)
        if self._accepted_moments is not None:
            self._load_moments(self._accepted_moments)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of every group."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    @property
    def sharded(self) -> bool:
        """True where this process trains parts of the parameters."""
        return any(map(is_part, self.parameters.values()))

    def state_dict(self) -> dict[str, Any]:
        """Return weights, their rests (see `Adam`), moments and mask, as a checkpoint stores them.

        Of sharded parameters, this process's parts.
        """
        return {**self._precise(), "moments": self._moments(), "mask": self.mask}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, where the parameters were not sharded or are sharded as here."""
        kinds = ("weights", "rests", "moments")
        own = {
            kind: {name: _part(value, self.parameters[name]) for name, value in state[kind].items()} for kind in kinds
        }
        self._restore(own)
        self._load_moments(own["moments"])
        self.mask = {name: mask.to(self.parameters[name].device) for name, mask in state["mask"].items()}
        self.accept()

    def _exact(self, p: nn.Parameter) -> Tensor:
        return exact(part(p), self.optimizer.rests.get(p))

    def _assign(self, p: nn.Parameter, value: Tensor) -> None:
        assign(part(p), self.optimizer.rests.get(p), value, self.optimizer.formats.get(p))

    def _precise(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights and their rests by name."""
        rests = {name: self.optimizer.rests.get(p) for name, p in self.parameters.items()}
        present = {name: rest for name, rest in rests.items() if rest is not None}
        return {"weights": {name: part(p).detach() for name, p in self.parameters.items()}, "rests": present}

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        for kind, tensors in self._precise().items():
            for name, tensor in tensors.items():
                tensor.copy_(state[kind][name])
        drop_gathered(self.model)

    def _moments(self) -> dict[str, dict[str, Any]]:
        """Return the optimizer's numbers of each parameter by name; none before the first step."""
        state = self.optimizer.state
        return {name: state[p] for name, p in self.parameters.items() if p in state}

    def _load_moments(self, moments: dict[str, dict[str, Any]]) -> None:
        self.optimizer.state.clear()
        for name, values in moments.items():
            p = self.parameters[name]
            self.optimizer.state[p] = {
                k: self.optimizer.room(p, v.dtype).copy_(v) if isinstance(v, Tensor) else v for k, v in values.items()
            }

    def _copy_moments(self) -> None:
        if self._accepted_moments is None:
            return
        moments = self._moments()
        self._accepted_moments = {name: self._accepted_moments.get(name, {}) for name in moments}
        for name, values in moments.items():
            numbers = {k: v for k, v in values.items() if not isinstance(v, Tensor)}
            self._accepted_moments[name].update(numbers)
            _copy_into(self._accepted_moments[name], {k: v for k, v in values.items() if k not in numbers})


def _copy_into(copies: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Copy the tensors to the main memory, into the copies that are there already."""
    for name, tensor in tensors.items():
        if name not in copies:
            pinned = tensor.device.type == "cuda"
            copies[name] = torch.empty_like(tensor, device="cpu", requires_grad=False, pin_memory=pinned)
        copies[name].copy_(tensor.detach())


def _part(value: Any, p: nn.Parameter) -> Any:
    """Return this process's part of a tensor of a parameter, or of the tensors in a dict; numbers as they are."""
    if isinstance(value, dict):
        return {name: _part(each, p) for name, each in value.items()}
    return part_like(value, p) if isinstance(value, Tensor) else value
