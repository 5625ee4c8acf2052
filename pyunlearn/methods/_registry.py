"""The methods by name: what each needs, so that the loop can call any of them the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from pyunlearn.errors import ArgumentError, nearest
from pyunlearn.methods._options import check_numbers
from pyunlearn.methods._reduction import token_means
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


class Method(NamedTuple):
    """A forget term as the loop sees it. What `loss` is called with is its `kind`; it returns each example's loss, (B,).

    example     loss(forget, lengths, reference): (B,) summed log-likelihoods under the model, scored tokens, and summed log-likelihoods under the
                reference model (the original, unless the caller gave another). A method that reads another text beside the forget
                text gets all three as (B, 2), in that order.
    token       loss(log_likelihood (n,), example (n,), counts (b,), reference (n,)), and the tokens' weights (n,) after these where they have some; the two of a pair
                are neighbouring examples.
    vocabulary  loss(model, reference, targets (n,), example (n,), counts (b,)): `Distributions` at the scored rows, the reference's None where it
                needs none.
    hidden      loss(hidden (n, D), example (n,), counts (b,), direction (D,), norms (b,)): see `rmu` and `adaptive_rmu`.
    """

    name: str
    loss: Callable[..., Tensor]
    source: str
    options: dict[str, Any]  # with their defaults
    reads: tuple[str, ...] = ("forget",)  # what is scored in a step: "refusal", "winner" or "alternate", "forget"
    needs: tuple[str, ...] = ()  # "reference", "refusals", "winners", "alternates", "retain"
    kind: str = "example"
    rate: float = 1.0  # the default learning rate is multiplied by it

    @property
    def token(self) -> bool:
        """Whether it sees each example's single tokens, by their log-likelihoods."""
        return self.kind == "token"

    @property
    def pairs(self) -> bool:
        """Whether another text and the forget text are read together."""
        return len(self.reads) == 2

    @property
    def weighted(self) -> bool:
        """Whether weights of the forget text's tokens mean something to it."""
        return "forget" in self.reads and self.kind in ("example", "token")

    @property
    def passes(self) -> int:
        """Texts that go forward and backward for one example in one step."""
        return len(self.reads)


def _flat(
    log_likelihood: Tensor, example: Tensor, counts: Tensor, reference: Tensor, weights: Tensor | None = None, **options: Any
) -> Tensor:  # fmt: skip
    probability = token_means(log_likelihood.exp(), example, counts, weights).view(-1, 2)
    return flat(probability[:, 0], probability[:, 1], **options)


def _method(
    name: str, function: Callable[..., Tensor], loss: Callable[..., Tensor], source: str, *, select: tuple[str, ...] = (),
    token: bool = False, loop: dict[str, Any] | None = None, **what: Any,
) -> Method:  # fmt: skip
    """Its options are the function's keywords, those that change what it is shown (temperature, top_fraction) and those of the loop around it."""
    own = {k: v for k, v in (function.__kwdefaults__ or {}).items() if k not in ("reduction", "weights")}
    own |= (
        dict.fromkeys(select, 1.0) | ({"refusals": None} if "refusals" in what.get("needs", ()) else {}) | (loop or {})
    )
    what.setdefault("kind", "token" if token else "example")
    return Method(name, lambda *given, **o: loss(*given, reduction="none", **o), "arXiv " + source, own, **what)


def _dpo(f: Tensor, n: Tensor, r: Tensor, **options: Any) -> Tensor:
    return dpo(f[:, 0], r[:, 0], f[:, 1], r[:, 1], **options)


_both = ("refusal", "forget")
_layer: dict[str, Any] = {"alpha": 1200.0, "layer": None, "layers": None, "trainable": None}
_select = ("temperature", "top_fraction")
METHODS = {
    m.name: m
    for m in (
        _method("ga", ga, lambda f, n, r, **o: ga(f, n, **o), "2210.01504", select=_select),
        _method("npo", npo, lambda f, n, r, **o: npo(f, r, **o), "2404.05868", needs=("reference",)),
        _method("simnpo", simnpo, lambda f, n, r, **o: simnpo(f, n, **o), "2410.07163", select=_select),
        _method("kto", kto, lambda f, n, r, **o: kto(f, r, **o), "2402.01306", needs=("reference",)),
        _method("hinge", hinge, lambda f, n, r, **o: hinge(f, n, **o), "2406.09179", select=_select),
        _method(
            "idk", idk, lambda f, n, r, **o: idk(f, n, **o), "2401.06121", reads=("refusal",), needs=("refusals",),
            rate=10.0,  # it descends: what it has to learn is unlikely at first, and an ascent's small steps do not get there
        ),
        _method("dpo", dpo, _dpo, "2305.18290", reads=("winner", "forget"), needs=("reference", "winners"), loop={"winners": None}),
        _method("idkdpo", dpo, _dpo, "2401.06121", reads=_both, needs=("reference", "refusals")),
        _method(
            "altpo", dpo, _dpo, "2409.13474", reads=("alternate", "forget"), needs=("reference", "alternates"), loop={"alternates": 5}
        ),
        _method("wga", wga, lambda x, e, n, r, w=None, **o: wga(x, e, n, weights=w, **o), "2502.19301", select=("temperature",), token=True),
        _method("tnpo", tnpo, lambda x, e, n, r, w=None, **o: tnpo(x, e, n, r, weights=w, **o), "2502.19301", needs=("reference",), token=True),
        _method("wtnpo", wtnpo, lambda x, e, n, r, w=None, **o: wtnpo(x, e, n, r, weights=w, **o), "2502.19301", needs=("reference",), token=True),
        _method(
            "satimp", satimp, lambda x, e, n, r, w=None, **o: satimp(x, e, n, weights=w, **o), "2505.11953", select=("temperature",), token=True
        ),
        _method("flat", flat, _flat, "2410.11143", reads=_both, needs=("refusals",), token=True),
        _method("rmu", rmu, lambda h, e, n, u, r, **o: rmu(h, e, n, u, **o), "2403.03218", kind="hidden", loop=_layer, rate=10.0),
        _method("adaptive_rmu", adaptive_rmu, adaptive_rmu, "2408.06223", kind="hidden", loop=_layer, rate=10.0),
        _method("ceu", ceu, lambda m, r, *rows, **o: ceu(m, *rows, **o), "2503.01224", kind="vocabulary"),
        _method("undial", undial, undial, "2402.10052", needs=("reference",), kind="vocabulary"),
        _method("kl", kl, kl, "2302.09880", needs=("reference",), kind="vocabulary"),
        _method(
            "pdu", pdu, lambda m, r, targets, *rows, **o: pdu(m, *rows, **o), "2506.05314", needs=("retain",), kind="vocabulary",
            loop={"multiplier": 50.0, "multiplier_step_size": 1.0, "multiplier_warmup": 0, "retain_tolerance": 0.02},
        ),
    )
}  # fmt: skip
"""The forget terms."""

