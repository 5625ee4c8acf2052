"""The methods by name: what each needs, so that the loop can call any of them the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from pyunlearn.errors import ArgumentError, nearest
from pyunlearn.methods._reduction import token_means
from pyunlearn.methods.adaptive_rmu import adaptive_rmu
from pyunlearn.methods.dpo import dpo
from pyunlearn.methods.flat import flat
from pyunlearn.methods.gradient_ascent import ga
from pyunlearn.methods.hinge import hinge
from pyunlearn.methods.idk import idk
from pyunlearn.methods.kto import kto
from pyunlearn.methods.npo import npo
from pyunlearn.methods.rmu import rmu
from pyunlearn.methods.satimp import satimp
from pyunlearn.methods.simnpo import simnpo
from pyunlearn.methods.tnpo import tnpo
from pyunlearn.methods.wga import wga
from pyunlearn.methods.wtnpo import wtnpo


class Method(NamedTuple):
    """A forget term as the loop sees it.

    `loss(forget, lengths, reference)` takes (B,) summed log-likelihoods under the model, scored tokens, and summed log-likelihoods under the
    reference model (the original, unless the caller gave another), and returns each example's loss, (B,). A method that reads another text beside the
    forget text gets all three as (B, 2), in that order. One of single tokens (`token`) is called as
    `loss(log_likelihood (n,), example (n,), counts (b,), reference (n,))`, and reads the two of a pair as neighbouring examples. One of kind "hidden"
    is called as `loss(hidden (n, D), example (n,), counts (b,), direction (D,), norms (b,))`: see `rmu` and `adaptive_rmu`.
    """

    name: str
    loss: Callable[..., Tensor]
    source: str
    options: dict[str, Any]  # with their defaults
    reads: tuple[str, ...] = ("forget",)  # what is scored in a step: "refusal", "winner" or "alternate", "forget"
    needs: tuple[str, ...] = ()  # "reference", "refusals", "winners", "alternates"
    token: bool = False
    rate: float = 1.0  # the default learning rate is multiplied by it
    kind: str = "likelihood"

    @property
    def pairs(self) -> bool:
        """Whether another text and the forget text are read together."""
        return len(self.reads) == 2

    @property
    def passes(self) -> int:
        """Texts that go forward and backward for one example in one step."""
        return len(self.reads)


def _flat(log_likelihood: Tensor, example: Tensor, counts: Tensor, reference: Tensor, **options: Any) -> Tensor:
    probability = token_means(log_likelihood.exp(), example, counts).view(-1, 2)
    return flat(probability[:, 0], probability[:, 1], **options)


def _method(
    name: str, function: Callable[..., Tensor], loss: Callable[..., Tensor], source: str, *, select: tuple[str, ...] = (),
    loop: dict[str, Any] | None = None, **what: Any,
) -> Method:  # fmt: skip
    """Its options are the function's keywords, those that change what it is shown (temperature, likeliest) and those of the loop around it."""
    own = {k: v for k, v in (function.__kwdefaults__ or {}).items() if k != "reduction"}
    own |= (
        dict.fromkeys(select, 1.0) | ({"refusals": None} if "refusals" in what.get("needs", ()) else {}) | (loop or {})
    )
    return Method(name, lambda *given, **o: loss(*given, reduction="none", **o), "arXiv " + source, own, **what)


def _dpo(f: Tensor, n: Tensor, r: Tensor, **options: Any) -> Tensor:
    return dpo(f[:, 0], r[:, 0], f[:, 1], r[:, 1], **options)


_both = ("refusal", "forget")
_layer: dict[str, Any] = {"alpha": 1200.0, "layer": None, "layers": None, "trainable": None}
_select = ("temperature", "likeliest")
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
        _method("wga", wga, lambda x, e, n, r, **o: wga(x, e, n, **o), "2502.19301", select=("temperature",), token=True),
        _method("tnpo", tnpo, tnpo, "2502.19301", needs=("reference",), token=True),
        _method("wtnpo", wtnpo, wtnpo, "2502.19301", needs=("reference",), token=True),
        _method(
            "satimp", satimp, lambda x, e, n, r, **o: satimp(x, e, n, **o), "2505.11953", select=("temperature",), token=True
        ),
        _method("flat", flat, _flat, "2410.11143", reads=_both, needs=("refusals",), token=True),
        _method("rmu", rmu, lambda h, e, n, u, r, **o: rmu(h, e, n, u, **o), "2403.03218", kind="hidden", loop=_layer),
        _method("adaptive_rmu", adaptive_rmu, adaptive_rmu, "2408.06223", kind="hidden", loop=_layer),
    )
}  # fmt: skip
"""The forget terms."""

OF_THE_LOOP = (
    "temperature", "likeliest", "refusals", "winners", "alternates", "alpha", "layer", "layers", "trainable",
)  # fmt: skip
"""Options that a method's own function never sees."""

ALIASES = {"graddiff": ("ga", "nll")} | {f"{name}+nll": (name, "nll") for name in METHODS}
"""The field's compound names: (forget term, retain loss)."""


def resolve(name: str, retain_loss: str | None, has_retain: bool, options: dict[str, Any]) -> tuple[Method, str | None]:
    """The method and the retain loss behind a name; retain_loss "auto" is the method's own, or else nll, where there is a retain set.

    "nll" trains on the retain set; "hold" only undoes what the run has cost it: mean over examples of max(0, NLL - NLL before the run).
    "representation", RMU's own, keeps the hidden states of the retain set in the layer that is steered, with the method's weight alpha.

    Raises ArgumentError for an unknown name (with the nearest), an option the method does not have, a retain loss without a retain set.
    """
    key = name.lower()
    if key not in METHODS and key not in ALIASES:
        raise ArgumentError(f"there is no method {name!r}; {nearest(name, [*METHODS, *ALIASES])}")
    if retain_loss not in ("auto", "nll", "hold", "representation", None):
        raise ArgumentError(f'retain_loss must be "auto", "nll", "hold", "representation" or None, got {retain_loss!r}')
    forced = None
    if key in ALIASES:
        key, forced = ALIASES[key]
    method = METHODS[key]
    if retain_loss == "representation" and method.kind != "hidden":
        of = ", ".join(m.name for m in METHODS.values() if m.kind == "hidden")
        raise ArgumentError(
            f'retain_loss="representation" is the own term of {of}, and {key!r} has none: take "nll" or "hold"'
        )
    if forced or retain_loss in ("nll", "hold", "representation"):
        retain_loss = "nll" if forced and retain_loss != "hold" else retain_loss
        if not has_retain:
            raise ArgumentError(
                f"method {name!r} with retain_loss={retain_loss!r} needs text to keep: pass retain=, or {key!r} with no retain loss"
            )
    elif retain_loss == "auto":
        retain_loss = ("representation" if method.kind == "hidden" else "nll") if has_retain else None
    unknown = sorted(set(options) - set(method.options))
    if unknown:
        has = f"has {', '.join(method.options)}" if method.options else "has none"
        raise ArgumentError(f"method {key!r} has no option {unknown[0]!r}; it {has}")
    return method, retain_loss
