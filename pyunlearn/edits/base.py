"""What every edit of the weights shares: the texts it is given, the writing, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyunlearn import models
from pyunlearn.data import Tokens, encode, read_examples
from pyunlearn.errors import ArgumentError, ModelError, TrainingError
from pyunlearn.models.scoring import batches_on, by_example, evaluation_mode
from pyunlearn.probes.gradients import trained_parameters
from pyunlearn.progress import Progress

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Kept(NamedTuple):
    """What stood in a parameter, in main memory: values (n,) at places (n,), or the whole of it where places is None."""

    values: Tensor
    places: Tensor | None


@dataclass(frozen=True, eq=False)
class EditResult:
    """A model whose weights were edited in place, and what it takes to go back.

    `model`        the model given (or loaded), changed
    `edit`         the name of the edit
    `changed`      parameter -> how many of its elements have other bits than before
    `nll_before`   role ("forget", "retain") -> mean over its texts of the negative log-likelihood, nats a token
    `nll_after`    the same after the edit
    `diagnostics`  numbers of the edit's own: see its docstring
    """

    model: Any = field(repr=False)
    edit: str
    changed: dict[str, int]
    nll_before: dict[str, float]
    nll_after: dict[str, float]
    diagnostics: dict[str, Any]
    kept: dict[str, Kept] = field(repr=False)

    @torch.no_grad()
    def undo(self) -> Any:
        """Puts the weights back bit for bit, and returns the model. Of several edits the last is undone first.

        Raises ModelError when the model has since lost a parameter or changed its type.
        """
        parameters = dict(self.model.named_parameters())
        for name, kept in self.kept.items():
            p = parameters.get(name)
            if p is None or p.dtype != kept.values.dtype:
                state = "is gone" if p is None else f"is {p.dtype} now and was {kept.values.dtype}"
                raise ModelError(
                    f"the edit cannot be undone, because {name} {state}: bring the model back to that first"
                )
            put_back(p, kept)
        return self.model

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights, ready for JSON."""
        return {
            "edit": self.edit, "nll_before": self.nll_before, "nll_after": self.nll_after, "diagnostics": self.diagnostics, "changed": self.changed,
        }  # fmt: skip

    def before(self) -> dict[str, Tensor]:
        """name -> the whole parameter as it was before the edit, in main memory, for each that was changed."""
        parameters, found = dict(self.model.named_parameters()), {}
        for name, kept in self.kept.items():
            found[name] = parameters[name].detach().to("cpu", copy=True)
            put_back(found[name], kept)
        return found


@torch.no_grad()
def put_back(p: Tensor, kept: Kept) -> None:
    """Writes what was kept into a parameter."""
    if kept.places is None:
        p.copy_(kept.values.view(p.shape))
    else:
        flat = p.detach().contiguous().flatten()
        flat[kept.places.to(p.device)] = kept.values.to(p.device)
        p.copy_(flat.view(p.shape))


def keep_difference(before: Tensor, after: Tensor) -> tuple[Kept, int] | None:
    """What stood in `before` wherever `after` has other bits, the smaller way, and how many these are; None where there are none."""
    bits = _BITS[before.element_size()]
    places = (before.contiguous().view(bits) != after.contiguous().view(bits)).flatten().nonzero().flatten()
    if not len(places):
        return None
    flat = before.flatten()
    if len(places) * (8 + flat.element_size()) < flat.numel() * flat.element_size():
        return Kept(flat[places].cpu(), places.cpu()), len(places)
    return Kept(flat.to("cpu", copy=True), None), len(places)


