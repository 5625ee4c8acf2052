"""Training: AdamW, warm-up, a constant rate, then a linear decay to 0 over the second half.

An interrupted training resumes to the same bits on a CPU. On a GPU it resumes from the same weights, optimizer and
random state, but the last digits can differ: there the order of some sums is not fixed, interrupted or not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyunlearn.data import Tokens
from pyunlearn.errors import OutputError
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.folder import Folder
from pyunlearn.study.models import new_model, optimizer_of
from pyunlearn.study.steps import Step, random_state, set_random_state, set_rate, training_step

CHECKPOINT_SECONDS = 30.0  # of work that an interruption may cost
_SORTED_TOGETHER = 16  # batches whose examples are sorted by length together


def train(
    folder: Folder,
    name: str,
    config: StudyConfig,
    tokenizer: Any,
    learned: Sequence[Tokens],
    epochs: Sequence[Sequence[int]],
    *,
    seed: int,
    device: str,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Train models/NAME, unless it is finished, or resume its training.

    Args:
        folder: of the study.
        name: of the model.
        config: the settings of the study.
        tokenizer: saved with the model.
        learned: the examples, as they are trained on.
        epochs: one list of indices into `learned` for each epoch.
        seed: the number of the model's seed: of its initial weights, dropout and order of the examples.
        device: "cpu" or "cuda".
        say: called with a line about the progress.
    """
    if folder.has(f"models/{name}"):
        return
    noise = int(np.random.default_rng((config.seed, seed)).integers(2**31))
    lm = new_model(config, tokenizer, device, noise)
    optimizer = optimizer_of(lm, config)
    torch.manual_seed(noise + 1)
    plan = [b for e, rows in enumerate(epochs) for b in _batches(learned, rows, config.batch_size, (noise, e))]
    decay_start = len(plan) // 2
    losses, done = _resume(folder, name, lm, optimizer, device)
    lm.module.train()
    take = training_step(lm, optimizer, config.batch_size)
    saved = time.monotonic()
    while done < len(plan):
        rate = config.learning_rate * min(1.0, (done + 1) / max(1, config.warmup))
        rate *= min(1.0, (len(plan) - done) / max(1, len(plan) - decay_start))
        losses.append(_step(take, optimizer, rate, [learned[i] for i in plan[done]]))
        done += 1
        if done % 20 == 0:
            say(f"{name}: step {done} of {len(plan)}, loss {float(losses[-1]):.2f}")
        if time.monotonic() - saved >= CHECKPOINT_SECONDS:
            losses = [float(x) for x in losses]
            _save_checkpoint(folder, name, lm, optimizer, losses, done)
            saved = time.monotonic()
    lm.module.eval()

    def save(path: Path) -> None:
        lm.module.save_pretrained(path)
        tokenizer.save_pretrained(path)

    per_epoch = np.array_split(np.array([float(x) for x in losses]), len(epochs))
    loss_by_epoch = [float(part.mean()) for part in per_epoch if part.size]
    folder.json(f"training/{name}.json", {"steps": done, "loss_by_epoch": loss_by_epoch})
    folder.write(f"models/{name}", save)
    _checkpoint(folder, name).unlink(missing_ok=True)


def _step(take: Step, optimizer: torch.optim.Optimizer, rate: float, tokens: Sequence[Tokens]) -> Tensor:
    """Take one optimizer step; return the loss before it, nats per token."""
    set_rate(optimizer, rate)
    return take(tokens)


def _batches(learned: Sequence[Tokens], rows: Sequence[int], size: int, seed: tuple[int, int]) -> list[list[int]]:
    """Return an epoch's batches in random order, examples of like length together, so that there is little padding."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.asarray(rows)).tolist()
    batches = []
    for start in range(0, len(order), size * _SORTED_TOGETHER):
        group = sorted(order[start : start + size * _SORTED_TOGETHER], key=lambda i: len(learned[i]))
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


# ---------------------------------------------------------------- checkpoints


def _checkpoint(folder: Folder, name: str) -> Path:
    return folder.path / "models" / f"{name}.checkpoint"


def _read(path: Path, device: str) -> dict[str, Any]:
    """Read a file that `torch.save` wrote, tensors and numbers alone: no code in it is run.

    Raises OutputError for any other file.
    """
    try:
        stored: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # damage can be anywhere in it
        raise OutputError(f"{path} is damaged, or is not what a study wrote: delete it to train again") from error
    return stored


def _resume(
    folder: Folder, name: str, lm: LanguageModel, optimizer: torch.optim.Optimizer, device: str
) -> tuple[list[Any], int]:
    """Load the checkpoint, if there is one; return the losses so far and the number of steps."""
    if not _checkpoint(folder, name).exists():
        return [], 0
    stored = _read(_checkpoint(folder, name), device)
    lm.module.load_state_dict(stored["model"])
    for group, own in zip(stored["optimizer"]["param_groups"], optimizer.param_groups, strict=True):
        group |= {name: own[name] for name in ("lr", "fused", "capturable")}  # those of the device at hand
    optimizer.load_state_dict(stored["optimizer"])
    set_random_state(stored["noise"])
    return stored["losses"], stored["done"]


def _save_checkpoint(
    folder: Folder, name: str, lm: LanguageModel, optimizer: torch.optim.Optimizer, losses: list[float], done: int
) -> None:
    state = {
        "model": lm.module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "losses": losses,
        "done": done,
        "noise": random_state(),
    }
    folder.write(f"models/{name}.checkpoint", lambda path: torch.save(state, path))
