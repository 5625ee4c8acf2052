"""Small random models of many architectures, a batch for each, and log-likelihoods from their own logits."""

import torch
import transformers as tf

from pyunlearn.data import Tokens, collate

V = 96
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
KV = SMALL | {"num_key_value_heads": 2}
CAUSAL = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**KV)),
    "llama, tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**KV, tie_word_embeddings=True)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**KV)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**KV, head_dim=8)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**KV)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**KV)),
    "phi, head with bias": lambda: tf.PhiForCausalLM(tf.PhiConfig(**SMALL)),
    "gemma2, softcap": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**KV, head_dim=8, final_logit_softcapping=2.0)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "gpt-neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL)),
    "opt, projected": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=V, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=24
        )
    ),
    "granite, scale": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**KV, logits_scaling=4.0)),
    "cohere, scale": lambda: tf.CohereForCausalLM(tf.CohereConfig(**KV, logit_scale=0.25)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**KV, num_local_experts=4)),
    "olmoe": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**KV, num_experts=4, num_experts_per_tok=2)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**KV, head_dim=8, final_logit_softcapping=3.0)),
    "falcon": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4)),
}
T5 = {
    "vocab_size": V,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BOTH = {
    "t5, tied": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
    "t5, its own head": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
}


def made(make):
    """Return a small random model in evaluation mode, with a head that is not nearly zero."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 if p.dim() > 1 else p + 0.1 * torch.randn_like(p))
    return model.eval()


def batch_for(name):
    """Return a batch of three texts of different lengths, the first two with a prompt."""
    g = torch.Generator().manual_seed(1)
    ids = [tuple(torch.randint(1, V, (n,), generator=g).tolist()) for n in (5, 9, 7)]
    if name in BOTH:
        return collate([Tokens(i, 0, i[::-1]) for i in ids], pad_id=0, decoder_start_id=0)
    return collate([Tokens(i, first) for i, first in zip(ids, (2, 4, 1), strict=True)], pad_id=0)


def own_log_likelihoods(model, batch):
    """Return log_softmax of the model's own logits at the scored rows."""
    inputs = {"input_ids": batch.ids, "attention_mask": batch.attention_mask}
    if batch.decoder_ids is not None:
        inputs["decoder_input_ids"] = batch.decoder_ids
    logits = model(**inputs).logits.flatten(0, 1)[batch.rows]
    return torch.log_softmax(logits.float(), -1).gather(1, batch.targets[:, None]).squeeze(1)
