"""The plain recipe: unlearning losses in a transformers.Trainer, with full logits and a reference forward in each step.

Gradient ascent (arXiv 2210.01504), gradient difference (2203.12817) and NPO (2404.05868), with the mean negative
log-likelihood of retain tokens or the mean divergence of the reference model at them, as these papers and the training
code that is published with the benchmarks have it: one forward pass for each batch, all logits, one backward pass.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.step_cases import BETA, LEARNING_RATE, MAX_GRAD_NORM, SEED, Method
from benchmarks.step_phases import Gate, Phases
from pyunlearn.data import Tokens

IGNORED = -100
Inputs = dict[str, Tensor]


class Pairs(torch.utils.data.Dataset):
    """A forget and a retain text for each item, in the order of the steps, again from the start without end."""

    def __init__(self, forget: Sequence[Tokens], retain: Sequence[Tokens]) -> None:
        self.forget, self.retain = forget, retain

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, i: int) -> tuple[Tokens, Tokens]:
        return self.forget[i % len(self.forget)], self.retain[i % len(self.retain)]


def collated(pairs: list[tuple[Tokens, Tokens]]) -> dict[str, Inputs]:
    """Return the padded batch of each role, with labels that are IGNORED where a token is not scored."""
    roles = zip(("forget", "retain"), zip(*pairs, strict=True), strict=True)
    return {role: _padded(texts) for role, texts in roles}


def _padded(texts: Sequence[Tokens]) -> Inputs:
    longest = max(len(t.ids) for t in texts)
    rows = [(t.ids, (IGNORED,) * t.first + t.ids[t.first :], (1,) * len(t.ids)) for t in texts]
    fills = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
    return {
        name: torch.tensor([[*row[i], *[fill] * (longest - len(row[i]))] for row in rows])
        for i, (name, fill) in enumerate(fills.items())
    }


class PlainTrainer(Trainer):
    """Trainer with an unlearning loss.

    Args:
        method: the recipe.
        phases: follows the step.
        options: of transformers.Trainer.
    """

    def __init__(self, method: Method, phases: Phases, **options: Any) -> None:
        self.method, self.phases = method, phases
        super().__init__(**options)
        self.reference: Any = None
        if (method.forget == "npo" or method.retain == "kl") and not method.lora:
            self.reference = copy.deepcopy(options["model"]).eval().requires_grad_(False)
            self.reference.to(self.args.device)
            phases.watch_model(self.reference, self.reference.get_output_embeddings())
        self.loss = self.gradient_norm = 0.0

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """Return the loss of a step: the forget term and the retain term."""
        loss = self.phases.term(self._forget(model, inputs["forget"]))
        if self.method.retain is not None:
            loss = loss + self.phases.term(self._retain(model, inputs["retain"]))
        self.loss = loss.item()
        return loss

    def _forget(self, model: Any, batch: Inputs) -> Tensor:
        if self.method.forget == "ga":
            return -model(**batch).loss
        nll = _summed_nll(model(**batch).logits, batch["labels"])
        reference_nll = _summed_nll(self._reference_logits(model, batch), batch["labels"])
        return -(2 / BETA) * F.logsigmoid(BETA * (nll - reference_nll)).mean()

    def _retain(self, model: Any, batch: Inputs) -> Tensor:
        if self.method.retain == "nll":
            return model(**batch).loss
        own = F.log_softmax(model(**batch).logits.float(), dim=-1)  # (B, T, V)
        reference = F.log_softmax(self._reference_logits(model, batch).float(), dim=-1)
        divergence = F.kl_div(own, reference, reduction="none", log_target=True).sum(-1)[:, :-1]  # (B, T - 1)
        return divergence[batch["labels"][:, 1:] != IGNORED].mean()

    @torch.no_grad()
    def _reference_logits(self, model: Any, batch: Inputs) -> Tensor:
        """Return (B, T, V) logits of the model before the run: a copy, or the model without its adapter."""
        with self.accelerator.unwrap_model(model).disable_adapter() if self.method.lora else contextlib.nullcontext():
            return (self.reference or model)(**batch).logits


def _summed_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (B,) negative log-likelihoods of the labels, summed over the tokens of each text."""
    losses = F.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], ignore_index=IGNORED, reduction="none"
    )
    return losses.sum(dim=1)


def plain_trainer(
    model: Any,
    method: Method,
    texts: dict[str, list[Tokens]],
    phases: Phases,
    *,
    out: str,
    batch_size: int,
    device: str,
    autocast: bool,
    steps: int = 10**6,
    callbacks: Sequence[TrainerCallback] = (),
) -> PlainTrainer:
    """Return the trainer of a recipe, with AdamW at a constant rate, without momentum, as pyunlearn has it.

    Args:
        model: is trained in place; with method.lora an adapter on every linear layer but the head.
        method: the recipe.
        texts: "forget" and "retain" texts in the order in which the steps take them.
        phases: follows the steps.
        out: folder that the trainer may write to.
        batch_size: forget texts, and retain texts, in a step.
        device: cpu or cuda.
        autocast: compute in bfloat16.
        steps: to take.
        callbacks: of the trainer.
    """
    if method.lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=method.lora, lora_alpha=2 * method.lora, lora_dropout=0.0, target_modules="all-linear")
        torch.manual_seed(SEED)
        model = get_peft_model(model, config)
    arguments = TrainingArguments(
        output_dir=out,
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        learning_rate=LEARNING_RATE["lora" if method.lora else "full"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta1=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        bf16=autocast,
        use_cpu=device == "cpu",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
    )
    trainer = PlainTrainer(
        method,
        phases,
        model=model,
        args=arguments,
        train_dataset=Pairs(texts["forget"], texts["retain"]),
        data_collator=collated,
        callbacks=[*callbacks],
    )
    trainer.model_accepts_loss_kwargs = False  # the loss is that of one batch
    clip = trainer.accelerator.clip_grad_norm_

    def clipped(*inputs: Any, **options: Any) -> Tensor:
        norm = clip(*inputs, **options)
        trainer.gradient_norm = float(norm)
        return norm

    trainer.accelerator.clip_grad_norm_ = clipped
    return trainer


class Stepwise(TrainerCallback):
    """Takes a step of the trainer when the gate opens."""

    trainer: PlainTrainer
    gate: Gate

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> Any:
        """Wait for the first step."""
        self.trainer.phases.watch_update(self.trainer.accelerator, optimizer.optimizer)
        return self._wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Report the step and wait for the next."""
        self.gate.report(loss=self.trainer.loss, gradient_norm=self.trainer.gradient_norm)
        return self._wait(control)

    def _wait(self, control: Any) -> Any:
        if not self.gate.opens():
            control.should_training_stop = True
        return control
