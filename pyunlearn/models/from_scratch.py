"""Tokenizers trained from scratch and untrained models of any size, for experiments that train their own model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """Train byte-pair encoding on texts that are split at spaces and punctuation.

    The special tokens are <pad>, </s> and <unk>; </s> ends every text.
    """
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


def untrained_t5(
    vocabulary: int, *, width: int, feed_forward: int, layers: int, heads: int, dropout: float = 0.0
) -> Any:
    """Build a T5 with tied embeddings and gated MLPs; encoder and decoder have `layers` layers each."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=width // heads,
        d_ff=feed_forward,
        num_layers=layers,
        num_heads=heads,
        dropout_rate=dropout,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    return T5ForConditionalGeneration(config)


def untrained_llama(
    vocabulary: int, *, width: int, feed_forward: int, layers: int, heads: int, context: int, dropout: float = 0.0
) -> Any:
    """Build a Llama with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        attention_dropout=dropout,
        max_position_embeddings=context,
        bos_token_id=1,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)
