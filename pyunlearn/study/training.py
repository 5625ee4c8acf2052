"""The training recipe: AdamW, warm-up, a constant rate, and a linear descent while the forget sets are in. Resumable, the same bit for bit."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyunlearn.data import Tokens, collate, padding_id
from pyunlearn.models import Likelihood, decoder_start_id, is_encoder_decoder
from pyunlearn.study.folder import Folder
from pyunlearn.study.models import load_model, new_model, optimizer_of
from pyunlearn.study.old_config import Config

CHECKPOINT_SECONDS = 30.0  # of work that an interruption may cost
_GROUPED = 16  # batches whose examples are sorted by length together


def train(
    folder: Folder, name: str, config: Config, tokenizer: Any, learned: Sequence[Tokens], epochs: Sequence[Sequence[int]],
    *, base: str | None, keep_optimizer: bool, device: str, say: Callable[[str], None] = lambda _: None,
) -> None:  # fmt: skip
    """Trains models/NAME on the places of `epochs`, one list an epoch, unless it is there. It goes on from `base`, its optimizer included.

    The learning rate rises over `warmup` steps, stays, and in a model that is finished (not keep_optimizer) falls linearly to nothing over the
    epochs, of a model without base over the second half of them. Gradients are clipped to norm 1; the loss is the mean over the batch's tokens.
    """
    where = f"models/{name}"
    if folder.has(where):
        return
    started = 0
    model = new_model(config, tokenizer, device) if base is None else load_model(folder.path / "models" / base, device)
    optimizer = optimizer_of(model, config)
    if base is not None:
        stored = torch.load(folder.path / "models" / base / "optimizer.pt", map_location=device)
        optimizer.load_state_dict(stored["optimizer"])
        started = stored["steps"]
    seed = zlib.crc32(f"{name}-{config.seed}".encode())
    torch.manual_seed(seed)
    plan = [b for e, rows in enumerate(epochs) for b in _batches(learned, rows, config.batch_size, (seed, e))]
    half = len(plan) // 2 if base is None else 0
    checkpoint, losses, done = folder.path / "models" / f"{name}.checkpoint", [], 0
    if checkpoint.exists():
        stored = torch.load(checkpoint, map_location=device, weights_only=False)
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        losses, done = stored["losses"], stored["done"]
        _set_noise(stored["noise"])
    likelihood, pad = Likelihood(model), padding_id(tokenizer)
    start = decoder_start_id(model) if is_encoder_decoder(model) else None
    model.train()
    saved = time.monotonic()
    while done < len(plan):
        rate = config.learning_rate * min(1.0, (started + done + 1) / max(1, config.warmup))
        if not keep_optimizer:
            rate *= min(1.0, (len(plan) - done) / max(1, len(plan) - half))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        batch = collate([learned[i] for i in plan[done]], pad_id=pad, decoder_start_id=start).to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
            loss = -likelihood(batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        losses.append(loss)
        done += 1
        if done % 20 == 0:
            say(f"{name}: step {done} of {len(plan)}, loss {float(loss):.2f}")
        if time.monotonic() - saved >= CHECKPOINT_SECONDS:
            losses = [float(x) for x in losses]
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "losses": losses,
                "done": done,
                "noise": _noise(),
            }
            folder.write(f"models/{name}.checkpoint", lambda path, state=state: torch.save(state, path))  # type: ignore[misc]
            saved = time.monotonic()
    model.eval()

    def save(path: Path) -> None:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        if keep_optimizer:
            torch.save({"optimizer": optimizer.state_dict(), "steps": started + done}, path / "optimizer.pt")

    per_epoch = np.array_split(np.array([float(x) for x in losses]), len(epochs))
    folder.json(
        f"training/{name}.json",
        {"steps": done, "loss_by_epoch": [float(part.mean()) for part in per_epoch if part.size]},
    )
    folder.write(where, save)
    checkpoint.unlink(missing_ok=True)


def _batches(learned: Sequence[Tokens], rows: Sequence[int], size: int, seed: tuple[int, int]) -> list[list[int]]:
    """The epoch's batches: examples of like length together, so that little is padding, in random order."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.asarray(rows)).tolist()
    found = []
    for at in range(0, len(order), size * _GROUPED):
        group = sorted(order[at : at + size * _GROUPED], key=lambda i: len(learned[i]))
        found += [group[i : i + size] for i in range(0, len(group), size)]
    return [found[i] for i in rng.permutation(len(found))]


def _noise() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_noise(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    for number, each in enumerate(state["cuda"]):
        torch.cuda.set_rng_state(each.cpu(), number)
