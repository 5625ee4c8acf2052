"""The models of a study: a tokenizer trained on the corpus, and a network from scratch or from a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from pyunlearn import models
from pyunlearn.models.from_scratch import untrained_llama, untrained_t5
from pyunlearn.study.old_config import SIZES, Config


def new_model(config: Config, tokenizer: Any, device: str) -> Any:
    """The network before any training. The seed decides its weights, which all models of a study share."""
    torch.manual_seed(config.seed)
    if config.checkpoint is not None:
        return models.load(config.checkpoint, tokenizer=tokenizer, dtype=torch.float32)[0].to(device)
    width, inner, layers, heads = SIZES[config.size]
    size: dict[str, Any] = {"width": width, "feed_forward": inner, "heads": heads, "dropout": config.dropout}
    if config.setup == "translation":
        return untrained_t5(len(tokenizer), layers=layers, **size).to(device)
    context = 2 * config.max_tokens
    return untrained_llama(len(tokenizer), layers=2 * layers, context=context, **size).to(device)


def load_model(path: Path, device: str) -> Any:
    """A model of the study, as it was saved."""
    return models.load_weights(path).to(device).eval()


def optimizer_of(model: Any, config: Config) -> torch.optim.Optimizer:
    """AdamW (0.9, 0.98). The embedding of T5, drawn at scale 1, gets a rate larger by sqrt(width), as if drawn at 1/sqrt(width) and multiplied."""
    shared = model.get_input_embeddings().weight
    scale = math.sqrt(shared.shape[1]) if config.setup == "translation" else 1.0
    rest = [p for p in model.parameters() if p is not shared]
    groups = [{"params": [shared], "scale": scale}, {"params": rest, "scale": 1.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=config.weight_decay)
