"""Shared parts of all edits: reading the texts, checking the arguments, writing weights, and undoing the edit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyunlearn.data import TokenBatch, Tokens, read_examples
from pyunlearn.data.redaction import masked
from pyunlearn.edits.config import EditConfig
from pyunlearn.edits.rounding import Rounding
from pyunlearn.errors import ArgumentError, ModelError, TrainingError
from pyunlearn.models.condition import require_trainable
from pyunlearn.models.language_model import LanguageModel, require_model, require_tokenizer
from pyunlearn.models.scoring import Scorer, evaluation_mode
from pyunlearn.options import Flag, Kind, Number, Whole, require
from pyunlearn.probes.gradients import mean_gradient, trained_parameters
from pyunlearn.probes.renderings import RenderedTexts, likeliest, render
from pyunlearn.progress import Progress, logger

POSITIVE = Number(above=0)
COUNT = Whole(1)

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class SavedValues(NamedTuple):
    """Earlier values of a parameter, in main memory: those at flat `indices` (n,), or all of them where it is None."""

    values: Tensor
    indices: Tensor | None


@dataclass(frozen=True, eq=False)
class EditResult:
    """A model whose weights were edited in place, the numbers of the edit, and the values to undo it.

    `model`        the edited model: the object passed in, or the one loaded from a path
    `edit`         the name of the edit
    `changed`      parameter name -> number of its elements whose bits differ from before
    `nll_before`   role ("forget", "retain") -> mean over its texts of their negative log-likelihood, nats per token
    `nll_after`    the same after the edit
    `diagnostics`  numbers particular to the edit: see the edit's docstring
    `rendering`    the form in which the model read records with a prompt; None where no forget text has one
    `notes`        on the texts and their form, and on a step that rounding took away: one sentence each; those on long
                   texts and on rounding are warnings too
    """

    model: Any = field(repr=False)
    edit: str
    changed: dict[str, int]
    nll_before: dict[str, float]
    nll_after: dict[str, float]
    diagnostics: dict[str, Any]
    rendering: str | None
    notes: list[str]
    saved: dict[str, SavedValues] = field(repr=False)

    @torch.no_grad()
    def undo(self) -> Any:
        """Restore the weights bit for bit, and return the model. Undo several edits in reverse order.

        Raises ModelError when the model has since lost a parameter or changed its dtype.
        """
        parameters = dict(self.model.named_parameters())
        for name, saved in self.saved.items():
            p = parameters.get(name)
            if p is None or p.dtype != saved.values.dtype:
                state = "is gone" if p is None else f"is {p.dtype} now and was {saved.values.dtype}"
                raise ModelError(f"the edit cannot be undone, because {name} {state}: restore the model to that first")
            restore(p, saved)
        return self.model

    def to_dict(self) -> dict[str, Any]:
        """Return everything except weights, ready for JSON."""
        return {
            "edit": self.edit,
            "nll_before": self.nll_before,
            "nll_after": self.nll_after,
            "diagnostics": self.diagnostics,
            "rendering": self.rendering,
            "notes": self.notes,
            "changed": self.changed,
        }

    def before(self) -> dict[str, Tensor]:
        """Return name -> the whole parameter before the edit, in main memory, for each parameter that changed."""
        parameters, originals = dict(self.model.named_parameters()), {}
        for name, saved in self.saved.items():
            originals[name] = parameters[name].detach().to("cpu", copy=True)
            restore(originals[name], saved)
        return originals


@torch.no_grad()
def restore(p: Tensor, saved: SavedValues) -> None:
    """Write saved values back into a parameter.

    >>> p = torch.tensor([1.0, 9.0, 3.0])
    >>> restore(p, SavedValues(torch.tensor([2.0]), torch.tensor([1])))
    >>> p
    tensor([1., 2., 3.])
    """
    if saved.indices is None:
        p.copy_(saved.values.view(p.shape))
    else:
        flat = p.detach().contiguous().flatten()
        flat[saved.indices.to(p.device)] = saved.values.to(p.device)
        p.copy_(flat.view(p.shape))


def saved_difference(before: Tensor, after: Tensor) -> tuple[SavedValues, int] | None:
    """Return the values of `before` where the bits of `after` differ, and their number; None where nothing differs.

    The values are saved with their indices or as the whole tensor, whichever is smaller.

    >>> saved_difference(torch.zeros(9), torch.eye(3).flatten())[1]
    3
    """
    bits = _BITS[before.element_size()]
    indices = (before.contiguous().view(bits) != after.contiguous().view(bits)).flatten().nonzero().flatten()
    if not len(indices):
        return None
    flat = before.flatten()
    if len(indices) * (8 + flat.element_size()) < flat.numel() * flat.element_size():
        return SavedValues(flat[indices].cpu(), indices.cpu()), len(indices)
    return SavedValues(flat.to("cpu", copy=True), None), len(indices)


def wide(x: Tensor) -> Tensor:
    """Return the tensor, detached, in the precision of the arithmetic: float64 stays, all else becomes float32."""
    return x.detach() if x.dtype in (torch.float32, torch.float64) else x.detach().float()


class Editing:
    """Context manager of one edit: it reads the texts, writes parameters, and restores them after an error.

        with Editing("my_edit", model, {"forget": forget}, tokenizer, config) as edit:
            edit.write(name, values)
            return edit.finish()

    Args:
        name: the edit's, for messages.
        model: a transformers language model, a path to load it from, or a LanguageModel.
        sources: role -> texts in any form that `pyunlearn.data.read_examples` takes, or None for an optional role
            without texts.
        tokenizer: the model's; None: loaded from where the model came from.
        config: the shared settings.
        progress: True or False: show a progress bar or not; None: on a terminal only.
        needs: role -> reason, of the roles without which the edit cannot work.
        unmeasured: roles that are read alone, and whose likelihood is not measured.

    Raises:
        ArgumentError: a missing role in `needs`, or an argument of a wrong type. DataError: texts that cannot be read.
        ModelError: a model without a language-model head or trainable parameters, or sharded parameters.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        sources: Mapping[str, Any],
        tokenizer: Any = None,
        config: EditConfig | None = None,
        *,
        progress: bool | None = None,
        needs: Mapping[str, str] | None = None,
        unmeasured: Collection[str] = (),
    ) -> None:
        require_optional(Flag(), progress=progress)
        require_model("model", model, look_up=False)
        require_tokenizer("tokenizer", tokenizer)
        for role, reason in (needs or {}).items():
            if sources.get(role) is None:
                raise ArgumentError(f"{name} needs {role} texts, {reason}: pass {role}= (--{role})")
        self.name = name
        self.config = EditConfig() if config is None else config
        self.show_progress, self.unmeasured = progress, unmeasured
        examples = {
            role: read_examples(source, role=role, turns=self.config.turns)
            for role, source in sources.items()
            if source is not None or role == "forget"
        }
        require_model("model", model)
        self.lm = LanguageModel.of(model, tokenizer, workspace=self.config.workspace, needs_tokenizer=bool(examples))
        self.scorer = Scorer(self.lm, self.config.batch_size)
        require_trainable(self.lm.module)
        self.parameters = trained_parameters(self.lm.module)
        if odd := next((n for n, p in self.parameters.items() if type(p.data) is not Tensor or p.is_meta), None):
            raise ModelError(
                f"{odd} is spread over several devices or not loaded, and an edit needs it whole: "
                "load the model in one process"
            )
        self.notes: list[str] = []
        self._take(render(self.lm, examples, self.config.template, truncate=self.config.truncate, short_windows=False))
        self.rounding = Rounding()
        self.saved: dict[str, SavedValues] = {}
        self.changed: dict[str, int] = {}
        self.backups: dict[str, Tensor] = {}

    @property
    def model(self) -> Any:
        """The model as it was passed in or loaded, wrappers included."""
        return self.lm.module

    def __enter__(self) -> Editing:
        self.progress = Progress(self.show_progress, self.name.replace("_", " "))
        self.gradients = torch.enable_grad()  # also where the caller has switched them off
        self.gradients.__enter__()
        try:
            self.choose_form()
            self.nll_before = self.nll()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.close()
        self.gradients.__exit__(kind, error, trace)
        if kind is not None:
            for name, saved in self.saved.items():
                restore(self.parameters[name], saved)
            for name, values in self.backups.items():
                restore(self.parameters[name], SavedValues(values, None))

    def _take(self, texts: RenderedTexts) -> None:
        """Read the texts in a rendering: `tokens` of each role, and their `shares` of their records."""
        self.texts = texts
        self.tokens: dict[str, list[Tokens]] = dict(texts.tokens)
        self.shares = {role: shares_of(each, texts.encoded.records[role]) for role, each in self.tokens.items()}

    def choose_form(self) -> None:
        """Read the texts in the form in which the model knows the forget set best, where `template` is auto.

        Notes say in which, and what of long texts is read.
        """
        if self.config.template == "auto" and self.texts.name is not None:
            with evaluation_mode(self.model):
                score = self.scorer.token_log_likelihood
                self._take(likeliest(self.lm, self.texts, score, truncate=self.config.truncate))
        if line := self.texts.example_line(self.lm, change=masked):
            logger.info(line)
        self.notes += self.texts.notes(memorized=True)
        for note in self.texts.encoded.notes:
            warnings.warn(note, stacklevel=4)

    def batches(self, tokens: Sequence[Tokens]) -> Iterator[tuple[list[int], TokenBatch]]:
        """Yield (indices into `tokens`, their batch on the model's device), `config.batch_size` texts at a time."""
        return self.scorer.batches(tokens)

    def count(self, *roles: str) -> int:
        """Return the number of records of the roles, those of a role without texts being none."""
        return round(math.fsum(share for role in roles for share in self.shares.get(role, ())))

    def gradient(self, *roles: str) -> dict[str, Tensor]:
        """Return name -> mean over the roles' records of the gradient of the NLL per token, float32.

        A long text that is read in windows counts once.
        """
        tokens = [t for role in roles for t in self.tokens.get(role, ())]
        shares = [share for role in roles for share in self.shares.get(role, ())]
        return mean_gradient(
            self.model,
            tokens,
            weights=None if len(tokens) == self.count(*roles) else shares,
            batch_size=self.config.batch_size,
            workspace=self.config.workspace,
        )

    def back_up(self) -> None:
        """Copy all trainable parameters to main memory: for an edit during which other code changes the weights."""
        self.backups = {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}

    @torch.no_grad()
    def write(self, name: str, exact: Tensor, step: Tensor | None = None) -> None:
        """Write one parameter; call it once for each. Raises TrainingError where a value is not finite.

        Args:
            name: of the parameter.
            exact: its new values, which are rounded to its dtype.
            step: the change before any rounding; None: `exact` less the present values.
        """
        p = self.parameters[name]
        values = exact.to(p.device, p.dtype)
        if not bool(torch.isfinite(values).all()):
            raise TrainingError(
                f"{self.name} would make {name} infinite or NaN, so nothing was changed: "
                "take a smaller step, or a model that is finite"
            )
        before = self.backups.pop(name).to(p.device) if name in self.backups else p.detach()
        difference = saved_difference(before, values)
        if difference is not None:
            self.saved[name], self.changed[name] = difference
        step = wide(exact) - wide(before).to(exact.device) if step is None else step
        self.rounding.add(step, wide(values) - wide(before))
        p.copy_(values)

    def add(self, name: str, step: Tensor, factor: float) -> None:
        """Write parameter + factor * step, computed in float32 or more."""
        p = self.parameters[name]
        step = factor * step.to(p.device, wide(p).dtype)
        self.write(name, wide(p) + step, step)

    @property
    def step_norm(self) -> float:
        """Euclidean norm of the change of all weights, as they were written."""
        return self.rounding.written**0.5

    def nll(self) -> dict[str, float]:
        """Return a dict from set ("forget", "retain") to the mean over its records of their NLL, nats per token."""
        means = {}
        with evaluation_mode(self.model):
            for role in [role for role in self.tokens if role not in self.unmeasured]:
                per_text = [float(x.mean()) for x in self.scorer.token_log_likelihood(self.tokens[role])]
                weighted = (share * x for share, x in zip(self.shares[role], per_text, strict=True))
                means[role] = -sum(weighted) / self.count(role)
        return means

    def finish(self, **diagnostics: Any) -> EditResult:
        """Measure the texts again and return the result of the edit."""
        if lost := self.rounding.note({p.dtype for p in self.parameters.values()}):
            self.notes.append(lost)
            warnings.warn(lost, stacklevel=3)
        return EditResult(
            model=self.model,
            edit=self.name,
            changed=self.changed,
            nll_before=self.nll_before,
            nll_after=self.nll(),
            diagnostics=diagnostics,
            rendering=self.texts.name,
            notes=self.notes,
            saved=self.saved,
        )


def require_optional(kind: Kind, **values: Any) -> None:
    """Raise ArgumentError for the first named value that is neither None nor accepted by the kind.

    >>> require_optional(COUNT, samples=None, passes=0)
    Traceback (most recent call last):
    pyunlearn.errors.ArgumentError: passes must be a whole number, 1 or more, got 0
    """
    require(kind, **{name: value for name, value in values.items() if value is not None})


def shares_of(tokens: Sequence[Tokens], records: Sequence[int] | NDArray[np.integer]) -> list[float]:
    """Return for each text its share of the scored tokens of its record: 1 where that is read at once.

    >>> shares_of([Tokens((5, 6, 7, 8), 1), Tokens((8, 9), 1), Tokens((5, 6), 1)], [0, 0, 1])
    [0.75, 0.25, 1.0]
    """
    scored = [len(t.scored) for t in tokens]
    totals = np.bincount(records, weights=scored)
    return [n / float(totals[record]) for n, record in zip(scored, records, strict=True)]


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    """Return a dict from parameter name to the parameter's present gradient."""
    return {name: p.grad for name, p in model.named_parameters()}
