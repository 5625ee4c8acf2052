"""Settings of a run: the source of keywords, command-line options, settings files and the reference page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyunlearn.attacks.config import GATE_OPTION
from pyunlearn.data.config import SHOW_TEXT_OPTION, TEMPLATE_OPTION, TRUNCATE_OPTION, TURNS_OPTION
from pyunlearn.errors import ArgumentError
from pyunlearn.models.config import GGUF_AT_LEAST_OPTION, GGUF_LIKE_OPTION, WORKSPACE_OPTION
from pyunlearn.options import Choice, ChoiceOrObject, Config, Flag, Number, Several, Table, Text, Whole, option

MEAN_OF_NON_MEMBERS = 1 / math.log(2)  # bits: the mean exposure of text that was not trained on, metrics.NULL_MEAN
MEMORIZED = math.log2(20)  # bits: an example counts as memorized from here on, metrics.SIGNIFICANT

_LARGEST_BOUND = 100.0  # of the gradients: the least moment that 8 bits hold is 2^-63 times its square
BATCH_REDUCTIONS = ("example", "token")
ORDERS = ("random", "easy_first", "hard_first")
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
SCOPES = ("record", "person")
RETAIN_LOSSES = ("auto", "nll", "kl", "hold", "representation")


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Config):
    """Settings of a run with any method; `UnlearnConfig` and `CompareConfig` add their own."""

    retain_loss: str | None = option(
        "auto",
        Choice(RETAIN_LOSSES),
        "Loss on the retain set: nll trains on it; kl preserves the reference model's distribution at each of its "
        "tokens; hold only reverses a rise of its negative log-likelihood; representation (rmu, adaptive_rmu) "
        "preserves its hidden states; none; auto: where there is a retain set, representation for rmu and "
        "adaptive_rmu, nll for kl and pdu, and hold for all others; "
        "without one, hold on text that the model writes (not for rmu, adaptive_rmu).",
        group="Method",
        optional=True,
        fixed=True,
    )
    retain_weight: float = option(1.0, Number(0), "Factor on the retain loss.", group="Method", fixed=True)
    learning_rate: float | None = option(
        None,
        Number(above=0, below=1),
        "Learning rate of AdamW at the start; it doubles while rounds are cheap, up to 64 times, and is halved where "
        "they are not. Default: 5e-6, for adapters (PEFT) 1e-4, and ten times that for idk, rmu and "
        "adaptive_rmu.",
        fixed=True,
    )
    batch_size: int = option(8, Whole(1), "Examples in one optimizer step.", fixed=True)
    batch_reduction: str = option(
        "example",
        Choice(BATCH_REDUCTIONS),
        "Forget loss of a step: example, the mean over texts of each one's mean over its tokens, so that short texts "
        "are pulled as hard as long ones; token, the mean over all tokens of the step, as published results of ga, "
        "graddiff, wga, satimp and others have it.",
        group="Method",
        fixed=True,
    )
    micro_batch_size: int | None = option(
        None,
        Whole(1),
        "Examples in one forward and backward pass; gradients are accumulated over the batch, so the steps are the "
        "same up to rounding, in less memory. Default: the whole batch.",
    )
    order: str = option(
        "random", Choice(ORDERS), "Order of the examples in a round: random, or by their difficulty.", fixed=True
    )
    difficulty: Any = option(
        "nll",
        ChoiceOrObject(("nll", "ksd"), "a list of one number for each forget example"),
        "Measure of difficulty for the order: nll, the mean negative log-likelihood under the reference model (pass "
        "one that was not trained on the texts); ksd, the kernelized Stein discrepancy from the retain set; in Python "
        "also one number for each forget example, high = hard, which all windows and other forms of it have.",
    )
    token_weights: Any = option(
        None,
        ChoiceOrObject(("importance", "reference"), "a list of numbers for each forget example"),
        "Factors on the log-likelihoods of a forget text's tokens: importance, the effect of a token on the rest of "
        "the text (one forward pass per token); reference, the log-likelihood in excess of the reference model's; both "
        "have mean 1 in each text. In Python also a list of numbers for each forget example. Default: all 1.",
        group="Method",
    )
    token_share: float = option(
        1.0,
        Number(above=0, maximum=1),
        "Share of each text's tokens that are unlearned, those with the largest weights; the others get weight 0.",
        group="Method",
        fixed=True,
    )
    checkpoint_every: float = option(
        5.0,
        Number(above=0),
        "Minutes between two checkpoints, from which an interrupted run resumes.",
        group="Output",
    )
    max_steps: int | None = option(
        None,
        Whole(0),
        "Largest number of optimizer steps. Default: 64 for each batch_size memorized examples, and 200 at least.",
    )
    target_exposure: float = option(
        MEAN_OF_NON_MEMBERS,
        Number(0, below=round(MEMORIZED, 2)),
        "Stop unlearning an example at or below this exposure, in bits; the default is the mean exposure of text that "
        "was not trained on.",
        fixed=True,
    )
    false_discovery_rate: float = option(
        0.05,
        Number(above=0, below=1),
        "Expected share of unseen texts among those called memorized, over the whole forget set (Benjamini-Hochberg).",
        fixed=True,
    )
    utility_budget: float = option(
        0.05,
        Number(0),
        "Allowed relative rise of the negative log-likelihood of the utility set: 0.05 is 5 %, of at least 1 nat, "
        "or, of a set that the model knows by heart, of what the forget texts would have if they were unseen. The "
        "upper end of the rise's 95 % interval must stay within it.",
        fixed=True,
    )
    holdout_budget: float | None = option(
        0.1,
        Number(0),
        "The same for the holdout, unseen text of the forget set's kind, where a retain set is the utility set; none: "
        "no such bound.",
        optional=True,
        fixed=True,
    )
    max_grad_norm: float = option(1.0, Number(0), "Gradients are clipped to this norm.", fixed=True)
    mask: Any = option(
        None,
        ChoiceOrObject(("saliency", "nonzero"), "a dict of boolean tensors"),
        "Weights that may change; all others keep their bits: saliency (the half with the largest gradients of the "
        "forget loss) or nonzero (pruned weights stay 0). In Python also a dict of parameter names to boolean tensors. "
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
    template: str | Path = option(**TEMPLATE_OPTION, fixed=True)
    turns: str | None = option(**TURNS_OPTION, fixed=True)
    truncate: bool = option(**TRUNCATE_OPTION)
    gradient_checkpointing: bool = option(
        False,
        Flag(),
        "Recompute the activations of each layer in the backward pass instead of storing them: one more forward pass, "
        "less memory, the same result. In Python also where the model's own gradient checkpointing is on.",
        group="Model",
    )
    offload_optimizer: bool = option(
        False,
        Flag(),
        "Hold what the optimizer stores for each weight in the main memory, so that a GPU holds weights and gradients "
        "alone: 4 bytes for each trained bfloat16 parameter instead of 10, slower steps, the same result.",
        group="Model",
    )
    moments_in_8bit: bool = option(
        False,
        Flag(),
        "Hold the optimizer's second moments in 8 bits instead of 32: 3 bytes a trained parameter less, so that a GPU "
        "needs 7 for bfloat16 instead of 10, without the slower steps of offload_optimizer.",
        group="Model",
        fixed=True,
    )
    workspace: int | None = option(**WORKSPACE_OPTION)
    seed: int = option(0, Whole(0), "Seed of sampling and order: the same seed gives the same run.", fixed=True)

    def check(self) -> None:
        """Raise ArgumentError for an option without another one that it needs."""
        if self.moments_in_8bit and not 0 < self.max_grad_norm <= _LARGEST_BOUND:
            raise ArgumentError(
                "moments_in_8bit (--moments-in-8bit) needs the bound on the gradients that max_grad_norm is, above 0 "
                f"and at most {_LARGEST_BOUND:g}, got {self.max_grad_norm:g}: give one, or leave moments_in_8bit out"
            )
        if self.token_share < 1 and self.token_weights is None:
            raise ArgumentError(
                'token_share keeps the tokens of the largest weight: pass token_weights="importance", for example'
            )


@dataclass(frozen=True, kw_only=True)
class UnlearnConfig(LoopConfig):
    """Settings of `pyunlearn.unlearn`.

    >>> UnlearnConfig(method="npo", max_steps=50).batch_size
    8
    """

    method: str = option(
        "auto",
        Text('the name of a method, such as "ga"'),
        "The unlearning method; `pyunlearn methods` lists them. auto is match, which gives the tokens of a text the "
        "likelihoods that tokens of unseen text have. With a retain set also graddiff, npo+nll, simnpo+kl and others.",
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
    scope: str = option(
        "record",
        Choice(SCOPES),
        "What is unlearned of each record: record, its text; person, also the same in other words, its paraphrases "
        "where forget records have some, and else rewrites by rule, each with a verdict of its own; the record is "
        "forgotten where all of them are. Needs a holdout, with paraphrases too where the forget set has some.",
        group="Method",
        fixed=True,
    )
    robust: bool = option(
        False,
        Flag(),
        "Unlearn until fine-tuning does not bring the texts back: once they are forgotten, each step first fine-tunes "
        "the model for five steps, on half of them or on retain text, and unlearns what returns of the other half. "
        "Takes four to eleven times as long (tiny models), and the main memory for a copy of the weights. Not for rmu "
        "and adaptive_rmu, nor with sharded weights (FSDP).",
        group="Method",
        fixed=True,
    )
    lora: int | None = option(
        None,
        Whole(1),
        "Train a LoRA adapter of this rank (16, for example) on every linear layer but the head, instead of all "
        "weights. The result is the adapter, unless `merge` is set. Needs the package peft.",
        group="Model",
        fixed=True,
    )
    merge: bool = option(
        False,
        Flag(),
        "Merge the adapter into the weights after the run; the numbers are those of the merged model.",
        group="Model",
    )
    attacks: tuple[str, ...] | None = option(**GATE_OPTION)
    log_with: tuple[str, ...] | None = option(
        None,
        Several(Choice(TRACKERS)),
        "Experiment trackers that get the numbers of each step, through accelerate; each needs its package. "
        "TensorBoard and Aim write to a folder next to the result, its name with .logs. Default: none.",
        group="Output",
    )
    gguf_like: str | Path | None = option(**GGUF_LIKE_OPTION, fixed=True)
    gguf_at_least: str | None = option(**GGUF_AT_LEAST_OPTION, fixed=True)
    show_text: bool = option(**SHOW_TEXT_OPTION)

    def check(self) -> None:
        """Raise ArgumentError for an option of another one that is missing or contradicts it."""
        super().check()
        if self.gguf_at_least is not None and self.gguf_like is None:
            raise ArgumentError(
                "gguf_at_least (--gguf-at-least) is an option of gguf_like (--gguf-like): give that too, or leave it "
                "out"
            )
        if self.gguf_like is not None and self.mask is not None:
            raise ArgumentError(
                "mask leaves the bits of some weights as they are, and gguf_like rounds all of them: leave one out"
            )
