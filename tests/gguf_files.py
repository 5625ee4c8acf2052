"""GGUF files of tiny models, written with names, orders of rows and metadata as llama.cpp's converter writes them."""

import json

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

KINDS = dict(gguf.GGMLQuantizationType.__members__)
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def model_of(kind, *, seed=0, tied=False, **settings):
    """A model of two layers with random weights, with two queries for each key."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CONFIGS[kind](
        **sizes
        | {"vocab_size": 400, "num_key_value_heads": 2, "max_position_embeddings": 96, "head_dim": 16}
        | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": tied}
        | settings
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.05 + (p.ndim == 1))  # biases and norms differ from each other too
    return model


def changed(model, by=0.1, seed=1):
    """The model after a run: each weight moves a little, in place."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * p.float().std(correction=0) * torch.randn(p.shape).to(p))
    return model


def name_of(name):
    """The name of a weight in a GGUF file."""
    stem, _, suffix = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{suffix}"
    _, _, number, part = stem.split(".", 3)
    return f"blk.{number}.{LAYER[part]}.{suffix}"


def rotated(weight, heads):
    """Rows of each head in pairs, as llama.cpp rotates them, in a plain loop."""
    size = len(weight) // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


def tensors_of(model):
    """Name in a GGUF file -> float32 values in its order."""
    config, out = model.config, {}
    for name, p in model.named_parameters():  # a tied head once
        new, weight = name_of(name), p.detach().float().numpy()
        if config.model_type in ("llama", "mistral"):
            heads = {"attn_q.": config.num_attention_heads, "attn_k.": config.num_key_value_heads}
            weight = next((rotated(weight, n) for part, n in heads.items() if part in new), weight)
        out[new] = weight
    return out


def write(path, model, tokenizer, form="F32", *, extra=None, drop=(), **metadata):
    """Write a model's GGUF file, matrices in a format; `metadata`: further keys, with _ for a dot, or None."""
    config = model.config
    kind = "llama" if config.model_type == "mistral" else config.model_type
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name("Tiny")
    writer.add_quantized_by("somebody")
    writer.add_key_value("general.uuid", "1-2-3", gguf.GGUFValueType.STRING)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if form == "F32" else gguf.LlamaFileType[f"MOSTLY_{form}"])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(metadata.get("theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = [token.encode() for token in tokenizer.convert_ids_to_tokens(list(range(config.vocab_size)))]
    writer.add_token_list(metadata.get("tokens", tokens))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_types([3 if i < 5 else 1 for i in range(config.vocab_size)])  # 3: a control token
    for name, number in (("bos", 0), ("eos", 1), ("padding", 2)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    writer.add_key_value("tiny.bytes", [1, 255], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8)
    if "raw" in metadata:
        writer.add_key_value("tiny.raw", metadata["raw"], gguf.GGUFValueType.STRING)
    for key, value in metadata.get("strings", {}).items():
        writer.add_string(key, value)
    for key, value in metadata.get("numbers", {}).items():
        writer.add_uint16(key, value)
    if alignment := metadata.get("alignment"):
        writer.add_custom_alignment(alignment)
    values = {name: value for name, value in tensors_of(model).items() if name not in drop} | (extra or {})
    for name, value in values.items():
        own = form if value.ndim > 1 else "F32"
        data = q6_k(value) if own == "Q6_K" else gguf.quants.quantize(value.astype(np.float32), KINDS[own])
        writer.add_tensor(name, data, raw_dtype=KINDS[own])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def q6_k(values):
    """(n, columns) in Q6_K, with one scale for 256 weights: numbers of 6 bits, the lower 4 and the upper 2 apart."""
    blocks = values.reshape(-1, 256).astype(np.float32)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 31).astype(np.float16)
    q = np.clip(np.rint(blocks / scale.astype(np.float32)) + 32, 0, 63).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = (q[:, :, :2] & 15) | ((q[:, :, 2:] & 15) << 4)
    high = sum((q[:, :, i] >> 4) << (2 * i) for i in range(4))
    ones = np.ones((len(blocks), 16), np.uint8)
    parts = [low.reshape(len(blocks), 128), high.reshape(len(blocks), 64), ones, scale.view(np.uint8)]
    return np.concatenate(parts, axis=1).reshape(len(values), -1)


def fields_of(path):
    """Key -> (types, value) of a file's metadata."""
    reader = gguf.GGUFReader(path)
    return {
        key: (field.types, b"".join(part.tobytes() for part in field.parts[3:]))
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }
