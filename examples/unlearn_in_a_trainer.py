"""Unlearn in your own transformers.Trainer, or in TRL's SFTTrainer: each record stops when it is forgotten.

python examples/unlearn_in_a_trainer.py ./my-model forget.jsonl retain.jsonl unseen.jsonl ./my-model-unlearned

Trainer takes a loss of the model's logits (compute_loss_func), SFTTrainer a method in its place, both callbacks;
nothing else of them is changed. pyunlearn.unlearn does more: it finds its step size, rolls back steps that cost too
much, and needs no logits.
"""

import sys
from collections import Counter
from itertools import cycle, islice

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import pyunlearn
from pyunlearn.data import read_examples
from pyunlearn.methods import simnpo
from pyunlearn.metrics import verdict
from pyunlearn.ops import log_likelihood

IGNORED = -100


class ForgetRecords(TrainerCallback):
    """The loss of a batch, and the stop of each record: when it is no more likely than the non-members were.

    The first label of a row is the number of its forget record, or IGNORED for a row to retain: no token is predicted
    there, so that no label is lost.
    """

    def __init__(self, model, forget: list[str], non_members: list[str], tokenizer) -> None:
        self.rows = [row(tokenizer, text, number) for number, text in enumerate(forget)]
        self.collate = Collator(tokenizer.pad_token_id or 0)
        self.non_members = self.scores(model, [row(tokenizer, text) for text in non_members])
        self.before = self.scores(model, self.rows)
        self.active = self.still_exposed(self.before)

    def loss(self, outputs, labels: Tensor, num_items_in_batch=None) -> Tensor:
        """Return the mean over the rows of SimNPO on active records, of the NLL on rows to retain, of 0 on the others.

        Rows are averaged within a batch, so use gradient_accumulation_steps=1.
        """
        record, targets = labels[:, 0], labels[:, 1:]
        sums = log_likelihood(outputs.logits[:, :-1].contiguous(), targets.contiguous()).sum(dim=1)
        counts = (targets != IGNORED).sum(dim=1)
        forget = (record != IGNORED) & self.active.to(record.device)[record.clamp(min=0)]
        losses = torch.where(
            forget,
            simnpo(sums, counts, reduction="none"),
            torch.where(record == IGNORED, -sums / counts, 0.0 * sums),
        )
        return losses.mean()

    def on_step_end(self, args, state, control, model=None, **_):
        """Score the records; end the training when none is exposed."""
        self.active = self.still_exposed(self.scores(model, self.rows))
        control.should_training_stop = not self.active.any()
        return control

    def still_exposed(self, scores: Tensor) -> Tensor:
        """Return (n,) True for the records that are still more likely than non-members."""
        return torch.tensor([v == "still exposed" for v in verdict(self.before, scores, self.non_members).verdict])

    @torch.no_grad()
    def scores(self, model, rows: list[dict]) -> Tensor:
        """Return (n,) mean NLL a token, without dropout."""
        was_training, values = model.training, []
        model.eval()
        for each in rows:
            batch = {name: value.to(model.device) for name, value in self.collate([each]).items()}
            targets = batch.pop("labels")[:, 1:]
            tokens = log_likelihood(model(**batch).logits[:, :-1].contiguous(), targets.contiguous())
            values.append(-tokens.sum() / (targets != IGNORED).sum())
        model.train(was_training)
        return torch.stack(values).double().cpu()


class Collator:
    """Pads rows to a batch."""

    def __init__(self, padding: int) -> None:
        self.padding = {"input_ids": padding, "labels": IGNORED, "attention_mask": 0}

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        """Return (B, T) input_ids, labels and attention_mask."""
        rows = [each | {"attention_mask": [1] * len(each["input_ids"])} for each in rows]
        length = max(len(each["input_ids"]) for each in rows)
        return {
            name: torch.tensor([each[name] + [value] * (length - len(each[name])) for each in rows])
            for name, value in self.padding.items()
        }


def row(tokenizer, text: str, record: int = IGNORED) -> dict:
    """Return the row of a text; its first label is the number of the record."""
    ids = tokenizer(text)["input_ids"]
    return {"input_ids": ids, "labels": [record, *ids[1:]]}


def texts(path: str, role: str) -> list[str]:
    """Return the texts of a file; `role` names it in a message."""
    return [each.prompt + each.completion for each in read_examples(path, role=role)]


def trainer_of(model, records: ForgetRecords, kept: list[dict], out: str, *, trl: bool = False, **settings):
    """Return the trainer: as many rows to forget as to retain, at a constant rate."""
    count = max(len(kept), len(records.rows))
    rows = [*islice(cycle(records.rows), count), *islice(cycle(kept), count)]
    settings = {
        "output_dir": f"{out}.trainer",
        "learning_rate": 1e-5,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 5,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "remove_unused_columns": False,
        **settings,
    }
    parts = {"data_collator": records.collate, "callbacks": [records]}
    if not trl:
        return Trainer(
            model, TrainingArguments(**settings), train_dataset=rows, compute_loss_func=records.loss, **parts
        )
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class ForgettingTrainer(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = records.loss(outputs, labels)
            return (loss, outputs) if return_outputs else loss

    config = SFTConfig(**settings, dataset_kwargs={"skip_prepare_dataset": True})
    return ForgettingTrainer(model, config, train_dataset=Dataset.from_list(rows), **parts)


def main(folder: str, forget: str, retain: str, unseen: str, out: str, **options) -> None:
    """Unlearn the texts of `forget`, save the model, and judge it as pyunlearn.unlearn does."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    records = ForgetRecords(model, texts(forget, "forget"), texts(unseen, "holdout"), tokenizer)
    trainer = trainer_of(model, records, [row(tokenizer, text) for text in texts(retain, "retain")], out, **options)
    trainer.train()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    audit = pyunlearn.audit(out, forget, original=folder, holdout=unseen)
    print(f"after {trainer.state.global_step} steps: {dict(Counter(e.verdict for e in audit.examples))}")


if __name__ == "__main__":
    main(*sys.argv[1:6])
