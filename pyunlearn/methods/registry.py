"""The methods by name: one row each. A loss is called by the names of its parameters, so a new one needs no adapter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_type_hints

from torch import Tensor

from pyunlearn.errors import ArgumentError, nearest
from pyunlearn.methods.adaptive_rmu import adaptive_rmu
from pyunlearn.methods.ceu import ceu
from pyunlearn.methods.dpo import dpo
from pyunlearn.methods.flat import flat
from pyunlearn.methods.gradient_ascent import ga
from pyunlearn.methods.hinge import hinge
from pyunlearn.methods.idk import idk
from pyunlearn.methods.kl import kl
from pyunlearn.methods.kto import kto
from pyunlearn.methods.npo import npo
from pyunlearn.methods.pdu import pdu
from pyunlearn.methods.rmu import rmu
from pyunlearn.methods.satimp import satimp
from pyunlearn.methods.simnpo import simnpo
from pyunlearn.methods.tnpo import tnpo
from pyunlearn.methods.undial import undial
from pyunlearn.methods.wga import wga
from pyunlearn.methods.wtnpo import wtnpo
from pyunlearn.options import Kind, Number, Option, Whole

_NOT_OPTIONS = ("reduction", "weights")  # keywords of a loss that the loop sets itself
_KINDS = {"log_likelihood": "token", "winner_probability": "token", "model": "vocabulary", "hidden": "hidden"}


@dataclass(frozen=True)
class Method:
    """A forget term: a loss, and what the loop around it has to provide.

    The loop computes what the parameters of `function` are named after:

        forget, refusal, lengths   (B,) summed log-likelihoods of the forget text or of a refusal, and its scored tokens
        winner, loser              (B,) summed log-likelihoods of the preferred text and of the forget text
        reference, *_reference     the same under the reference model: (B,), or (n,) for a loss on tokens
        log_likelihood             (n,) log-likelihoods of single tokens, with example (n,), counts (B,), weights (n,)
        *_probability              (B,) mean token probabilities of the two texts of a pair
        model, reference           `Distributions` at the scored rows, with targets (n,), example (n,), counts (B,)
        hidden                     (n, D) hidden states of one layer, with example, counts, direction (D,), norms (B,)
    """

    name: str
    function: Callable[..., Tensor]
    source: str
    extras: Mapping[str, Any] = field(default_factory=dict)  # options of the loop around it, with their defaults
    pair: str | None = None  # the text that is read before the forget text: "refusal", "winner" or "alternate"
    needs_retain: bool = False
    rate: float = 1.0  # factor on the default learning rate

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The names of the tensors that the loss takes."""
        parameters = inspect.signature(self.function).parameters.values()
        own = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD or p.name == "weights"]
        return tuple(own)

    @cached_property
    def kind(self) -> str:
        """What the loss sees of a text: "example", "token", "vocabulary" or "hidden"."""
        return next((kind for name, kind in _KINDS.items() if name in self.inputs), "example")

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """The texts that are scored for one example in a step, in order."""
        if self.pair:
            return (self.pair, "forget")
        return ("refusal",) if "refusal" in self.inputs else ("forget",)

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """What the run has to provide: "reference", "refusals", "winners", "alternates", "retain"."""
        reference = ("reference",) if any(name.endswith("reference") for name in self.inputs) else ()
        texts = tuple(f"{role}s" for role in self.reads if role != "forget")
        return (*reference, *texts, *(("retain",) if self.needs_retain else ()))

    @cached_property
    def options(self) -> dict[str, Any]:
        """Name -> default of every option that a user can set: those of the loss, then those of the loop around it."""
        parameters = inspect.signature(self.function).parameters.values()
        own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _NOT_OPTIONS}
        refusals = {"refusals": None} if "refusals" in self.needs else {}
        return own | refusals | dict(self.extras)

    @property
    def pairs(self) -> bool:
        """True where another text and the forget text are read together."""
        return self.pair is not None

    @property
    def token(self) -> bool:
        """True where the loss sees the log-likelihoods of single tokens."""
        return self.kind == "token"

    @property
    def weighted(self) -> bool:
        """True where token weights mean something to it."""
        return "forget" in self.reads and self.kind in ("example", "token")

    @property
    def passes(self) -> int:
        """The texts that go forward and backward for one example in one step."""
        return len(self.reads)

    def loss(self, tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Tensor:
        """Return (B,) losses, from tensors by the names of the loss's parameters and the options that a user set."""
        own = {k: v for k, v in options.items() if k not in OF_THE_LOOP}
        given = {name: tensors[name] for name in self.inputs if name != "weights" or tensors.get(name) is not None}
        return self.function(**given, **own, reduction="none")

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise ArgumentError for an option that it does not have, or a number that it cannot take.

        A wrong sign would turn what is to be forgotten into what is to be learned, and nothing would say so.
        """
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            has = f"has {', '.join(self.options)}" if self.options else "has none"
            raise ArgumentError(f"method {self.name!r} has no option {unknown[0]!r}; it {has}")
        hints = get_type_hints(self.function, include_extras=True)
        for name, value in options.items():
            default = self.options[name]
            kind = _EXTRAS.get(name) or _declared(hints.get(name), default)
            if kind is not None:
                Option(kind, "", "", default is None, False, None).checked(name, value, default)


def _declared(hint: Any, default: Any) -> Kind | None:
    """Return the kind in `Annotated[float, Number(...)]`; numbers from 0 on for a plain float."""
    kinds = [part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Kind)]
    return kinds[0] if kinds else Number(0) if isinstance(default, float) else None


_EXTRAS: dict[str, Kind] = {
    "temperature": Number(above=0),
    "top_fraction": Number(above=0, maximum=1),
    "alternates": Whole(1),
    "multiplier": Number(0),
    "multiplier_step_size": Number(0),
    "multiplier_warmup": Whole(0),
    "retain_tolerance": Number(),
    "alpha": Number(0),
}
OF_THE_LOOP = (*_EXTRAS, "refusals", "winners", "layer", "layers", "trainable")
"""Options that the loss itself never sees."""

_TEMPERATURE = {"temperature": 1.0}
_SELECT = {"temperature": 1.0, "top_fraction": 1.0}
_LAYER = {"alpha": 1200.0, "layer": None, "layers": None, "trainable": None}
_MULTIPLIER = {"multiplier": 50.0, "multiplier_step_size": 1.0, "multiplier_warmup": 0, "retain_tolerance": 0.02}

METHODS = {
    method.name: method
    for method in (
        Method("ga", ga, "arXiv 2210.01504", _SELECT),
        Method("npo", npo, "arXiv 2404.05868"),
        Method("simnpo", simnpo, "arXiv 2410.07163", _SELECT),
        Method("kto", kto, "arXiv 2402.01306"),
        Method("hinge", hinge, "arXiv 2406.09179", _SELECT),
        # it descends: what it has to learn is unlikely at first, and an ascent's small steps do not get there
        Method("idk", idk, "arXiv 2401.06121", rate=10.0),
        Method("dpo", dpo, "arXiv 2305.18290", {"winners": None}, pair="winner"),
        Method("idkdpo", dpo, "arXiv 2401.06121", pair="refusal"),
        Method("altpo", dpo, "arXiv 2409.13474", {"alternates": 5}, pair="alternate"),
        Method("wga", wga, "arXiv 2502.19301", _TEMPERATURE),
        Method("tnpo", tnpo, "arXiv 2502.19301"),
        Method("wtnpo", wtnpo, "arXiv 2502.19301"),
        Method("satimp", satimp, "arXiv 2505.11953", _TEMPERATURE),
        Method("flat", flat, "arXiv 2410.11143", pair="refusal"),
        Method("rmu", rmu, "arXiv 2403.03218", _LAYER, rate=10.0),
        Method("adaptive_rmu", adaptive_rmu, "arXiv 2408.06223", _LAYER, rate=10.0),
        Method("ceu", ceu, "arXiv 2503.01224"),
        Method("undial", undial, "arXiv 2402.10052"),
        Method("kl", kl, "arXiv 2302.09880"),
        Method("pdu", pdu, "arXiv 2506.05314", _MULTIPLIER, needs_retain=True),
    )
}
"""The forget terms."""

ALIASES = {"graddiff": ("ga", "nll")} | {f"{name}+{loss}": (name, loss) for loss in ("nll", "kl") for name in METHODS}
"""The field's compound names: (forget term, retain loss)."""

SYNONYMS = {"ce-u": "ceu"}
"""Other spellings of a forget term's name."""

_EDITS = {"lunar": "pyunlearn.edits.lunar(model, forget, retain=retain)"}


def resolve(
    name: str,
    retain_loss: str | None,
    has_retain: bool,
    options: Mapping[str, Any] | None = None,
    has_reference: bool = False,
) -> tuple[Method, str | None]:
    """Return the method and the retain loss behind a name, such as "npo" or "npo+kl".

    Args:
        name: a forget term, with or without "+nll" or "+kl"; "graddiff" is ga+nll.
        retain_loss: "auto" is the method's own, or else nll, where there is a retain set; see `methods.retain`.
        has_retain: True where there is a retain set.
        options: the method's own options, checked here.
        has_reference: True where a reference model of its own is given.

    Raises ArgumentError for an unknown name (with the nearest), a wrong option, a retain loss that the name or the
    method contradicts or that has no retain set, and for kl where model and reference model would be the same.
    """
    term, plus, rest = name.lower().partition("+")
    key = SYNONYMS.get(term, term) + plus + rest
    if key in _EDITS:
        raise ArgumentError(
            f"{key} is one edit of the weights and no ascent: {_EDITS[key]} makes it, and pyunlearn.audit measures it"
        )
    if key not in METHODS and key not in ALIASES:
        raise ArgumentError(f"there is no method {name!r}; {nearest(name, [*METHODS, *ALIASES, *SYNONYMS])}")
    if key in ALIASES:
        key, implied = ALIASES[key]
        if retain_loss not in ("auto", None, implied) and (implied, retain_loss) != ("nll", "hold"):
            raise ArgumentError(
                f"method {name!r} trains with retain_loss={implied!r}, and retain_loss={retain_loss!r} was given: "
                "choose one"
            )
        retain_loss = "hold" if retain_loss == "hold" else implied
    method = METHODS[key]
    if retain_loss == "auto":
        retain_loss = ("representation" if method.kind == "hidden" else "nll") if has_retain else None
    _check_retain_loss(method, name, retain_loss, has_retain)
    direction = (options or {}).get("direction", "away")
    if key == "kl" and not has_reference and (retain_loss != "nll" or direction != "away"):
        raise ArgumentError(
            "method 'kl' compares the model with itself here, and so has no gradient to begin with: pass "
            'reference_model=, or retain= with retain_loss="nll" and the direction "away"'
        )
    method.check(options or {})
    return method, retain_loss


def _check_retain_loss(method: Method, name: str, retain_loss: str | None, has_retain: bool) -> None:
    if retain_loss not in ("nll", "kl", "hold", "representation", None):
        raise ArgumentError(
            f'retain_loss must be "auto", "nll", "kl", "hold", "representation" or None, got {retain_loss!r}'
        )
    if retain_loss == "representation" and method.kind != "hidden":
        able = ", ".join(m.name for m in METHODS.values() if m.kind == "hidden")
        raise ArgumentError(
            f'retain_loss="representation" is the own term of {able}, and {method.name!r} has none: take "nll", "kl" '
            'or "hold"'
        )
    if retain_loss and not has_retain:
        alternative = "" if method.needs_retain else f", or {method.name!r} with no retain loss"
        raise ArgumentError(
            f"method {name!r} with retain_loss={retain_loss!r} needs text to keep: pass retain={alternative}"
        )
    if method.needs_retain and retain_loss not in ("nll", "kl"):
        raise ArgumentError(
            f"method {method.name!r} bounds the loss of a retain set while it forgets: pass retain=, with retain_loss "
            '"nll" or "kl"'
        )