OF_THE_LOOP = (
    "temperature", "top_fraction", "refusals", "winners", "alternates", "multiplier", "multiplier_step_size", "multiplier_warmup", "retain_tolerance",
    "alpha", "layer", "layers", "trainable",
)  # fmt: skip
"""Options that a method's own function never sees."""

ALIASES = {"graddiff": ("ga", "nll")} | {f"{name}+{loss}": (name, loss) for loss in ("nll", "kl") for name in METHODS}
"""The field's compound names: (forget term, retain loss)."""

SYNONYMS = {"ce-u": "ceu"}
"""Other spellings of a forget term's name."""

_EDITS = {"lunar": "pyunlearn.edits.lunar(model, forget, retain=retain)"}


def resolve(
    name: str, retain_loss: str | None, has_retain: bool, options: dict[str, Any], has_reference: bool = False
) -> tuple[Method, str | None]:
    """The method and the retain loss behind a name; retain_loss "auto" is the method's own, or else nll, where there is a retain set.

    "nll" trains on the retain set; "kl" keeps the reference's whole distribution there; "hold" only undoes what the run has cost it: mean over examples
    of max(0, NLL - NLL before the run).
    "representation", RMU's own, keeps the hidden states of the retain set in the layer that is steered, with the method's weight alpha.

    Raises ArgumentError for an unknown name (with the nearest), an option the method does not have or that is no number it can take, a retain loss without a retain set or one that
    the name or the method contradicts, and for kl without a reference model of its own (`has_reference`) where nothing would move.
    """
    term, plus, rest = name.lower().partition("+")
    key = SYNONYMS.get(term, term) + plus + rest
    if key in _EDITS:
        raise ArgumentError(
            f"{key} is one edit of the weights and no ascent: {_EDITS[key]} makes it, and pyunlearn.audit measures it"
        )
    if key not in METHODS and key not in ALIASES:
        raise ArgumentError(f"there is no method {name!r}; {nearest(name, [*METHODS, *ALIASES, *SYNONYMS])}")
    if retain_loss not in ("auto", "nll", "kl", "hold", "representation", None):
        raise ArgumentError(
            f'retain_loss must be "auto", "nll", "kl", "hold", "representation" or None, got {retain_loss!r}'
        )
    if key in ALIASES:
        key, forced = ALIASES[key]
        if retain_loss not in ("auto", None, forced) and (forced, retain_loss) != ("nll", "hold"):
            raise ArgumentError(
                f"method {name!r} trains with retain_loss={forced!r}, and retain_loss={retain_loss!r} was given: choose one"
            )
        retain_loss = "hold" if retain_loss == "hold" else forced
    method = METHODS[key]
    if retain_loss == "auto":
        retain_loss = ("representation" if method.kind == "hidden" else "nll") if has_retain else None
    if retain_loss == "representation" and method.kind != "hidden":
        of = ", ".join(m.name for m in METHODS.values() if m.kind == "hidden")
        raise ArgumentError(
            f'retain_loss="representation" is the own term of {of}, and {key!r} has none: take "nll", "kl" or "hold"'
        )
    if retain_loss and not has_retain:
        raise ArgumentError(
            f"method {name!r} with retain_loss={retain_loss!r} needs text to keep: pass retain="
            + ("" if "retain" in method.needs else f", or {key!r} with no retain loss")
        )
    if "retain" in method.needs and retain_loss not in ("nll", "kl"):
        raise ArgumentError(
            f'method {key!r} bounds the loss of a retain set while it forgets: pass retain=, with retain_loss "nll" or "kl"'
        )
    if key == "kl" and not has_reference and (retain_loss != "nll" or options.get("direction", "away") != "away"):
        raise ArgumentError(
            "method 'kl' compares the model with itself here, and so has no gradient to begin with: pass reference_model=, or retain= "
            'with retain_loss="nll" and the direction "away"'
        )
    unknown = sorted(set(options) - set(method.options))
    if unknown:
        has = f"has {', '.join(method.options)}" if method.options else "has none"
        raise ArgumentError(f"method {key!r} has no option {unknown[0]!r}; it {has}")
    check_numbers(key, method.options, options)
    return method, retain_loss
