"""Load models and tokenizers from a folder, a .gguf file or the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pyunlearn.data.examples import Example
from pyunlearn.data.tokens import Tokens, encode
from pyunlearn.errors import ModelError
from pyunlearn.models import gguf
from pyunlearn.models.inspection import (
    context_length,
    is_encoder_decoder,
    require_language_model,
    unwrapped,
    vocabulary_of,
)


def load(name: str | Path, *, dtype: torch.dtype = torch.float32, tokenizer: Any = None) -> tuple[Any, Any]:
    """The model and tokenizer behind a name or path; a path to a .gguf file is dequantized.

    Raises ModelError when nothing can be loaded from there, or what is there writes no text.
    """
    if not str(name).endswith(".gguf"):
        return _load(str(name), {}, name, dtype, tokenizer)
    with gguf.read_once():
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
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"no language model could be loaded from {name!s}: {first}") from error
    if extra:
        gguf.dequantized(model)
    head = model.get_output_embeddings()
    names = {n for n, p in model.named_parameters(remove_duplicate=False) if p is getattr(head, "weight", None)}
    if names and names <= set(loading["missing_keys"]):  # transformers makes one up, at random, and goes on
        raise ModelError(
            f"the model saved in {name!s} has no language-model head, so it gives text no probability: give one that was saved with it"
        )
    if base:
        model = _with_adapter(model, where)
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer or where, **({} if tokenizer else extra))
    return model, tokenizer


def require_loadable(name: str, where: str | Path) -> None:
    """Raise ModelError where no model can be: a folder or file of another kind, or a name without a configuration.

    No weights are loaded. `name` is the argument's.
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
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"no language model could be loaded from {where!s}, the {name}: {first}") from error


def _require_saved(where: Path) -> None:
    names = ("config.json", "adapter_config.json")
    if where.exists() and not any((where / each).exists() for each in names):
        raise ModelError(
            f"{where} holds no config.json, so it is no saved model: give the folder that save_pretrained wrote"
        )


def _with_adapter(model: Any, where: str) -> Any:
    """The model with the PEFT adapter saved there, which trains; transformers alone would load it frozen."""
    try:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, where, is_trainable=True, autocast_adapter_dtype=False).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"the adapter in {where} could not be loaded: {first}") from error


def load_tokenizer(name: str | Path, **extra: Any) -> Any:
    """The tokenizer behind a name or path. Raises ModelError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(name), **extra)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"no tokenizer could be loaded from {name!s}: give the one the model was trained with (tokenizer=, --tokenizer)"
        ) from error


def tokenizer_of(model: Any, tokenizer: Any = None) -> Any:
    """The tokenizer given, or the one that lies where it says or where the model came from. Raises ModelError when there is none."""
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        return tokenizer
    where = str(tokenizer or getattr(unwrapped(model), "name_or_path", "") or "")
    if where:
        return load_tokenizer(where)
    raise ModelError(
        "the model does not say where its tokenizer is: pass tokenizer=, the one the model was trained with"
    )


def encoded(
    model: Any, tokenizer: Any, examples: Mapping[str, Sequence[Example]], truncate: bool
) -> dict[str, list[Tokens]]:
    """The examples of each role as tokens of this model. Raises DataError as `data.encode` does."""
    both, length = is_encoder_decoder(model), context_length(model)
    return {
        role: encode(found, tokenizer, role=role, max_length=length, encoder_decoder=both, truncate=truncate)
        for role, found in examples.items()
    }


def opened(given: Any, tokenizer: Any, *, vocabulary: int | None = None, name: str = "model") -> tuple[Any, Any]:
    """(model, its tokenizer); one that is loaded here goes to a card where there is one.

    Raises ModelError when it cannot be used, or reads another number of tokens than `vocabulary`.
    """
    if isinstance(given, (str, Path)):
        given, tokenizer = load(given, tokenizer=tokenizer)
        given = given.to("cuda" if torch.cuda.is_available() else "cpu")
    require_language_model(given)
    if vocabulary is not None and vocabulary_of(given) != vocabulary:
        raise ModelError(f"{name} has another vocabulary than the model: give one of the same family")
    return given, tokenizer_of(given, tokenizer)


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
