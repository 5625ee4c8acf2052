"""Layout of a GGUF file: which weight of a transformers model is in which of its tensors, in which order of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyunlearn.errors import ModelError, first_line
from pyunlearn.models.gguf_formats import package, written_as

ARCHITECTURES = {"llama": ("llama", "mistral"), "qwen2": ("qwen2",), "qwen3": ("qwen3",)}
"""Architecture in a GGUF file -> `model_type` of the transformers models that it holds."""

_ROTATED = ("llama",)  # rows of queries and keys alternate between the halves that transformers rotates
_COMPUTED = ("rope_freqs.weight",)  # tensors that the converter computes from the configuration, and no weights
_SAME_TOKENS = 0.9  # share of the vocabulary; converters rename added and unused tokens


class Placed(NamedTuple):
    """A tensor of a GGUF file and the weight that it holds."""

    name: str
    weight: Tensor
    """In the shape and the order of rows of the file."""
    format: str
    """In which it is written."""
    source: Any
    """The tensor of the file that is taken as a model, a ReaderTensor of the package gguf."""


def read_like(path: str | Path) -> Any:
    """Return the reader of a GGUF file that a new file is to be like.

    Raises ModelError where it is none, or of an architecture whose layout is not known here.
    """
    gguf = package()
    file = Path(path).expanduser()
    if not file.is_file():
        raise ModelError(f"the GGUF file {path} was not found: give the file of the model that is served today")
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, KeyError, IndexError, OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{path} is no GGUF file, or damaged ({first_line(error)}): give the file of the model that is served today"
        ) from error
    if reader.byte_order != "I":
        raise ModelError(f"the GGUF file {path} is of the other byte order: give one of this machine's")
    if value_of(reader, "split.count", 1) > 1:
        raise ModelError(
            f"the GGUF file {path} is one of several parts: join them first, with llama-gguf-split --merge of llama.cpp"
        )
    architecture = value_of(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"the GGUF file {path} is of the architecture {architecture!r}, and pyunlearn writes those of "
            f"{', '.join(ARCHITECTURES)} alone: convert the saved folder with convert_hf_to_gguf.py of llama.cpp"
        )
    return reader


def value_of(reader: Any, key: str, default: Any = None) -> Any:
    """Return a value from a GGUF file's metadata."""
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def formats_of(reader: Any, model: Any, like: str | Path, at_least: str | None = None) -> dict[nn.Parameter, str]:
    """Return weight -> format in which a GGUF file like another one holds it, of a transformers model; see `placed`.

    The order of rows is the model's: a format rounds within rows. Raises ModelError where one weight has two formats.
    """
    formats = {t.name: t.format for t in placed(reader, model, like, at_least)}
    weights = _named(model, value_of(reader, "general.architecture"))
    own = {id(p): p for p in model.parameters()}
    out: dict[nn.Parameter, str] = {}
    for name, weight in weights.items():
        if name not in formats or id(weight) not in own:
            continue
        first = out.setdefault(own[id(weight)], formats[name])
        if first != formats[name]:
            raise ModelError(
                f"the GGUF file {like} holds embeddings and head apart, in {first} and {formats[name]}, and the model "
                f"has one weight for both: give a format that is not smaller than either (gguf_at_least, "
                "--gguf-at-least)"
            )
    return out


def placed(reader: Any, model: Any, like: str | Path, at_least: str | None = None) -> list[Placed]:
    """Return the weights of a transformers model at their tensors of a GGUF file, in the order of the file.

    The model may be on the meta device: shapes and settings are compared, no values. Tensors that hold no weights are
    left out.

    Args:
        reader: of the GGUF file, see `read_like`.
        model: the transformers model, without adapters.
        like: path of the GGUF file, for messages.
        at_least: format in which matrices are written that have a smaller one there.

    Raises:
        ModelError: the file is of another model: another architecture, shape, vocabulary, or setting.
    """
    architecture, config = value_of(reader, "general.architecture"), model.config
    if config.model_type not in ARCHITECTURES[architecture]:
        raise ModelError(
            f"the GGUF file {like} is of the architecture {architecture}, and the model is a {config.model_type}: "
            "give a GGUF file of the model itself"
        )
    if difference := _difference(reader, config, architecture):
        raise ModelError(f"the GGUF file {like} is of another model: {difference}; give one of the model itself")
    weights = _named(model, architecture)
    sources = {t.name: t for t in reader.tensors if t.name not in _COMPUTED}
    if "output.weight" not in sources and _is_tied(weights):
        del weights["output.weight"]
    if problem := _problem(weights, sources):
        raise ModelError(f"the GGUF file {like} is of another model: {problem}; give one of the model itself")
    return [
        Placed(name, _ordered(weights[name], name, config, architecture), written_as(t.tensor_type.name, at_least), t)
        for name, t in sources.items()
    ]


