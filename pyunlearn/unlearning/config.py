"""The settings of a run: defaults, ranges and help, from which keywords, command line, files and docs are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pyunlearn.errors import ArgumentError
from pyunlearn.options import Choice, ChoiceOrObject, Config, Flag, Number, Table, Text, Whole, option

MEAN_OF_NON_MEMBERS = 1 / math.log(2)  # bits: the mean exposure of text that was not trained on, metrics.NULL_MEAN
MEMORIZED = math.log2(20)  # bits: an example counts as memorized from here on, metrics.SIGNIFICANT

ORDERS = ("random", "easy_first", "hard_first")
RETAIN_LOSSES = ("auto", "nll", "kl", "hold", "representation")


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Config):
    """The settings that a run has whatever its method: `UnlearnConfig` and `CompareConfig` add theirs."""

    retain_loss: str | None = option(
        "auto",
        Choice(RETAIN_LOSSES),
        "What keeps the retain set: nll trains on it; kl keeps the reference model's distribution at each of its tokens; "
        "hold only undoes what the run has cost it; representation (rmu, adaptive_rmu) keeps its hidden states; none; "
        "auto: the method's own term, or else nll, where there is a retain set.",
        group="Method",
        optional=True,
        fixed=True,
    )
    retain_weight: float = option(1.0, Number(0), "Factor on the retain loss.", group="Method", fixed=True)
    learning_rate: float | None = option(
        None,
        Number(above=0, below=1),
        "Learning rate of AdamW. Default: 5e-6, for adapters (PEFT) 1e-4, and ten times that for idk, rmu and "
        "adaptive_rmu.",
        fixed=True,
    )
    batch_size: int = option(8, Whole(1), "Examples in one optimizer step.", fixed=True)
    micro_batch_size: int | None = option(
        None,
        Whole(1),
        "Examples that go through the model together; gradients are accumulated over the batch, so the steps are the "
        "same up to rounding, in less memory. Default: the whole batch.",
    )
    order: str = option(
        "random", Choice(ORDERS), "Order of the examples in a round: random, or by their difficulty.", fixed=True
    )
    difficulty: Any = option(
        "nll",
        ChoiceOrObject(("nll", "ksd"), "a list of one number for each forget example"),
        "What that order goes by: nll, the mean negative log-likelihood under the reference model (give one that never "
        "saw the texts); ksd, how much the retain set supports an example; in Python also one number for each forget "
        "example, high = hard.",
    )
    token_weights: Any = option(
        None,
        ChoiceOrObject(("importance", "reference"), "a list of numbers for each forget example"),
        "Factors on the log-likelihoods of a forget text's tokens: importance, how much the rest of the text depends on "
        "a token (as many forward passes as tokens); reference, how much likelier it is than under the reference model; "
        "both have mean 1 in each text. In Python also a list of numbers for each forget example. Default: all 1.",
        group="Method",
    )
    token_share: float = option(
        1.0,
        Number(above=0, maximum=1),
        "Share of each text's tokens that are unlearned, those of the largest weight; the others get weight 0.",
        group="Method",
        fixed=True,
    )
    max_steps: int = option(200, Whole(0), "Optimizer steps at most.")
    target_exposure: float = option(
        MEAN_OF_NON_MEMBERS,
        Number(0, below=round(MEMORIZED, 2)),
        "Stop unlearning an example at or below this exposure, in bits; the default is the mean exposure of text that "
        "was not trained on.",
        fixed=True,
    )
    utility_budget: float = option(
        0.05,
        Number(0),
        "Allowed relative rise of the negative log-likelihood of the utility set: 0.05 is 5 % (of at least 1 nat).",
        fixed=True,
    )
    max_grad_norm: float = option(1.0, Number(0), "Gradients are clipped to this norm.", fixed=True)
    mask: Any = option(
        None,
        ChoiceOrObject(("saliency", "nonzero"), "a dict of boolean tensors"),
        "Weights that may change; all others keep their bits: saliency (the half on which the forget loss depends "
        "most) or nonzero (pruned weights stay 0). In Python also a dict of parameter names to boolean tensors. "
        "Default: all.",
        fixed=True,
    )
    l1: float = option(
        0.0,
        Number(0),
        "Strength of an l1 penalty on the trained weights, falling linearly to 0 at max_steps (arXiv 2304.04934): for "
        "adapters and small models.",
        fixed=True,
    )
    truncate: bool = option(
        False, Flag(), "Cut texts that are longer than the model's context, instead of refusing them.", group="Data"
    )
    workspace: int | None = option(
        None,
        Whole(0),
        "Bytes for cached logits: more memory for less time, with the same result. Default: chosen from what is free.",
        group="Model",
    )
    seed: int = option(0, Whole(0), "Seed of sampling and order: the same seed gives the same run.", fixed=True)

    def check(self) -> None:
        """Raise ArgumentError where token_share has nothing to choose by."""
        if self.token_share < 1 and self.token_weights is None:
            raise ArgumentError(
                'token_share keeps the tokens of the largest weight: pass token_weights="importance", for example'
            )


@dataclass(frozen=True, kw_only=True)
class UnlearnConfig(LoopConfig):
    """The settings of `pyunlearn.unlearn`.

    >>> UnlearnConfig(method="npo", max_steps=50).batch_size
    8
    """

    method: str = option(
        "ga",
        Text('the name of a method, such as "ga"'),
        "The unlearning method; `pyunlearn methods` lists them. With a retain set also graddiff, npo+nll, simnpo+kl, ...",
        group="Method",
        fixed=True,
    )
    method_options: Any = option(
        {},
        Table(),
        "The method's own options, such as beta=0.1.",
        group="Method",
        optional=True,
        fixed=True,
        flag="--set",
    )
