"""The models of a study, from scratch or from a checkpoint, and their optimizer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from pyunlearn import models
from pyunlearn.models.from_scratch import untrained_llama, untrained_t5
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.study.config import SIZES, StudyConfig


def new_model(config: StudyConfig, tokenizer: Any, device: str, noise: int) -> LanguageModel:
    """Build the untrained network with weights drawn from `noise`, or load the checkpoint that is fine-tuned."""
    torch.manual_seed(noise)
    if config.checkpoint is not None:
        return load_checkpoint(config.checkpoint, tokenizer, device)
    width, feed_forward, layers, heads = SIZES[config.size]
    size: dict[str, Any] = {"width": width, "feed_forward": feed_forward, "heads": heads, "dropout": config.dropout}
    if config.setup == "translation":
        model = untrained_t5(len(tokenizer), layers=layers, **size)
    else:
        model = untrained_llama(len(tokenizer), layers=2 * layers, context=2 * config.max_tokens, **size)
    return LanguageModel.of(model.to(device), tokenizer)


def load_checkpoint(name: str, tokenizer: Any, device: str) -> LanguageModel:
    """Load a model from anywhere, in float32."""
    model = models.load(name, tokenizer=tokenizer, dtype=torch.float32)[0]
    return LanguageModel.of(model.to(device), tokenizer)


def load_model(path: Path, tokenizer: Any, device: str) -> LanguageModel:
    """Load a model of the study, without dropout."""
    return LanguageModel.of(models.load_weights(path).to(device).eval(), tokenizer)


def optimizer_of(lm: LanguageModel, config: StudyConfig) -> torch.optim.Optimizer:
    """Make AdamW (0.9, 0.98) with a learning rate of 0, for `train` to set: `scale` times its own in each group.

    The embedding of T5 is drawn at scale 1; its rate is larger by sqrt(width), as if it were drawn at 1/sqrt(width)
    and multiplied. On a GPU the optimizer can be captured in a CUDA graph, which reads the rates there.
    """
    embedding = lm.module.get_input_embeddings().weight
    scale = math.sqrt(embedding.shape[1]) if config.setup == "translation" else 1.0
    rest = [p for p in lm.module.parameters() if p is not embedding]
    groups: list[dict[str, Any]] = [{"params": [embedding], "scale": scale}, {"params": rest, "scale": 1.0}]
    on_gpu: dict[str, Any] = {}
    if lm.device.type == "cuda":
        on_gpu = {"fused": True, "capturable": True}
        groups = [group | {"lr": torch.zeros((), device=lm.device)} for group in groups]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=config.weight_decay, **on_gpu)