def _named(model: Any, architecture: str) -> dict[str, Tensor]:
    """Return name in a GGUF file -> weight. Raises ModelError for a weight that has no name there."""
    gguf = package()
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    weights = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ModelError(f"the model's weight {name} has no name in a GGUF file of the architecture {architecture}")
        weights[new] = weight
    return weights


def _is_tied(weights: Mapping[str, Tensor]) -> bool:
    """Return whether the head has the values of the embeddings, so that a file needs them once."""
    head, table = weights.get("output.weight"), weights["token_embd.weight"]
    if head is None or head is table or head.is_meta:
        return head is table
    return head.shape == table.shape and torch.equal(head, table)


def _problem(weights: Mapping[str, Tensor], sources: Mapping[str, Any]) -> str | None:
    """Return how the tensors of a file differ from a model's weights, a clause, or None."""
    for name, source in sources.items():
        if name not in weights:
            return f"the model has no weights for its tensor {name}"
        there, here = tuple(source.shape.tolist()[::-1]), tuple(weights[name].shape)
        if there != here:
            resized = name == "token_embd.weight" and there[1:] == here[1:]
            what = f"its vocabulary has {there[0]:,} tokens and the model's {here[0]:,}" if resized else None
            return what or f"its tensor {name} has the shape {there} and the model's weights {here}"
    missing = next((name for name in weights if name not in sources), None)
    return missing and f"it has no tensor {missing} for the weights of the model"


def _ordered(weight: Tensor, name: str, config: Any, architecture: str) -> Tensor:
    """Return a weight with its rows in the order of a GGUF file.

    Transformers rotates the first half of a head's rows with the second. GGUF's llama rotates neighbours, so row i of
    the first half is row 2i there, and row i of the second is row 2i + 1.
    """
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    own = next((count for part, count in heads.items() if part in name), None)
    if own is None or architecture not in _ROTATED:
        return weight
    rows, *rest = weight.shape
    return weight.reshape(own, 2, rows // own // 2, *rest).transpose(1, 2).reshape(weight.shape)


def _difference(reader: Any, config: Any, architecture: str) -> str | None:
    """Return the first setting in which a file's metadata and a model's configuration differ, as a clause, or None."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    settings = {  # key -> (value of the model, value where the file has none)
        "block_count": (config.num_hidden_layers, None),
        "embedding_length": (config.hidden_size, None),
        "attention.head_count": (heads, None),
        "attention.head_count_kv": (config.num_key_value_heads, heads),
        "attention.key_length": (size, config.hidden_size // heads),
        "attention.layer_norm_rms_epsilon": (config.rms_norm_eps, None),
        "rope.freq_base": (rope.get("rope_theta", getattr(config, "rope_theta", 10000.0)), 10000.0),
    }
    for key, (here, default) in settings.items():
        there = value_of(reader, f"{architecture}.{key}", default)
        if not isinstance(there, (int, float)) or not math.isclose(there, here, rel_tol=1e-5):
            return f"its {key} is {there if isinstance(there, (int, float)) else 'not one number'} and not {here:g}"
    kind = rope.get("rope_type", rope.get("type")) or "default"
    scaled = value_of(reader, f"{architecture}.rope.scaling.type", "none") != "none"
    scaled |= any(t.name in _COMPUTED for t in reader.tensors)
    if (kind == "default") == scaled and (kind != "default" or not _is_file(config)):
        return f"its positions are {'scaled' if scaled else 'not scaled'}, and the model has rope_type {kind}"
    return None


def _is_file(config: Any) -> bool:
    """Return whether a configuration was read from a GGUF file, of which transformers reads no scaling."""
    return str(getattr(config, "_name_or_path", "")).endswith(".gguf")


def tokens_problem(reader: Any, tokenizer: Any) -> str | None:
    """Return how the vocabulary of a file differs from that of a tokenizer, as a clause, or None."""
    there = value_of(reader, "tokenizer.ggml.tokens", [])
    rows = next(int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight")
    if len(there) != rows:
        return f"its tokenizer has {len(there):,} tokens and its embeddings {rows:,} rows"
    if tokenizer is None:
        return None
    count = min(len(tokenizer), rows)
    here = tokenizer.convert_ids_to_tokens(list(range(count)))
    same = sum(a == b for a, b in zip(there, here, strict=False))
    if same < _SAME_TOKENS * count:
        return f"{same:,} of its tokens are those of the model's tokenizer, which has {count:,}"
    return None
