"""Load models and tokenizers from a folder, a .gguf file or the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pyunlearn.errors import ModelError
from pyunlearn.models import gguf


def load(name: str | Path, *, dtype: torch.dtype = torch.float32, tokenizer: Any = None) -> tuple[Any, Any]:
    """Load a model and its tokenizer from a folder, a .gguf file or a name on the Hugging Face hub.

    Args:
        name: path or name; a folder may hold a PEFT adapter. The weights in a .gguf file are dequantized.
        dtype: of the weights.
        tokenizer: a tokenizer, or where to load it from; None: where the model is.

    Returns:
        The model on the CPU and the tokenizer.

    Raises:
        ModelError: no language model or tokenizer can be loaded from there.
    """
    if not str(name).endswith(".gguf"):
        return _load(str(name), {}, name, dtype, tokenizer)
    with gguf.cached_headers():
        return _load(str(Path(name).parent), {"gguf_file": Path(name).name}, name, dtype, tokenizer)


def _load(where: str, extra: dict[str, str], name: str | Path, dtype: torch.dtype, tokenizer: Any) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if not extra:
        _require_saved(Path(where))
    try:
        adapter = Path(where) / "adapter_config.json"
        base = json.loads(adapter.read_text()).get("base_model_name_or_path") if adapter.exists() else None
        config = AutoConfig.from_pretrained(base or where, **extra)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model, loading = kind.from_pretrained(base or where, dtype=dtype, output_loading_info=True, **extra)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loadable(str(name), error) from error
    if extra:
        gguf.mark_dequantized(model)
    head = model.get_output_embeddings()
    names = {n for n, p in model.named_parameters(remove_duplicate=False) if p is getattr(head, "weight", None)}
    if names and names <= set(loading["missing_keys"]):  # transformers initializes one at random
        raise ModelError(
            f"the model saved in {name!s} has no language-model head, so it gives text no probability: give one that "
            "was saved with it"
        )
    if base:
        model = _with_adapter(model, where)
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer or where, **({} if tokenizer else extra))
    return model, tokenizer


def require_loadable(name: str, where: str | Path) -> None:
    """Raise ModelError unless a folder, a file or a name on the hub holds the configuration of a model.

    No weights are loaded. `name` is the argument's name, for the message.
    """
    path, is_gguf = Path(where), str(where).endswith(".gguf")
    if path.exists():
        if not is_gguf:
            _require_saved(path)
        return
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(
            str(path.parent if is_gguf else where), **({"gguf_file": path.name} if is_gguf else {})
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loadable(f"{where!s}, the {name}", error) from error


def _not_loadable(name: str, error: Exception) -> ModelError:
    """Return the error for a model that transformers cannot load: its first line, and what can be given instead."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
    return ModelError(
        f"no language model could be loaded from {name}: {first}; give the folder that save_pretrained wrote, a .gguf "
        "file or a name on the hub"
    )


def _require_saved(where: Path) -> None:
    """Raise ModelError for a folder that save_pretrained did not write."""
    names = ("config.json", "adapter_config.json")
    if where.exists() and not any((where / each).exists() for each in names):
        raise ModelError(
            f"{where} holds no config.json, so it is no saved model: give the folder that save_pretrained wrote"
        )


def _with_adapter(model: Any, where: str) -> Any:
    """Return the model with the PEFT adapter saved there, trainable; transformers alone would load it frozen."""
    try:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, where, is_trainable=True, autocast_adapter_dtype=False).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"the adapter in {where} could not be loaded: {first}") from error


def load_tokenizer(name: str | Path, **extra: Any) -> Any:
    """Load the tokenizer in a folder or of a name on the hub. Raises ModelError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(name), **extra)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"no tokenizer could be loaded from {name!s}: give the one the model was trained with (tokenizer=, "
            "--tokenizer)"
        ) from error


def load_weights(path: Path) -> Any:
    """Load the model in a folder that save_pretrained wrote, in float32, without its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(path).is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(path, dtype=torch.float32)


def quiet_transformers() -> None:
    """Switch off the log lines and progress bars of transformers in this process."""
    from transformers.utils import logging

    quiet: Any = logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
