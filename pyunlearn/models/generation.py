"""Text generation with explicit settings: the model's own generation_config is ignored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.sharding import is_sharded

ScoreHook = Callable[[Tensor, Tensor], Tensor]  # (input ids (B, T), scores (B, V)) -> scores


@torch.no_grad()
def generate(
    lm: LanguageModel,
    inputs: dict[str, Tensor],
    *,
    prompt_length: int,
    max_new_tokens: int,
    score_hook: ScoreHook | None = None,
    **options: Any,
) -> list[list[int]]:
    """Generate one continuation for each row of a batch of prompts.

    Args:
        lm: the model, in evaluation mode, with its tokenizer.
        inputs: keyword arguments of transformers' `generate`: input_ids, attention_mask, ...
        prompt_length: columns of the output that are prompt.
        max_new_tokens: largest number of tokens generated.
        score_hook: function (input ids (B, T), scores (B, V)) -> scores, called at each step.
        options: further fields of GenerationConfig: do_sample, temperature, ...

    Returns:
        B lists of token ids, each cut after the end-of-text token.
    """
    from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

    class Hook(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores if score_hook is None else score_hook(input_ids, scores)

    inner, eos = lm.inner, lm.tokenizer.eos_token_id
    config = GenerationConfig(
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=lm.pad_id,
        bos_token_id=lm.tokenizer.bos_token_id,
        decoder_start_token_id=lm.decoder_start_id,
        **options,
    )
    together = {"synced_gpus": True} if is_sharded(inner) else {}  # all processes gather each layer
    hooks = LogitsProcessorList([] if score_hook is None else [Hook()])
    # transformers fills unset fields, a repetition penalty for example, from the model's own config
    own, inner.generation_config = inner.generation_config, config
    try:
        ids = inner.generate(**inputs, generation_config=config, logits_processor=hooks, **together)
    finally:
        inner.generation_config = own
    rows = ids[:, prompt_length:].tolist()
    return [row[: row.index(eos) + 1] if eos is not None and eos in row else row for row in rows]
