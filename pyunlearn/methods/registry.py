"""Registry of the methods: one row each. A loss is called by its parameter names, so a new one needs no adapter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args, get_type_hints

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
from pyunlearn.methods.match import match
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
    """A forget term: a loss, and the inputs that the loop has to provide.

    The names of the loss's positional parameters decide what the loop computes:

        forget, refusal, lengths   (B,) summed log-likelihoods of the forget text or of a refusal, and its scored tokens
        winner, loser              (B,) summed log-likelihoods of the preferred text and of the forget text
        reference, *_reference     the same under the reference model: (B,), or (n,) for a loss of single tokens
        log_likelihood             (n,) log-likelihoods of single tokens, with example (n,), counts (B,), weights (n,)
        *_probability              (B,) mean token probabilities of the two texts of a pair
        model, reference           `Distributions` at the scored rows, with targets (n,), example (n,), counts (B,)
        level, unseen              (n,) mean log-likelihood of a token's text if it were unseen; (Q,) of unseen tokens
        likely                     (n,) share of the tokens of a token's text that may stay likelier than the rest
        hidden                     (n, D) hidden states of one layer, with example, counts, direction (D,), norms (B,)

    Args:
        name: the name that a user passes.
        function: the loss, see above. Its keyword-only parameters are the method's options.
        source: the paper.
        extras: name -> default of options that the loop reads instead of the loss.
        pair: role of the text that is scored before the forget text: "refusal", "winner" or "alternate".
        needs_retain: True where the method does not work without a retain set.
        rate: factor on the default learning rate.
        retain_loss: name of the retain loss that it has by default.
        token_mean: True where the loss of an example is a mean over the scored tokens of one text.
    """

    name: str
    function: Callable[..., Tensor]
    source: str
    extras: Mapping[str, Any] = field(default_factory=dict)
    pair: str | None = None
    needs_retain: bool = False
    rate: float = 1.0
    retain_loss: str = "hold"
    token_mean: bool = False

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors that the loss takes."""
        parameters = inspect.signature(self.function).parameters.values()
        own = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD or p.name == "weights"]
        return tuple(own)

    @cached_property
    def kind(self) -> str:
        """Level of the loss: "example", "token", "vocabulary" (whole distributions) or "hidden" (hidden states)."""
        return next((kind for name, kind in _KINDS.items() if name in self.inputs), "example")

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """Roles of the texts that are scored for one example in a step, in order."""
        if self.pair:
            return (self.pair, "forget")
        return ("refusal",) if "refusal" in self.inputs else ("forget",)

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """Inputs that the run has to provide: "reference", "refusals", "winners", "alternates", "retain"."""
        reference = ("reference",) if any(name.endswith("reference") for name in self.inputs) else ()
        texts = tuple(f"{role}s" for role in self.roles if role != "forget")
        return (*reference, *texts, *(("retain",) if self.needs_retain else ()))

    @cached_property
    def options(self) -> dict[str, Any]:
        """Name -> default of every option that a user can set: those of the loss, then those that the loop reads."""
        parameters = inspect.signature(self.function).parameters.values()
        own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _NOT_OPTIONS}
        refusals = {"refusals": None} if "refusals" in self.needs else {}
        return own | refusals | dict(self.extras)

    @property
    def pairs(self) -> bool:
        """True where another text and the forget text are scored together."""
        return self.pair is not None

    @property
    def token(self) -> bool:
        """True where the loss sees the log-likelihoods of single tokens."""
        return self.kind == "token"

    @property
    def weighted(self) -> bool:
        """True where the loss accepts token weights."""
        return "forget" in self.roles and self.kind in ("example", "token")

    @property
    def passes(self) -> int:
        """Number of texts in the forward and backward pass of one example."""
        return len(self.roles)

    def loss(self, tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Tensor:
        """Return (B,) losses.

        Args:
            tensors: name of a parameter of the loss -> tensor.
            options: the options that a user set.
        """
        own = {k: v for k, v in options.items() if k not in OF_THE_LOOP}
        inputs = {name: tensors[name] for name in self.inputs if name != "weights" or tensors.get(name) is not None}
        return self.function(**inputs, **own, reduction="none")

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise ArgumentError for an option that the method does not have, or a number out of range.

        Without the check, a wrong sign would silently train on the forget set.
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
    """Return the constraint in `Annotated[float, Number(...)]`; for a plain float, a number of 0 or more."""
    hints = [hint, *get_args(hint)]  # Python 3.10 makes Optional[Annotated[...]] where the default is None
    kinds = [part for each in hints for part in getattr(each, "__metadata__", ()) if isinstance(part, Kind)]
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
"""Options that the loop reads and the loss does not get."""

_TEMPERATURE = {"temperature": 1.0}
_SELECT = {"temperature": 1.0, "top_fraction": 1.0}
_LAYER = {"alpha": 1200.0, "layer": None, "layers": None, "trainable": None}
_MULTIPLIER = {"multiplier": 50.0, "multiplier_step_size": 1.0, "multiplier_warmup": 0, "retain_tolerance": 0.02}

METHODS = {
    method.name: method
    for method in (
        Method("match", match, "pyunlearn", token_mean=True),
        Method("ga", ga, "arXiv 2210.01504", _SELECT, token_mean=True),
        Method("npo", npo, "arXiv 2404.05868"),
        Method("simnpo", simnpo, "arXiv 2410.07163", _SELECT),
        Method("kto", kto, "arXiv 2402.01306"),
        Method("hinge", hinge, "arXiv 2406.09179", _SELECT),
        # a descent on refusals, which are unlikely at first: the small steps of an ascent would not suffice
        Method("idk", idk, "arXiv 2401.06121", rate=10.0, token_mean=True),
        Method("dpo", dpo, "arXiv 2305.18290", {"winners": None}, pair="winner"),
        Method("idkdpo", dpo, "arXiv 2401.06121", pair="refusal"),
        Method("altpo", dpo, "arXiv 2409.13474", {"alternates": 5}, pair="alternate"),
        Method("wga", wga, "arXiv 2502.19301", _TEMPERATURE, token_mean=True),
        Method("tnpo", tnpo, "arXiv 2502.19301", token_mean=True),
        Method("wtnpo", wtnpo, "arXiv 2502.19301", token_mean=True),
        Method("satimp", satimp, "arXiv 2505.11953", _TEMPERATURE, token_mean=True),
        Method("flat", flat, "arXiv 2410.11143", pair="refusal"),
        Method("rmu", rmu, "arXiv 2403.03218", _LAYER, rate=10.0, retain_loss="representation"),
        Method("adaptive_rmu", adaptive_rmu, "arXiv 2408.06223", _LAYER, rate=10.0, retain_loss="representation"),
        Method("ceu", ceu, "arXiv 2503.01224"),
        Method("undial", undial, "arXiv 2402.10052", token_mean=True),
        Method("kl", kl, "arXiv 2302.09880", retain_loss="nll", token_mean=True),
        Method("pdu", pdu, "arXiv 2506.05314", _MULTIPLIER, needs_retain=True, retain_loss="nll", token_mean=True),
    )
}
"""Name -> forget term."""

ALIASES = {"graddiff": ("ga", "nll")} | {f"{name}+{loss}": (name, loss) for loss in ("nll", "kl") for name in METHODS}
"""Compound name, as papers use it -> (forget term, retain loss)."""

SYNONYMS = {"auto": "match", "ce-u": "ceu"}
"""Other name of a forget term -> name."""

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
        retain_loss: a name in `methods.retain`, None, or "auto": the method's default, if there is a retain set.
        has_retain: True where there is a retain set.
        options: the method's options, checked here.
        has_reference: True where a reference model other than the original one is passed.

    Returns:
        The method, and the name of the retain loss or None.

    Raises:
        ArgumentError: an unknown name, a wrong option, a retain loss that contradicts the name or the method or has no
            retain set, or kl where model and reference model would be the same.

    >>> method, retain_loss = resolve("npo+kl", "auto", has_retain=True)
    >>> method.name, method.source, retain_loss
    ('npo', 'arXiv 2404.05868', 'kl')
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
        retain_loss = method.retain_loss if has_retain else None
    _check_retain_loss(method, name, retain_loss, has_retain)
    method.check(options or {})
    direction = (options or {}).get("direction", "away")
    if key == "kl" and not has_reference and (retain_loss != "nll" or direction != "away"):
        raise ArgumentError(
            "method 'kl' compares the model with itself here, and so has no gradient to begin with: pass "
            'reference_model=, or retain= with retain_loss="nll" and the direction "away"'
        )
    return method, retain_loss


def _check_retain_loss(method: Method, name: str, retain_loss: str | None, has_retain: bool) -> None:
    """Raise ArgumentError where the retain loss is unknown, or the method or the data does not allow it."""
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
