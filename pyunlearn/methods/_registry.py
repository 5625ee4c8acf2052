"""The methods by name: what each needs, so that the loop can call any of them the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from pyunlearn.errors import ArgumentError, nearest
from pyunlearn.methods.gradient_ascent import ga
from pyunlearn.methods.npo import npo
from pyunlearn.methods.simnpo import simnpo


class Method(NamedTuple):
    """A forget term as the loop sees it.

    `loss(forget, lengths, reference)` takes (B,) summed log-likelihoods under the model, scored tokens, and summed log-likelihoods under
    the reference model (the original, unless the caller gave another), and returns each example's loss, (B,).
    """

    name: str
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    source: str
    options: tuple[str, ...] = ()


METHODS = {
    "ga": Method("ga", lambda forget, lengths, reference, **_: ga(forget, lengths), "arXiv 2210.01504"),
    "npo": Method(
        "npo", lambda forget, lengths, reference, **o: npo(forget, reference, **o), "arXiv 2404.05868", ("beta",)
    ),
    "simnpo": Method(
        "simnpo",
        lambda forget, lengths, reference, **o: simnpo(forget, lengths, **o),
        "arXiv 2410.07163",
        ("beta", "delta"),
    ),
}
"""The forget terms."""

ALIASES = {"graddiff": ("ga", "nll"), "npo+nll": ("npo", "nll"), "simnpo+nll": ("simnpo", "nll")}
"""The field's compound names: (forget term, retain loss)."""


def resolve(name: str, retain_loss: str | None, has_retain: bool, options: dict[str, Any]) -> tuple[Method, str | None]:
    """The method and the retain loss behind a name; retain_loss "auto" is nll where there is a retain set.

    "nll" trains on the retain set; "hold" only undoes what the run has cost it: mean over examples of max(0, NLL - NLL before the run).

    Raises ArgumentError for an unknown name (with the nearest), an option the method does not have, a retain loss without a retain set.
    """
    key = name.lower()
    if key not in METHODS and key not in ALIASES:
        raise ArgumentError(f"there is no method {name!r}; {nearest(name, [*METHODS, *ALIASES])}")
    if retain_loss not in ("auto", "nll", "hold", None):
        raise ArgumentError(f'retain_loss must be "auto", "nll", "hold" or None, got {retain_loss!r}')
    forced = None
    if key in ALIASES:
        key, forced = ALIASES[key]
    method = METHODS[key]
    if forced or retain_loss in ("nll", "hold"):
        retain_loss = "hold" if retain_loss == "hold" else "nll"
        if not has_retain:
            raise ArgumentError(
                f"method {name!r} with retain_loss={retain_loss!r} needs text to keep: pass retain=, or {key!r} with no retain loss"
            )
    elif retain_loss == "auto":
        retain_loss = "nll" if has_retain else None
    unknown = sorted(set(options) - set(method.options))
    if unknown:
        has = f"has {', '.join(method.options)}" if method.options else "has none"
        raise ArgumentError(f"method {key!r} has no option {unknown[0]!r}; it {has}")
    return method, retain_loss
