"""Load models and tokenizers from a folder, a .gguf file or the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyunlearn.errors import ModelError, PyunlearnError
from pyunlearn.models import four_bits, gguf
from pyunlearn.models.config import LoadOptions
from pyunlearn.models.devices import AUTO, spreads_layers, use_device
from pyunlearn.models.hub import host, hub_options

_ON_THE_HUB = re.compile(
    r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?(@[A-Za-z0-9_./-]+)?"
)  # all names there, and some of folders
_OPTIONS: ContextVar[LoadOptions | None] = ContextVar("_OPTIONS", default=None)
_EMPTY: ContextVar[bool] = ContextVar("_EMPTY", default=False)


@contextmanager
def load_options(options: LoadOptions) -> Iterator[None]:
    """Load models with these options within the context. The revision holds for no particular model: see `load`.

    Raises ArgumentError for a device that is not there.
    """
    if options.device not in (None, AUTO):
        use_device(options.device)
    else:
        spreads_layers(options.device)  # raises where that is impossible
    token = _OPTIONS.set(options)
    try:
        yield
    finally:
        _OPTIONS.reset(token)


@contextmanager
def without_weights(empty: bool = True) -> Iterator[None]:
    """Load models without their weights within the context, for another process to fill them, where `empty` is True.

    Their tensors are on the meta device. Adapters, .gguf files, 4-bit models and models that were saved without a dtype
    are loaded whole all the same.
    """
    token = _EMPTY.set(empty)
    try:
        yield
    finally:
        _EMPTY.reset(token)


def present_options() -> LoadOptions:
    """Return the options of `load_options`, or the defaults outside of it."""
    return _OPTIONS.get() or LoadOptions()


def _arguments(name: str | Path) -> tuple[str, dict[str, Any]]:
    """Return where transformers finds a model, and the arguments with which it reads its configuration."""
    arguments: dict[str, Any] = {"trust_remote_code": present_options().trust_remote_code}
    where, at, revision = str(name).partition("@")
    if at and not Path(name).exists():
        return where, arguments | {"revision": revision}
    if str(name).endswith(".gguf"):
        return str(Path(name).parent), arguments | {"gguf_file": Path(name).name}
    return str(name), arguments


def load(name: str | Path, *, dtype: torch.dtype | None = None, tokenizer: Any = None) -> tuple[Any, Any]:
    """Load a model and its tokenizer from a folder, a .gguf file or a name on the Hugging Face hub.

    Args:
        name: path or name; a name may end in @REVISION; a folder may hold a PEFT adapter. The weights in a .gguf file
            are dequantized, to float32 by default.
        dtype: of the weights; default: the one in which they were saved, or that of `load_options`.
        tokenizer: a tokenizer, or where to load it from; None: where the model is.

    Returns:
        The model on the CPU and the tokenizer.

    Raises:
        ModelError: no language model or tokenizer can be loaded from there.
    """
    name = located(name)
    headers = gguf.cached_headers() if str(name).endswith(".gguf") else nullcontext()
    with headers:
        return _load(name, dtype, tokenizer)


class Origin(NamedTuple):
    """Place and configuration of a model that is to be loaded."""

    where: str
    """Folder, or name on the hub, that transformers reads."""
    adapter: str | None
    """Folder of the adapter that was made on the model; None without one."""
    name: str
    """Name of the model without the adapter."""
    arguments: dict[str, Any]
    """Keyword arguments with which transformers reads it."""
    config: Any

    @property
    def is_gguf(self) -> bool:
        """True for a .gguf file, whose weights are dequantized."""
        return "gguf_file" in self.arguments

    @property
    def kind(self) -> Any:
        """Class of transformers that makes or loads such a model."""
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM if self.config.is_encoder_decoder else AutoModelForCausalLM

    def on_meta(self, dtype: torch.dtype, attn_implementation: str | None) -> Any:
        """Return the model on the meta device, where tensors have shapes and dtypes, and no values."""
        with torch.device("meta"):
            model = self.kind.from_config(
                self.config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=self.arguments["trust_remote_code"],
            )
        return model.eval()


@contextmanager
def origin(name: str | Path) -> Iterator[Origin]:
    """Yield the origin of a model; loading errors within the block are raised as ModelError."""
    from transformers import AutoConfig

    folder, arguments = _arguments(name)
    where = folder
    try:
        base = _adapted(folder)
        if base is not None:
            where, arguments = _arguments(base)
        elif "gguf_file" not in arguments:
            _require_saved(Path(where))
        arguments |= hub_options(where)
        config = AutoConfig.from_pretrained(where, **arguments)
        yield Origin(where, folder if base else None, base or str(name), arguments, config)
    except PyunlearnError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loadable(str(name), error, where if "local_files_only" in arguments else "") from error


def dtype_of(dtype: torch.dtype | None, *, is_gguf: bool) -> torch.dtype | None:
    """Return the dtype in which weights are loaded; None for the one in which they were saved.

    Args:
        dtype: of a call, or None for that of `load_options`.
        is_gguf: True for a .gguf file, which is dequantized to float32.
    """
    chosen = present_options().dtype
    if dtype is not None or chosen == "auto":
        return dtype or (torch.float32 if is_gguf else None)
    wanted: torch.dtype = getattr(torch, chosen)
    return wanted


def _load(name: str | Path, dtype: torch.dtype | None, tokenizer: Any) -> tuple[Any, Any]:
    options = present_options()
    with origin(name) as source:
        dtype = dtype_of(dtype, is_gguf=source.is_gguf)
        weights: dict[str, Any] = {"dtype": dtype or "auto"}
        if options.attn_implementation is not None:
            weights["attn_implementation"] = options.attn_implementation
        if options.load_in_4bit:
            weights |= four_bits.loading_arguments()
        if spreads_layers(options.device):
            weights["device_map"] = "auto"
        loading: dict[str, Any] = {}
        undecided = source.adapter or source.is_gguf or options.load_in_4bit or (not dtype and not source.config.dtype)
        if _EMPTY.get() and not undecided:
            model = source.on_meta(dtype or source.config.dtype, options.attn_implementation)
        else:
            model, loading = source.kind.from_pretrained(
                source.where, output_loading_info=True, **weights, **source.arguments
            )
    four_bits.keep_differentiable(model)
    if source.is_gguf:
        gguf.mark_dequantized(model)
        model.name_or_path = source.name  # an adapter names it as its base
    _require_whole(model, str(name), loading.get("missing_keys", ()))
    if source.adapter:
        model = _with_adapter(model, source.adapter, as_saved=dtype is None)
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer or name)
    return model, tokenizer


def _require_whole(model: Any, name: str, missing: Collection[str]) -> None:
    """Raise ModelError where weights were not in the files of a saved model: transformers sets them at random."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    read = {id(p) for n, p in tensors.items() if n not in missing}
    unread = [n for n, p in tensors.items() if id(p) not in read]
    if not unread:
        return
    head = getattr(model.get_output_embeddings(), "weight", None)
    if any(tensors[n] is head for n in unread):
        raise ModelError(
            f"the model saved in {name} has no language-model head, so it gives text no probability: give one that was "
            "saved with it"
        )
    raise ModelError(
        f"the model saved in {name} lacks {len(unread)} of its {len(tensors)} tensors ({unread[0]}), which would be "
        "random: give one that was saved whole, with the class that its config.json names"
    )