def wide(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is that already: where the arithmetic is done."""
    return x.detach() if x.dtype in (torch.float32, torch.float64) else x.detach().float()


class Editing:
    """One edit under way: `with Editing(...) as edit`, then `edit.write(name, values)` and `edit.done()`. An error takes everything back."""

    def __init__(
        self, name: str, model: Any, sources: dict[str, Any], tokenizer: Any, *, batch_size: int = 8, truncate: bool = False,
        workspace: int | None = None, progress: bool | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ArgumentError(f"batch_size must be a whole number, 1 or more, got {batch_size!r}")
        examples = {role: read_examples(s, role=role) for role, s in sources.items() if s is not None}
        if isinstance(model, (str, Path)):
            model, tokenizer = models.load(model, tokenizer=tokenizer)
        models.require_language_model(model)
        self.model: Any = model
        self.parameters = trained_parameters(model)
        if odd := next((n for n, p in self.parameters.items() if type(p.data) is not Tensor or p.is_meta), None):
            raise ModelError(
                f"{odd} is spread over several devices or not loaded, and an edit needs it whole: load the model in one process"
            )
        self.name, self.batch_size, self.workspace = name, batch_size, workspace
        both, length = models.is_encoder_decoder(model), models.context_length(model)
        tokenizer = models.tokenizer_of(model, tokenizer) if examples else None
        self.tokens = {
            role: encode(e, tokenizer, role=role, max_length=length, encoder_decoder=both, truncate=truncate)
            for role, e in examples.items()
        }
        self.likelihood = models.Likelihood(model, workspace=workspace)
        self.kept: dict[str, Kept] = {}
        self.counts: dict[str, int] = {}
        self.whole: dict[str, Tensor] = {}
        self.wanted = progress

    def __enter__(self) -> Editing:
        self.progress = Progress(self.wanted, self.name.replace("_", " "))
        try:
            self.nll_before = self.nll()
        except BaseException:
            self.progress.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.close()
        if kind is not None:
            for name, kept in self.kept.items():
                put_back(self.parameters[name], kept)
            for name, values in self.whole.items():
                put_back(self.parameters[name], Kept(values, None))

    def hold(self) -> None:
        """Copies all that trains to main memory: for an edit that has to let somebody else change the weights first."""
        self.whole = {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}

    @torch.no_grad()
    def write(self, name: str, values: Tensor) -> None:
        """Writes one parameter, once. Raises TrainingError where a value is not finite."""
        p = self.parameters[name]
        values = values.to(p.dtype)
        if not bool(torch.isfinite(values).all()):
            raise TrainingError(
                f"{self.name} would make {name} infinite or NaN, so nothing was changed: take a smaller step, or a model that is finite"
            )
        before = self.whole.pop(name).to(p.device) if name in self.whole else p.detach()
        difference = keep_difference(before, values)
        if difference is not None:
            self.kept[name], self.counts[name] = difference
        p.copy_(values)

    def add(self, name: str, step: Tensor, factor: float) -> None:
        """Writes parameter + factor * step, computed in float32."""
        p = self.parameters[name]
        self.write(name, wide(p) + factor * step.to(p.device, wide(p).dtype))

    @torch.no_grad()
    def nll(self) -> dict[str, float]:
        """Mean negative log-likelihood of each role's texts, nats a token."""
        found = {}
        with evaluation_mode(self.model):
            for role, tokens in self.tokens.items():
                total = 0.0
                for places, batch in batches_on(self.model, tokens, self.batch_size):
                    total -= sum(float(x.double().mean()) for x in by_example(self.likelihood(batch), tokens, places))
                found[role] = total / len(tokens)
        return found

    def done(self, **diagnostics: Any) -> EditResult:
        """The edit, with what it has cost."""
        return EditResult(self.model, self.name, self.counts, self.nll_before, self.nll(), diagnostics, self.kept)


def require_retain(tokens: dict[str, list[Tokens]], name: str, why: str) -> Sequence[Tokens]:
    """The retain texts. Raises ArgumentError where there are none."""
    if "retain" not in tokens:
        raise ArgumentError(f"{name} needs text to keep, {why}: pass retain=")
    return tokens["retain"]


def require_positive(**numbers: float) -> None:
    """Raises ArgumentError for the first number that is not finite and above 0."""
    for name, number in numbers.items():
        if not isinstance(number, (int, float)) or isinstance(number, bool) or not 0 < number < float("inf"):
            raise ArgumentError(f"{name} must be a number above 0, got {number!r}")


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    """name -> the gradient that stands there."""
    return {name: p.grad for name, p in model.named_parameters()}
