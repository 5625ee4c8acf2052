"""The models of a study: a tokenizer trained on the corpus, and a network from scratch or from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from pyunlearn import models
from pyunlearn.study.config import SIZES, Config


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """Byte-pair encoding of the corpus, split at spaces and punctuation, with <pad>, </s> and <unk>; </s> ends every text."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def new_model(config: Config, tokenizer: Any, device: str) -> Any:
    """The network before any training. The seed decides its weights, which all models of a study share."""
    torch.manual_seed(config.seed)
    if config.checkpoint is not None:
        return models.load(config.checkpoint, tokenizer=tokenizer, dtype=torch.float32)[0].to(device)
    width, inner, layers, heads = SIZES[config.size]
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    }
    if config.setup == "translation":
        from transformers import T5Config, T5ForConditionalGeneration

        return T5ForConditionalGeneration(T5Config(
            d_model=width, d_kv=width // heads, d_ff=inner, num_layers=layers, num_heads=heads, dropout_rate=config.dropout,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0, **common,
        )).to(device)  # fmt: skip
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=2 * layers, num_attention_heads=heads, bos_token_id=1,
        attention_dropout=config.dropout, max_position_embeddings=2 * config.max_tokens, **common,
    )).to(device)  # fmt: skip


def load_model(path: Path, device: str) -> Any:
    """A model of the study, as it was saved."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(path).is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(path, dtype=torch.float32).to(device).eval()


def optimizer_of(model: Any, config: Config) -> torch.optim.Optimizer:
    """AdamW (0.9, 0.98). The embedding of T5, drawn at scale 1, gets a rate larger by sqrt(width), as if drawn at 1/sqrt(width) and multiplied."""
    shared = model.get_input_embeddings().weight
    scale = math.sqrt(shared.shape[1]) if config.setup == "translation" else 1.0
    rest = [p for p in model.parameters() if p is not shared]
    groups = [{"params": [shared], "scale": scale}, {"params": rest, "scale": 1.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=config.weight_decay)