def require_loadable(name: str, where: str | Path, *, look_up: bool = True) -> None:
    """Raise ModelError unless a folder, a file or a name on the hub holds the configuration of a model.

    No weights are loaded. `name` is the argument's name, for the message; without `look_up`, no name is looked up on
    the hub.
    """
    where = located(where, f", the {name}")
    path, is_gguf = Path(where), str(where).endswith(".gguf")
    if path.exists():
        if not is_gguf:
            _require_saved(path)
        return
    if not look_up:
        return
    from transformers import AutoConfig

    place, arguments = _arguments(where)
    arguments |= hub_options(place)
    try:
        AutoConfig.from_pretrained(place, **arguments)
    except (OSError, ValueError, KeyError, ImportError) as error:
        away = place if "local_files_only" in arguments else ""
        raise _not_loadable(f"{where!s}, the {name}", error, away) from error


def located(name: str | Path, role: str = "") -> str | Path:
    """Return a name as it is, or a path with ~ replaced, so that only what can be on the hub is looked up there.

    Raises ModelError, at once, for what must be a path and leads nowhere. `role` ends its name in the message.
    """
    try:
        path = Path(name).expanduser()
        if path.exists():
            return path if str(name).startswith("~") else name
    except (OSError, RuntimeError, ValueError):  # too long, no home folder, a NUL
        path = Path("/")
    repository = str(path.parent) if path.suffix == ".gguf" else str(name)
    first = repository.partition("/")[0]
    on_the_hub = _ON_THE_HUB.fullmatch(repository) and first not in (".", "..") and not str(name).startswith("~")
    if isinstance(name, Path) or not on_the_hub or ("/" in str(name) and Path(first).is_dir()):
        raise ModelError(
            f"no language model could be loaded from {name!s}{role}: nothing is there; give the folder that "
            "save_pretrained wrote, a .gguf file or a name on the hub"
        )
    folder, at, revision = str(name).partition("@")
    if at and Path(folder).exists():  # transformers would load it and pass over the revision
        raise ModelError(
            f"{folder} is a folder on this machine, and {revision} would be a revision on the hub: leave it out"
        )
    return name


