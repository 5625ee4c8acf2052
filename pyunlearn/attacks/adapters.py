"""Adapter removal: does a text come back when the adapter that was trained to forget it is left away?"""

from __future__ import annotations

from collections.abc import Iterator

from pyunlearn.attacks.target import Target, Trial, Unsuited


def adapter(target: Target) -> Iterator[Trial]:
    """Score the texts without the model's adapter: whoever has the adapter's folder has the weights below it as well.

    Source: ours.
    """
    module = target.lm.module
    if not hasattr(module, "disable_adapter"):
        raise Unsuited("the model has no adapter")
    with module.disable_adapter():
        yield target.trial("without the adapter", quick=target.config.is_quick("adapter"))