def _not_loadable(name: str, error: Exception, away: str = "") -> ModelError:
    """Return the error for a model that transformers cannot load: its first line, and what can be given instead.

    `away` is its name where the hub could not be reached.
    """
    first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
    if away:
        first = f"{away} is neither here nor among the downloads, and the hub ({host()[0]}) cannot be reached"
    elif "trust_remote_code" in str(error):
        first = "it needs code of its own, which runs only with --trust-remote-code, or when you load it yourself"
    return ModelError(
        f"no language model could be loaded from {name}: {first}; give the folder that save_pretrained wrote, a .gguf "
        "file or a name on the hub"
    )


def _adapted(where: str) -> str | None:
    """Return the model on which the PEFT adapter in a folder was made, as NAME@REVISION where it has one.

    None where there is no adapter, or one that names no model.
    """
    path = Path(where) / "adapter_config.json"
    if not path.exists():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError("adapter_config.json must hold an object")
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    return f"{base}@{revision}" if base and revision and not Path(base).exists() else base


def _require_saved(where: Path) -> None:
    """Raise ModelError for a folder that save_pretrained did not write."""
    names = ("config.json", "adapter_config.json")
    if where.exists() and not any((where / each).exists() for each in names):
        raise ModelError(
            f"{where} holds no config.json, so it is no saved model: give the folder that save_pretrained wrote"
        )


def _with_adapter(model: Any, where: str, as_saved: bool) -> Any:
    """Return the model with the PEFT adapter saved there, trainable; transformers alone would load it frozen.

    `as_saved`: the adapter's weights keep the dtype in which they were saved, which need not be the model's.
    """
    try:
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(model, where, is_trainable=True, autocast_adapter_dtype=as_saved).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"the adapter in {where} could not be loaded: {first}") from error
    if as_saved and (dtype := saved_dtype(Path(where) / "adapter_model.safetensors")):
        for p in adapted.parameters():
            if p.requires_grad:
                p.data = p.data.to(dtype)
    return adapted


def saved_dtype(path: Path) -> torch.dtype | None:
    """Return the dtype of the first tensor in a .safetensors file; None where there is no such file."""
    from safetensors import safe_open

    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        first = next(iter(file.keys()), None)
        return None if first is None else file.get_tensor(first).dtype


def load_tokenizer(name: str | Path) -> Any:
    """Load the tokenizer in a folder or of a name on the hub. Raises ModelError where there is none."""
    from transformers import AutoTokenizer

    try:
        where, arguments = _arguments(located(name))
        return AutoTokenizer.from_pretrained(where, **arguments, **hub_options(where))
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        # ModelError is a ValueError; TypeError is what sentencepiece raises where its file is missing
        raise ModelError(
            f"no tokenizer could be loaded from {name!s}: give the one the model was trained with (tokenizer=, "
            "--tokenizer)"
        ) from error


def load_weights(path: Path) -> Any:
    """Load the model in a folder that save_pretrained wrote, in float32, without its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)


def quiet_transformers() -> None:
    """Switch off the log lines and progress bars of transformers in this process."""
    from transformers.utils import logging

    quiet: Any = logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
